"""The training engine `packed`: no padding, no prompt twice, no logits that no loss needs, the same optimizer batches.

transformers' Trainer keeps the optimizer, the schedule, clipping, callbacks and the state; what happens between two
optimizer steps is here. One batch of the loader is one optimizer batch; it is cut into rows of at most so many tokens,
samples of like length together, so that no batch changes with the cut.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from transformers import Trainer

from peft_align.data.tokenization import TokenizedPair
from peft_align.models.flex_attention import WAYS, Trial, of_all, try_both
from peft_align.models.fused import fused
from peft_align.models.packed_attention import packed
from peft_align.models.packed_scoring import response_scores, token_scores, tolerance_of
from peft_align.models.packing import Row, Sample, micro_batches, pack
from peft_align.store.references import References
from peft_align.training import processes
from peft_align.training.memory import (
    MEASURED,
    MOST,
    OPTIMIZER,
    free_bytes,
    kept_bytes,
    out_of_memory,
    row_tokens,
)
from peft_align.training.randomness import TorchState, same_randomness
from peft_align.training.state import ExactState

TRIED = 4096  # tokens of the row that both ways of attention are tried on, at most
FORWARD = 2  # raised when a change of the forward pass changes what it computes, in the last digits


class PackedTrainer(ExactState, Trainer):  # type: ignore[misc]
    """Trains on samples that are tokenized, truncated and in order.

    Args:
        samples: as many as the run has steps times samples a step.
        rows: what they are of.
        budget: tokens of a row; None: what fits.
        checkpointing: whether activations are recomputed in backward; None: where they do not fit.
        attention: parts, flex, or auto: the faster one on a GPU.
        arguments: of transformers' Trainer.

    Attributes:
        row_losses: of the last step, by sample, of all processes.
        together: makes the forward and backward of a batch together with other runs (training/pack_runs.py), given this
            trainer, the batch and its size; returns its loss, or None if this is to be done alone.
    """

    _total_train_tokens = 0
    together: Callable[[PackedTrainer, Sequence[int], float], torch.Tensor | None] | None = None

    def __init__(
        self,
        samples: Sequence[Sample],
        rows: Sequence[TokenizedPair],
        budget: int | None,
        checkpointing: bool | None,
        attention: str,
        **arguments: Any,
    ) -> None:
        super().__init__(train_dataset=range(len(samples)), data_collator=_numbered, **arguments)
        self.samples, self.rows, self.asked = samples, rows, (budget, checkpointing)
        self.budget, self.checkpointing = budget or MOST[self.args.device.type], False
        self.attention = attention
        self.measured: dict[str, Any] = {}
        self.row_losses: dict[int, float] = {}
        self.forget()

    def base(self, model: Any) -> Any:
        """The language model under the adapter and whatever wraps it."""
        return self.accelerator.unwrap_model(model).get_base_model()

    def loss(self, scores: torch.Tensor, row: Row, indexes: Sequence[int], size: float) -> torch.Tensor:
        """The share that a row's samples have in the loss of their batch.

        Args:
            scores: (N,), the log-probabilities of the row's scored tokens.
            row: of samples.
            indexes: which of `samples` they are.
            size: of the batch, see below.
        """
        raise NotImplementedError

    def size(self, batch: Sequence[int]) -> float:
        """What a sum over a batch is divided by; of several processes, such that the mean over them is the batch's.

        Args:
            batch: indexes of the samples that this process has of it.
        """
        raise NotImplementedError

    def choose(self, before: Mapping[str, Any], attention: str | None = None) -> None:
        """Decide how rows attend, how many tokens they have, and whether activations are recomputed in backward.

        What was not asked for comes from a measurement: no recomputing where the longest sample fits without, as it
        costs a forward pass. Several processes choose the same.

        Args:
            before: what an interrupted run had come to; empty if there is none.
            attention: what a run on the same base came to, which holds for `auto` too; None: there was none.
        """
        gc.collect()  # earlier trainers refer to themselves in circles, and what they hold would be counted
        budget, checkpointing = self.asked
        if self.attention == "auto" and attention is not None:
            self.attention = attention
        if before:
            self.budget = min(before["micro_batch_tokens"], budget or before["micro_batch_tokens"])
            self._checkpoint(before["gradient_checkpointing"] or bool(checkpointing))
            self._choose_attention(before.get("attention", "parts"))
            self.measured = before["measured"]
            return
        self._checkpoint(bool(checkpointing))
        self._choose_attention(self.attention)
        if budget is not None and checkpointing is not None:
            return
        longest = max(map(len, self.samples))
        ways = (False, True) if checkpointing is None else (checkpointing,)
        for self.checkpointing in ways:
            self._checkpoint(self.checkpointing)
            free = free_bytes(self.args.device) - OPTIMIZER * sum(p.numel() for p in self.trained())
            per_token = max(processes.gathered(self._bytes_per_token()))
            fitting = row_tokens(min(processes.gathered(free)), per_token, self.args.device.type)
            self.measured["free_bytes"] = free
            if per_token < math.inf:
                self.measured["bytes_per_token"] = round(per_token)
            if fitting >= (budget or longest):
                break
        self.budget = budget or fitting

    def _choose_attention(self, asked: str) -> None:
        """Flex attention if asked for and nothing speaks against it, the faster way if that is asked for."""
        self.attention = "parts"
        if asked == "parts" or (asked == "auto" and self.args.device.type == "cpu"):
            return
        trial = of_all(processes.gathered(self._tried_attention(timed=asked == "auto")))
        self.attention = trial.chosen
        if trial.seconds:
            self.measured["attention_seconds"] = trial.seconds
        processes.say(str(trial))

    def _tried_attention(self, *, timed: bool) -> Trial:
        """Both ways on a row of the first batch, shortened until it fits."""
        batch = self.samples[: self.args.per_device_train_batch_size]
        tolerance = tolerance_of(torch.bfloat16 if self.args.bf16 else self.base(self.model).dtype)
        self.model.train()
        tokens = min(TRIED, self.budget)
        while True:
            part = micro_batches(batch, tokens)[0]
            row = pack([batch[i] for i in part], self.args.device)
            try:
                return try_both(partial(self._scores_and_gradient, row), tolerance, timed=timed)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    return Trial(why_not="there is no memory to try it")
                tokens //= 2

    def _scores_and_gradient(self, row: Row, way: str) -> torch.Tensor:
        """The scores of a row's responses and the norm of their mean's gradient, always with the same dropout."""
        base = self.base(self.model)
        try:
            with same_randomness(), packed(base, WAYS[way]), fused(base):
                with self.accelerator.autocast():
                    scores = response_scores(base, row)
                scores.mean().backward()  # type: ignore[no-untyped-call]
            norms = [p.grad.double().norm() for p in self.trained() if p.grad is not None]
            return torch.cat((scores.detach(), torch.stack(norms).norm()[None]))
        finally:
            self.model.zero_grad()

    def trained(self) -> list[torch.nn.Parameter]:
        """The weights that are trained."""
        return [p for p in self.accelerator.unwrap_model(self.model).parameters() if p.requires_grad]

    def _checkpoint(self, on: bool) -> None:
        self.checkpointing, base = on, self.base(self.model)
        if on:
            checkpoint_activations(base)
        else:
            base.gradient_checkpointing_disable()

    def _bytes_per_token(self) -> float:
        """What the longest samples need in forward and backward; without end if not even the longest fits."""
        order = sorted(range(len(self.samples)), key=lambda i: -len(self.samples[i]))
        tokens = list(accumulate(len(self.samples[i]) for i in order))
        several = min(sum(size < MEASURED for size in tokens) + 1, len(tokens))
        self.model.train()
        for count in (several, 1):
            self.budget = tokens[:several][count - 1]
            try:
                with same_randomness():
                    work = partial(self._forward_backward, self.model, order[:count], 1.0)
                    return kept_bytes(work, self.args.device) / self.budget
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            finally:
                self.model.zero_grad()
        return math.inf

    def prepare(self, references: References, tick: Callable[[int], None]) -> dict[str, int]:
        """Compute what is needed before the first step, the model as it starts; returns what the record says of it."""
        return {}

    def forget(self) -> None:
        """A batch begins: nothing is told of it yet."""
        self._told: dict[str, torch.Tensor] = {}
        self._losses: list[tuple[Sequence[int], torch.Tensor]] = []

    def tell(self, values: dict[str, torch.Tensor], share: float) -> None:
        """Have values logged with the step: the sum of what is told, each times its share."""
        for name, value in values.items():
            part = value.double() * share
            self._told[name] = self._told[name] + part if name in self._told else part

    def tell_losses(self, indexes: Sequence[int], losses: torch.Tensor) -> None:
        """Have the loss of each of some samples recorded: (samples,), fp64. Nothing waits for the device yet."""
        self._losses.append((indexes, losses.detach()))

    def _all_told(self) -> tuple[dict[str, float], dict[int, float]]:
        """What was told of the batch, and the loss of each sample of it, in one transfer from the device."""
        indexes = [i for some, _ in self._losses for i in some]
        parts = [value[None] for value in self._told.values()]
        flat = torch.cat([*parts, *(losses for _, losses in self._losses)]).tolist()
        means = dict(zip(self._told, flat[: len(parts)], strict=True))
        return means, dict(zip(indexes, flat[len(parts) :], strict=True))

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one optimizer batch; returns its loss.

        A row that does not fit into memory makes the rows shorter (see have_less), and the batch is begun again.
        """
        model.train()
        batch = inputs["rows"].tolist()
        size = self.size(batch)
        if self.together is not None and (joint := self.together(self, batch, size)) is not None:
            return joint
        random = TorchState.now()
        while True:
            try:
                found = self._forward_backward(model, batch, size)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                found = None
            if all(processes.gathered(found is not None)):
                break
            self.have_less(max(len(self.samples[i]) for i in batch))
            model.zero_grad()
            if random.gpus:
                torch.cuda.empty_cache()
            random.restore()
        assert found is not None
        if processes.count() > 1:  # the forward is not the one that DistributedDataParallel waits for
            for parameter in self.accelerator.unwrap_model(model).parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= processes.count()
        return found

    def have_less(self, longest: int) -> None:
        """Shorter rows from now on; where they are short already, activations are recomputed.

        Args:
            longest: tokens of the longest sample that is to fit.

        Raises:
            MemoryError: nothing more can be done.
        """
        if self.budget > longest // 2:
            self.budget //= 2
            processes.say(f"out of memory: going on with {self.budget} tokens at a time")
        elif not self.checkpointing and self.asked[1] is None:
            self._checkpoint(True)
            processes.say("out of memory: going on with activations computed twice (train.gradient_checkpointing)")
        else:
            raise MemoryError(f"a single sample of {longest} tokens does not fit into memory")

    def _forward_backward(self, model: Any, batch: Sequence[int], size: float) -> torch.Tensor:
        base, total = self.base(model), torch.zeros((), device=self.args.device)
        self.forget()
        samples = [self.samples[i] for i in batch]
        for part in micro_batches(samples, self.budget):
            row = pack([samples[i] for i in part], self.args.device)
            with packed(base, WAYS[self.attention]), fused(base):
                with self.accelerator.autocast():
                    loss = self.loss(token_scores(base, row), row, [batch[i] for i in part], size)
                self.accelerator.backward(loss)  # inside: recomputed activations attend in the same way
            total += loss.detach()
        return total

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not measured here

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            everywhere = processes.gathered(self._all_told())
            means = {name: sum(told[name] for told, _ in everywhere) / len(everywhere) for name in self._told}
            self.row_losses = {i: loss for _, losses in everywhere for i, loss in losses.items()}
            logs = {**logs, **means}
        super().log(logs, *args, **kwargs)


def checkpoint_activations(model: Any) -> None:
    """Have a transformers model recompute its activations in backward, without its hook on the embeddings.

    That one makes inputs require gradients, which reentrant checkpointing needs; it piles up with every call.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


def _numbered(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(rows)}
