"""Texts that begin alike, planned so that what they share is computed once.

Requests of lm-eval become texts, each once; sorted, texts that share a long prefix become groups; groups are put into
rows (models/packing.py), the prefix as the prompt and the rest of each text as a response. A group larger than a
row goes on in following ones, for which the prefix's keys and values are kept (models/packed_attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_align.models.packing import Sample, micro_batches

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A token whose log-probability a request asks for: what comes behind a text's token number `position`."""

    position: int
    token: int
    request: int


@dataclass(frozen=True)
class Text:
    """What the model reads, and what is asked about it."""

    tokens: Tokens
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Group:
    """Texts with the same first `prefix` tokens, each longer than that, as indexes."""

    prefix: int
    texts: tuple[int, ...]


Row = tuple[Group, ...]


def texts_of(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Text]:
    """The texts that requests need, each once, in lexicographic order of their tokens.

    Cut from the left as lm-eval 0.4.13 does (models/huggingface.py, HFLM._loglikelihood_tokens): of context and
    continuation the last max_length + 1 tokens stay, and the very last of them is only predicted.

    Args:
        requests: context and continuation of each, as token ids.
        max_length: tokens that the model reads at most.

    Raises:
        ValueError: a context or a continuation is empty, or a continuation is longer than max_length.
    """
    found: dict[Tokens, list[Target]] = {}
    for request, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            what = f"{len(context)} tokens of context, {len(continuation)} of continuation, {max_length} allowed"
            raise ValueError(f"request {request} cannot be scored: {what}")
        tokens = tuple([*context, *continuation][-(max_length + 1) :][:-1])
        first = len(tokens) - len(continuation)
        asked = (Target(first + i, token, request) for i, token in enumerate(continuation))
        found.setdefault(tokens, []).extend(asked)
    return [Text(tokens, tuple(targets)) for tokens, targets in sorted(found.items())]


def common_prefixes(texts: Sequence[Text]) -> list[int]:
    """How many tokens each text (sorted) shares with the one before it, at least one of each left out; 0 for the first.

    The least of them within a range of texts is what all texts of the range share.
    """
    found = [0] * len(texts)
    for i in range(1, len(texts)):
        one, other = texts[i - 1].tokens, texts[i].tokens
        most = min(len(one), len(other)) - 1
        found[i] = next((at for at in range(most) if one[at] != other[at]), most)
    return found


def groups_of(texts: Sequence[Text]) -> list[Group]:
    """Cut sorted texts into groups, each of neighbours, so that few tokens have to be computed.

    Neighbours are joined in the order of what they share, most first. A range of n texts that share p tokens stays one
    group if that saves at least as many tokens, (n - 1) * p, as its two parts by themselves: a large group is not given
    up for two texts that share a little more, and not enlarged by one that shares little.
    """
    shared = common_prefixes(texts)
    starts, ends = list(range(len(texts))), list(range(len(texts)))  # of the range that ends, or starts, at an index
    saved = [0] * len(texts)  # by the range that starts at an index
    joined: list[tuple[int, int]] = []  # a later range holds earlier ones whole, or none of them
    for i in sorted(range(1, len(texts)), key=lambda i: (-shared[i], i)):
        start, end = starts[i - 1], ends[i]
        together, apart = (end - start) * shared[i], saved[start] + saved[i]
        if together >= apart and shared[i]:
            joined.append((start, end))
        starts[end], ends[start] = start, end
        saved[start] = max(together, apart)
    outermost: dict[int, int] = {}
    covered = [False] * len(texts)
    for start, end in reversed(joined):
        if not covered[start]:
            outermost[start] = end
            covered[start : end + 1] = [True] * (end + 1 - start)
    found, at = [], 0
    while at < len(texts):
        end = outermost.get(at, at)
        found.append(Group(min(shared[at + 1 : end + 1], default=0), tuple(range(at, end + 1))))
        at = end + 1
    return found


def rows_of(groups: Sequence[Group], texts: Sequence[Text], budget: int) -> list[list[Row]]:
    """Put groups into rows.

    Args:
        groups: of texts.
        texts: that the groups' indexes mean.
        budget: tokens of a row at most; a longer text has a row of its own, or shares one with its prefix alone.

    Returns:
        lists of rows. Most hold one row, of several groups. The others are one group each, whose prefix is in the first
        row only; its texts are cut into rows of like size.
    """
    sizes = [len(sample_of(group, texts)) for group in groups]
    small = [group for group, size in zip(groups, sizes, strict=True) if size <= budget]
    found = [_cut(group, texts, budget, size) for group, size in zip(groups, sizes, strict=True) if size > budget]
    parts = micro_batches([sample_of(group, texts) for group in small], budget)
    return found + [[tuple(small[i] for i in part)] for part in parts]


def sample_of(group: Group, texts: Sequence[Text]) -> Sample:
    """What a row holds of a group: the prefix, and the rest of each text."""
    prefix = texts[group.texts[0]].tokens[: group.prefix]
    return Sample(prefix, tuple(texts[i].tokens[group.prefix :] for i in group.texts))


def _cut(group: Group, texts: Sequence[Text], budget: int, size: int) -> list[Row]:
    level = size / -(-size // budget)  # what each row would have of equals
    parts: list[list[int]] = [[]]
    filled = group.prefix
    for i in group.texts:
        rest = len(texts[i].tokens) - group.prefix
        if parts[-1] and (filled + rest > budget or filled + rest / 2 > level):
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += rest
    return [(Group(group.prefix, tuple(part)),) for part in parts]
