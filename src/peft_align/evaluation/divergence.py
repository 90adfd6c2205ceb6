"""How far a model went from the unaligned base: KL(model || base) of responses to held-out prompts, and their length.

With y sampled from the model, the mean of log p(y | x) - log p_base(y | x) over prompts x is an unbiased estimate of
the divergence that DPO's objective bounds (Rafailov et al. 2023, equation 3), in nats a response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_align.config.benchmarks import Divergence
from peft_align.evaluation.generation import Prompt, Settings, Text, generate
from peft_align.evaluation.preference import Heldout
from peft_align.evaluation.scores import Scores, mean_metric, rate_metric
from peft_align.evaluation.texts import seed_of
from peft_align.models.loading import Base
from peft_align.models.scoring import response_log_probabilities
from peft_align.store.journal import Journal


@dataclass
class Drawn:
    """Responses sampled from the model, with their log-probabilities under it."""

    names: list[str]
    pairs: list[tuple[list[int], list[int]]]
    texts: list[str]
    cut_off: list[bool]
    own: list[float]
    source: dict[str, Any]


def draw(
    benchmark: Divergence,
    heldout: Heldout,
    limit: int | None,
    base: Base,
    model: Any,
    batch_size: int,
    journal: Journal,
    tick: Callable[[int, int], None],
) -> Drawn:
    """Sample a response to each prompt at temperature 1; what an interrupted attempt drew is in its journal."""
    wanted = heldout.pairs[: min(benchmark.prompts, limit or benchmark.prompts)]
    prompts = [Prompt(pair.id, pair.prompt, seed_of(benchmark.seed, pair.id)) for pair in wanted]
    drawn = {entry["id"]: entry for entry in journal.entries}

    def keep(texts: list[Text]) -> None:
        entries = [{"id": t.id, "ids": t.ids, "text": t.text, "ended": t.ended} for t in texts]
        journal.append(entries)
        drawn.update({entry["id"]: entry for entry in entries})
        tick(len(drawn), len(prompts))

    settings = Settings(benchmark.max_new_tokens, temperature=1.0)
    generate(model, base.tokenizer, prompts, settings, batch_size=batch_size, done=set(drawn), keep=keep)
    found = [drawn[prompt.id] for prompt in prompts]
    pairs = [(prompt.ids, entry["ids"]) for prompt, entry in zip(prompts, found, strict=True)]
    return Drawn(
        [prompt.id for prompt in prompts],
        pairs,
        [entry["text"] for entry in found],
        [entry["ended"] == "length" for entry in found],
        log_probabilities(model, pairs, base, batch_size),
        heldout.source,
    )


def score(drawn: Drawn, base: Base, batch_size: int, *, aligned: bool) -> Scores:
    """Compare with the base, which has no adapter on it now; of the base itself, only the lengths are told."""
    lengths = [len(response) for _, response in drawn.pairs]
    metrics = [
        mean_metric("response_tokens", lengths, None),
        mean_metric("response_words", [len(text.split()) for text in drawn.texts], None),
        rate_metric("cut_off_rate", drawn.cut_off, None),
    ]
    samples: list[dict[str, Any]] = [
        {"id": name, "output": text, "tokens": length, "logp": own}
        for name, text, length, own in zip(drawn.names, drawn.texts, lengths, drawn.own, strict=True)
    ]
    if aligned:
        theirs = log_probabilities(base.model, drawn.pairs, base, batch_size)
        ratios = [own - other for own, other in zip(drawn.own, theirs, strict=True)]
        per_token = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
        metrics = [mean_metric("kl", ratios, None), mean_metric("kl_per_token", per_token, None), *metrics]
        for sample, other in zip(samples, theirs, strict=True):
            sample["base_logp"] = other
    return Scores(metrics, samples, {"data": drawn.source})


def log_probabilities(model: Any, pairs: list[tuple[list[int], list[int]]], base: Base, batch_size: int) -> list[float]:
    """Of each response given its prompt, in nats."""
    return response_log_probabilities(model, pairs, batch_size=batch_size, pad_token_id=base.tokenizer.pad_token_id)
