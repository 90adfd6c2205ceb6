"""The losses of the engine `packed`: SFT's next-token loss on the response, and DPO's sigmoid loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import TrainingArguments

from peft_align.config.schema import DPO, Config
from peft_align.data.tokenization import TokenizedPair
from peft_align.models.flex_attention import WAYS
from peft_align.models.fused import fused
from peft_align.models.packed_attention import packed
from peft_align.models.packed_scoring import response_scores, response_sums
from peft_align.models.packing import Row, Sample, micro_batches, pack, sample_of
from peft_align.store.records import json_number
from peft_align.store.references import References, sample_digest
from peft_align.training import processes
from peft_align.training.engine import PackedTrainer
from peft_align.training.memory import out_of_memory
from peft_align.training.numerics import TrainingFailed, names, of_rows


class PackedSFT(PackedTrainer):
    """The mean over all response tokens of an optimizer batch (of all processes), as transformers' Trainer has it."""

    def loss(self, scores: torch.Tensor, row: Row, indexes: Sequence[int], size: float) -> torch.Tensor:
        tokens = torch.tensor([self._scored(i) for i in indexes], device=scores.device)
        self.tell_losses(indexes, -response_sums(scores.detach(), row) / tokens)
        return -scores.sum() / size

    def size(self, batch: Sequence[int]) -> float:
        return float(sum(processes.gathered(sum(map(self._scored, batch)))) / processes.count())

    def _scored(self, i: int) -> int:
        """How many tokens of a sample are."""
        sample = self.samples[i]
        return sum(len(words) - (not sample.prompt) for words in sample.responses)


class PackedDPO(PackedTrainer):
    """The mean over pairs of -log sigmoid(beta * margin) (Rafailov et al. 2023, equation 7).

    Attributes:
        reference: (pairs, 2), the reference's log-probabilities of the chosen and rejected responses.
    """

    reference: torch.Tensor

    def __init__(self, beta: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.beta = beta
        self.reference = torch.zeros(len(self.samples), 2, dtype=torch.float64)

    def loss(self, scores: torch.Tensor, row: Row, indexes: Sequence[int], size: float) -> torch.Tensor:
        sums = response_sums(scores, row).view(-1, 2)
        rewards = self.beta * (sums - self.reference[list(indexes)].to(sums.device))
        margins = rewards[:, 0] - rewards[:, 1]
        with torch.no_grad():
            told = {
                "rewards/chosen": rewards[:, 0].sum(),
                "rewards/rejected": rewards[:, 1].sum(),
                "rewards/accuracies": (margins > 0).sum(),
                "rewards/margins": margins.sum(),
                "logps/chosen": sums[:, 0].sum(),
                "logps/rejected": sums[:, 1].sum(),
            }
            self.tell(told, 1 / size)
        losses = -logsigmoid(margins)
        self.tell_losses(indexes, losses)
        return losses.sum() / size

    def size(self, batch: Sequence[int]) -> float:
        return len(batch)

    def prepare(self, references: References, tick: Callable[[int], None]) -> dict[str, int]:
        digests = [sample_digest(sample.prompt, *sample.responses) for sample in self.samples]
        by_digest = dict(zip(digests, self.samples, strict=True))
        found, computed = references.of(by_digest, self._reference_of, tick)
        self.reference = torch.tensor([found[digest] for digest in digests], dtype=torch.float64)
        return {"samples": len(by_digest), "computed": sum(processes.gathered(computed))}

    def _reference_of(self, samples: Sequence[Sample]) -> list[list[float]]:
        """What is kept for all runs that refer to the same; so it must be finite."""
        scores = self.score(self.model, samples)
        bad = {sample for sample, finite in zip(samples, scores.isfinite().all(1).tolist(), strict=True) if not finite}
        if bad:
            found = {row.id: row for row, sample in zip(self.rows, self.samples, strict=True) if sample in bad}
            rows = list(found.values())
            worst = float(scores[~scores.isfinite()][0])
            details = {"what": "reference", "value": json_number(worst), **of_rows(rows)}
            raise TrainingFailed(f"the reference's log-probability is {worst} of {names(rows)}", details)
        return scores.tolist()

    @torch.no_grad()
    def score(self, model: Any, samples: Sequence[Sample]) -> torch.Tensor:
        """The log-probabilities of both responses of samples as the model stands, without dropout: (samples, 2)."""
        base, found = self.base(model), torch.empty(len(samples), 2, dtype=torch.float64)
        base.eval()
        parts = micro_batches(samples, self.budget)
        while parts:
            some = [samples[i] for i in parts[0]]
            try:
                with packed(base, WAYS[self.attention]), fused(base), self.accelerator.autocast():
                    row = pack(some, self.args.device)
                    found[parts[0]] = response_scores(base, row).view(-1, 2).cpu()
                parts.pop(0)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self.have_less(max(map(len, some)))
                left = [i for part in parts for i in part]
                parts = [[left[i] for i in part] for part in micro_batches([samples[i] for i in left], self.budget)]
        return found


def sft_trainer(
    model: Any, tokenizer: Any, rows: Sequence[TokenizedPair], config: Config, arguments: dict[str, Any], callbacks: Any
) -> PackedTrainer:
    """See training.sft.trainer."""
    return PackedSFT(**_given(model, tokenizer, rows, config, arguments, callbacks, both=False))


def dpo_trainer(
    model: Any, tokenizer: Any, rows: Sequence[TokenizedPair], config: Config, arguments: dict[str, Any], callbacks: Any
) -> PackedTrainer:
    """See training.sft.trainer. The reference is the model as it starts: a fresh adapter adds nothing to the base."""
    assert isinstance(config.method, DPO)
    return PackedDPO(config.method.beta, **_given(model, tokenizer, rows, config, arguments, callbacks, both=True))


def _given(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedPair],
    config: Config,
    arguments: dict[str, Any],
    callbacks: Any,
    *,
    both: bool,
) -> dict[str, Any]:
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    whole = {**arguments, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    whole["activation_checkpointing"] = False  # the engine's own choice
    return {
        "model": model,
        "args": TrainingArguments(**whole),
        "samples": [sample_of(row, both=both) for row in rows],
        "rows": rows,
        "budget": config.train.micro_batch_tokens,
        "checkpointing": config.train.gradient_checkpointing,
        "attention": config.train.attention,
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
