"""Several runs of one base in one process and one forward pass (`train.pack_runs`), each with the result it has alone.

Each run is its own training, with its own adapter, trainer, random numbers, checkpoints and record; all of it goes in
turns (training/turns.py), and stops where a step's forward and backward are due. When all have come there, their
samples are put into rows together: a product with frozen weights is taken once for the tokens of all runs, a low-rank
product for each run's own (models/fused.py). The sum of the losses is what is differentiated, and each adapter has its
part in one term of it alone. Who ends earlier leaves; who is the last goes on as if it had been alone.

Limits: one process a run, the engine `packed`. Dropout falls as in a run alone as long as a batch is one row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_align.models.flex_attention import WAYS
from peft_align.models.fused import Share, fused
from peft_align.models.loading import Base, with_own_modules
from peft_align.models.packed_attention import packed
from peft_align.models.packed_scoring import token_scores
from peft_align.models.packing import join, micro_batches, pack
from peft_align.training.engine import PackedTrainer, checkpoint_activations
from peft_align.training.memory import out_of_memory
from peft_align.training.randomness import Randomness
from peft_align.training.turns import Turn


@dataclass(frozen=True)
class Batch:
    """What one run wants of a step: see PackedTrainer."""

    trainer: PackedTrainer
    indexes: Sequence[int]
    size: float

    @property
    def tokens(self) -> int:
        return sum(len(self.trainer.samples[i]) for i in self.indexes)


class Member(Turn):
    """One run of a pack.

    Attributes:
        run_id: of the run.
        randomness: its random numbers.
        companions: ids of the runs that it made steps with.
        handed: its next batch.
    """

    def __init__(
        self,
        group: Pack,
        run_id: str,
        work: Callable[[Member], Any],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(lambda: work(self), around)
        self.group, self.run_id = group, run_id
        self.randomness = Randomness()
        self.companions: set[str] = set()
        self.spent = self._since = 0.0

    def base(self, load: Callable[[], Base]) -> Base:
        """The base that all share, to put an adapter on; whoever comes first loads it."""
        if self.group.base is None:
            self.group.base = load()
        return with_own_modules(self.group.base)

    def step(self, trainer: PackedTrainer, indexes: Sequence[int], size: float) -> torch.Tensor | None:
        """See PackedTrainer.together."""
        loss: torch.Tensor | None = self.hand_over(Batch(trainer, indexes, size))
        return loss

    def clock(self) -> float:
        """Seconds spent on this run: its turns, and its tokens' share of what was done together."""
        return self.spent + time.monotonic() - self._since

    def go_on(self, told: Any = None) -> None:
        self._since = time.monotonic()
        with self.randomness.at_work():
            super().go_on(told)
        self.spent = self.clock()


@dataclass
class Pack:
    """Runs that are trained together.

    Attributes:
        members: the runs, in order.
        base: what they share, once it is loaded; its own modules have no adapters.
        apart: each makes its steps alone, in turn: together they do not fit, or the base draws random numbers itself.
    """

    members: list[Member] = field(default_factory=list)
    base: Base | None = None
    apart: bool = False

    def add(
        self,
        run_id: str,
        work: Callable[[Member], Any],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Take in one more run.

        Args:
            run_id: of the run.
            work: trains it, with the base that Member.base gives and Member.step for PackedTrainer.together.
            around: entered for each of its turns.
        """
        self.members.append(Member(self, run_id, work, around))

    def train(self) -> list[Any]:
        """Do all the work, and return what each piece of it returned; raises what one raised when all have ended."""
        living = list(self.members)
        answers: list[torch.Tensor | None] = [None] * len(living)
        try:
            while living:
                for member, answer in zip(living, answers, strict=True):
                    member.go_on(answer)
                living = [member for member in living if not member.over]
                answers = self._step(living)
        except BaseException as error:  # of a step, which is nobody's in particular; or the process is told to end
            for member in living:
                if member.waits:
                    member.go_on(error)
            if not isinstance(error, Exception):
                raise
        finally:
            if self.base is not None:
                self.base.model.gradient_checkpointing_disable()
                self.base.model.eval()
            self.base = None
            for member in self.members:
                member.handed = None  # its trainer, with all that it holds
        for member in self.members:
            if member.error is not None:
                raise member.error
        return [member.result for member in self.members]

    def _step(self, members: Sequence[Member]) -> list[torch.Tensor | None]:
        """The losses of their batches, whose gradients they have then; None of each that has to make its step alone."""
        alone: list[torch.Tensor | None] = [None] * len(members)
        if len(members) < 2 or self.apart:
            return alone
        assert self.base is not None
        self.apart = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.base.model.modules())
        batches: list[Batch] = [member.handed for member in members]
        before = [member.randomness.torch for member in members]
        while not self.apart:
            started = time.monotonic()
            try:
                losses = self._forward_backward(members, batches)
                if not _finite(losses, batches):  # whose, each finds out by itself
                    for member, batch, state in zip(members, batches, before, strict=True):
                        batch.trainer.model.zero_grad()
                        member.randomness.torch = state
                    return alone
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._have_less(members, batches)
                for member, batch, state in zip(members, batches, before, strict=True):
                    batch.trainer.model.zero_grad()
                    member.randomness.torch = state
                continue
            seconds, tokens = time.monotonic() - started, sum(batch.tokens for batch in batches)
            for member, batch in zip(members, batches, strict=True):
                member.spent += seconds * batch.tokens / tokens
                member.companions |= {other.run_id for other in members} - {member.run_id}
            return list(losses)
        return alone

    def _have_less(self, members: Sequence[Member], batches: Sequence[Batch]) -> None:
        """Shorter rows from now on; none together where that does not help."""
        longest = max(len(batch.trainer.samples[i]) for batch in batches for i in batch.indexes)
        try:
            for member, batch in zip(members, batches, strict=True):
                with member.around():
                    batch.trainer.have_less(longest)
        except MemoryError:
            self.apart = True

    def _forward_backward(self, members: Sequence[Member], batches: Sequence[Batch]) -> list[torch.Tensor]:
        assert self.base is not None
        model, first = self.base.model, batches[0].trainer
        device, losses = first.args.device, [torch.zeros((), device=first.args.device) for _ in batches]
        model.train()
        if any(batch.trainer.checkpointing for batch in batches) and not model.is_activation_checkpointing:
            checkpoint_activations(model)
        for batch in batches:
            batch.trainer.forget()
        ways = {batch.trainer.attention for batch in batches}
        way = ways.pop() if len(ways) == 1 else "parts"
        whose = [(at, i) for at, batch in enumerate(batches) for i in batch.indexes]
        samples = [batches[at].trainer.samples[i] for at, i in whose]
        for part in micro_batches(samples, min(batch.trainer.budget for batch in batches)):
            indexes: dict[int, list[int]] = {}  # of the samples that each run has in the row
            for at, i in sorted((whose[j] for j in part), key=lambda entry: entry[0]):
                indexes.setdefault(at, []).append(i)
            rows = [pack([batches[at].trainer.samples[i] for i in mine], device) for at, mine in indexes.items()]
            shares, start = [], 0
            for at, row in zip(indexes, rows, strict=True):
                randomness, end = members[at].randomness, start + row.tokens.shape[1]
                randomness.drawn.clear()
                trainer = batches[at].trainer
                shares.append(Share(trainer.base(trainer.model), slice(start, end), randomness.drawing))
                start = end
            with packed(model, WAYS[way]), fused(model, shares):
                with first.accelerator.autocast():
                    scores = torch.split(token_scores(model, join(rows)), [len(row.targets) for row in rows])
                    found = [
                        batches[at].trainer.loss(score, row, mine, batches[at].size)
                        for (at, mine), score, row in zip(indexes.items(), scores, rows, strict=True)
                    ]
                first.accelerator.backward(torch.stack([loss.double() for loss in found]).sum())
            for at, loss in zip(indexes, found, strict=True):
                losses[at] += loss.detach()
        return losses


def _finite(losses: Sequence[torch.Tensor], batches: Sequence[Batch]) -> bool:
    """Whether all losses and gradients are; one that is not may have spoiled those of others in its rows."""
    gradients = [p.grad for batch in batches for p in batch.trainer.trained() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
    return bool(torch.stack([*losses, norm.to(losses[0].dtype)]).isfinite().all())
