"""Log-probabilities of continuations by texts that share prefixes (models/shared_prefix.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import log_softmax

from peft_align.models.flex_attention import WAYS, Trial, try_both
from peft_align.models.head import CHUNK
from peft_align.models.packed_attention import Kept, packed
from peft_align.models.packed_scoring import tolerance_of, why_not_packed
from peft_align.models.packing import pack
from peft_align.models.shared_prefix import Row, Target, Text, groups_of, rows_of, sample_of, texts_of

Request = tuple[Sequence[int], Sequence[int]]
Wanted = dict[int, list[Target]]  # place in a row -> what is asked for there


def why_not_shared(model: Any, longest: int) -> str | None:
    """Why a model cannot be given rows of texts that share prefixes; None if it can. See why_not_packed.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        longest: tokens of the longest text to come.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "its adapter puts virtual tokens before each text"
    return why_not_packed(_inner(model), longest)


# Not inference_mode: masks that the attention keeps between calls serve trainings too.
@torch.no_grad()
def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    max_length: int,
    budget: int,
    tick: Callable[[int], None] = lambda done: None,
    attention: str = "parts",
) -> list[tuple[float, bool]]:
    """The summed log-probability of each continuation, and whether each of its tokens is the likeliest.

    Args:
        model: a transformers causal language model, or a PEFT model around one, in evaluation mode; why_not_shared has
            nothing against it.
        requests: context and continuation of each, as token ids.
        max_length: tokens that the model reads at most; see texts_of.
        budget: tokens of a forward pass; see rows_of.
        tick: called after each forward pass with the number of texts done by it.
        attention: a way of flex_attention.WAYS; rows that follow on a kept prefix attend by parts.

    Returns:
        one for each request; sums of fp32 log-probabilities in nats.

    Raises:
        ValueError: see texts_of.
    """
    inner, texts = _inner(model), texts_of(requests, max_length)
    sums, greedy = [0.0] * len(requests), [True] * len(requests)
    for rows in rows_of(groups_of(texts), texts, budget):
        kept: Kept | None = {} if len(rows) > 1 else None
        for at, row in enumerate(rows):
            behind = row[0].prefix if at else 0
            hidden = _forward(inner, row, texts, behind, kept, attention if kept is None else "parts")
            wanted = _wanted(row, [] if at else rows[1:], texts, behind)
            for target, score, likeliest in _scores(inner.get_output_embeddings(), hidden, wanted):
                sums[target.request] += score
                greedy[target.request] &= likeliest
            tick(sum(len(group.texts) for group in row))
    return list(zip(sums, greedy, strict=True))


@torch.no_grad()
def try_attention(model: Any, requests: Sequence[Request], max_length: int, budget: int) -> Trial:
    """Both ways of attention on the first row that needs no kept prefix; see log_likelihoods for the arguments."""
    inner, texts = _inner(model), texts_of(requests, max_length)
    row = next((rows[0] for rows in rows_of(groups_of(texts), texts, budget) if len(rows) == 1), None)
    if row is None:
        return Trial(why_not="every row shares its prefix with others")

    def work(way: str) -> torch.Tensor:
        hidden = _forward(inner, row, texts, 0, None, way)
        found = _scores(inner.get_output_embeddings(), hidden, _wanted(row, [], texts, 0))
        return torch.tensor([sum(score for _, score, _ in found)], dtype=torch.float64)

    return try_both(work, tolerance_of(inner.dtype), timed=True)


def _inner(model: Any) -> Any:
    """The language model; the layers of an adapter are in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward(
    model: Any, row: Row, texts: Sequence[Text], behind: int, kept: Kept | None, attention: str
) -> torch.Tensor:
    """The last hidden states of a row: (T, hidden size). `behind`: tokens of the prefix where it is kept already."""
    samples = [sample_of(group, texts) for group in row]
    if behind:
        samples = [replace(sample, prompt=()) for sample in samples]
    filled = pack(samples, next(model.parameters()).device)
    decoder = model.get_decoder()
    with packed(model, WAYS[attention]):
        found: torch.Tensor = decoder(
            input_ids=filled.tokens,
            position_ids=filled.positions + behind,
            use_cache=False,
            segments=filled.segments,
            kept=kept,
        ).last_hidden_state[0]
    return found


def _wanted(row: Row, later: Sequence[Row], texts: Sequence[Text], behind: int) -> Wanted:
    """Where in a row the hidden states lie that predict targets.

    Args:
        row: of groups.
        later: rows whose texts have the prefix in this one: what is asked for within it is found here.
        texts: that the groups' indexes mean.
        behind: see _forward.
    """
    found: Wanted = defaultdict(list)
    start = 0
    for group in row:
        first = start + group.prefix - behind  # of the text's own tokens
        for i in group.texts:
            for target in texts[i].targets:
                own = target.position - group.prefix
                if own >= 0:
                    found[first + own].append(target)
                elif not behind:
                    found[start + target.position].append(target)
            first += len(texts[i].tokens) - group.prefix
        start = first
    for group in (group for row in later for group in row):
        for target in (target for i in group.texts for target in texts[i].targets):
            if target.position < group.prefix:
                found[target.position].append(target)
    return found


def _scores(head: Any, hidden: torch.Tensor, wanted: Wanted) -> Iterator[tuple[Target, float, bool]]:
    """Each target with its log-probability and whether it is the likeliest token; some positions at a time."""
    places = sorted(wanted)
    step = max(1, CHUNK // (4 * head.out_features))
    for at in range(0, len(places), step):
        part = places[at : at + step]
        log_probs = log_softmax(head(hidden[part]), dim=-1, dtype=torch.float32)
        targets = [target for place in part for target in wanted[place]]
        rows = [i for i, place in enumerate(part) for _ in wanted[place]]
        tokens = torch.tensor([target.token for target in targets], device=hidden.device)
        scores, likeliest = log_probs[rows, tokens], log_probs.argmax(-1)[rows] == tokens
        yield from zip(targets, scores.tolist(), likeliest.tolist(), strict=True)
