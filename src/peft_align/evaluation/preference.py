"""Held-out preference: does the model prefer the chosen responses of pairs it never saw?

Per pair, with l the sum of the log-probabilities of a response's tokens, c the chosen and r the rejected response:

    accuracy         1 if l(c) > l(r)
    reward_margin    (l(c) - l_base(c)) - (l(r) - l_base(r)), in nats: the implicit reward of DPO (Rafailov et al. 2023,
                     equation 5) without its factor beta, so that methods with and without a beta compare
    reward_accuracy  1 if reward_margin > 0
    response_loss    -l(c) / number of tokens of c
    dpo_loss         of a DPO run: -log sigmoid(beta * reward_margin), its loss on these pairs (ibid., equation 7)

The base is the unaligned one at the same precision, so the rewards are not defined for a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft_align.config.schema import DPO
from peft_align.data.order import sample_order
from peft_align.data.sources import load_split
from peft_align.data.tokenization import TokenizedPair, tokenize
from peft_align.evaluation.scores import Scores, mean_metric
from peft_align.grid.runs import Run, Scoring
from peft_align.models.adapters import loaded_adapter
from peft_align.models.loading import Base
from peft_align.models.scoring import response_log_probabilities

ORDER_SEED = 0  # which pairs are held out does not depend on the run


@dataclass
class Heldout:
    """The held-out pairs of one dataset and preference, with the base's log-probabilities when they are known."""

    pairs: list[TokenizedPair]
    source: dict[str, Any]
    counts: dict[str, Any]
    base_chosen: list[float] = field(default_factory=list)
    base_rejected: list[float] = field(default_factory=list)


@dataclass
class PreferenceBenchmark:
    """Keeps the held-out pairs and the base's scores of them for the runs of a process that share both."""

    _known: dict[str, Heldout] = field(default_factory=dict)

    def evaluate(self, run: Run, scoring: Scoring, base: Base, model: Any, tick: Callable[[int, int], None]) -> Scores:
        """Score `model` (the base with or without an adapter) on the run's held-out pairs. Raises InputError."""
        heldout = self.heldout(run, scoring, base)
        aligned = run.kind != "baseline"
        size = scoring.evaluation.batch_size
        total = 2 * len(heldout.pairs)
        chosen, rejected = _score(model, base, heldout.pairs, size, lambda done: tick(done, total))
        losses = [-score / len(pair.chosen) for pair, score in zip(heldout.pairs, chosen, strict=True)]
        metrics = [
            mean_metric("accuracy", [float(c > r) for c, r in zip(chosen, rejected, strict=True)], True),
            mean_metric("response_loss", losses, False),
        ]
        samples = [
            {
                "id": pair.id,
                "chosen_logp": c,
                "rejected_logp": r,
                "chosen_tokens": len(pair.chosen),
                "rejected_tokens": len(pair.rejected),
            }
            for pair, c, r in zip(heldout.pairs, chosen, rejected, strict=True)
        ]
        if aligned:
            margins = [
                (c - bc) - (r - br)
                for c, r, bc, br in zip(chosen, rejected, heldout.base_chosen, heldout.base_rejected, strict=True)
            ]
            metrics += [
                mean_metric("reward_accuracy", [float(margin > 0) for margin in margins], True),
                mean_metric("reward_margin", margins, True),
            ]
            if isinstance(run.config.method, DPO) and run.kind == "train":
                beta = run.config.method.beta
                metrics.append(mean_metric("dpo_loss", [-log_sigmoid(beta * margin) for margin in margins], False))
            for sample, margin in zip(samples, margins, strict=True):
                sample["reward_margin"] = margin
        elif not heldout.base_chosen:
            heldout.base_chosen, heldout.base_rejected = chosen, rejected
        return Scores(metrics, samples, {"data": heldout.source}, heldout.counts)

    def heldout(self, run: Run, scoring: Scoring, base: Base) -> Heldout:
        evaluation, template = scoring.evaluation, run.config.model.template
        key = repr(
            (
                scoring.dataset,
                scoring.preference,
                evaluation.heldout,
                evaluation.heldout_split,
                scoring.max_length,
                template,
                base.source["digest"],
                scoring.base.base_precision,
                scoring.base.double_quantization,
                scoring.base.compute_dtype,
                base.dequantized,
            )
        )
        if key not in self._known:
            split = load_split(scoring.dataset, scoring.preference, evaluation.heldout_split, run.config.hub.mirror)
            wanted = min(evaluation.heldout, len(split.pairs))
            order = sample_order(len(split.pairs), wanted, ORDER_SEED)
            picked = [split.pairs[i] for i in order]
            pairs, truncation = tokenize(picked, base.tokenizer, template, scoring.max_length)
            self._known[key] = Heldout(pairs, split.source, split.counts.plain() | truncation)
        return self._known[key]

    def prepare_base(self, run: Run, scoring: Scoring, base: Base) -> None:
        """Have the bare base's scores; called without an adapter on the base."""
        heldout = self.heldout(run, scoring, base)
        if not heldout.base_chosen:
            with loaded_adapter(base, None) as model:
                heldout.base_chosen, heldout.base_rejected = _score(
                    model, base, heldout.pairs, scoring.evaluation.batch_size, lambda done: None
                )


def _score(
    model: Any, base: Base, pairs: list[TokenizedPair], batch_size: int, tick: Callable[[int], None]
) -> tuple[list[float], list[float]]:
    sequences = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    scores = response_log_probabilities(
        model, sequences, batch_size=batch_size, pad_token_id=base.tokenizer.pad_token_id, tick=tick
    )
    return scores[0::2], scores[1::2]


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))) without overflow."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))
