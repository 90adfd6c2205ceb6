"""Samples without waste: several in one row of tokens, no padding, the prompt of several responses once.

A row is `prompt, response, response, prompt, response, ...`. A response attends to its own prompt and to itself; its
positions go on from the prompt's end. So each response gets the hidden states it would have behind a copy of its prompt
alone. All products with weights run over the whole row; attention runs segment by segment, or by a block mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from peft_align.data.tokenization import TokenizedPair


@dataclass(frozen=True)
class Sample:
    """A prompt and the responses to it, as token ids."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def sample_of(pair: TokenizedPair, *, both: bool) -> Sample:
    """What a loss needs of a pair: both responses, or the chosen one alone."""
    responses = (pair.chosen, pair.rejected) if both else (pair.chosen,)
    return Sample(tuple(pair.prompt), tuple(map(tuple, responses)))


@dataclass(frozen=True)
class Segment:
    """Where a sample lies in a row: `start`, the prompt's tokens, and each response's."""

    start: int
    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Some samples in one row of T tokens, of which N are scored, in R responses.

    Attributes:
        tokens: (1, T), token ids.
        positions: (1, T), of each token in its own sequence.
        segments: where the samples lie.
        sources: (N,), where in the row the hidden state lies that predicts a scored token.
        targets: (N,), the scored tokens.
        owners: (N,), to which response, 0 to R - 1 in the order of samples, a scored token belongs.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    sources: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor

    @property
    def responses(self) -> int:
        return sum(len(segment.responses) for segment in self.segments)


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Row:
    """Put samples into one row. Behind an empty prompt, a response's first token is not scored: nothing predicts it."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    response = 0
    for sample in samples:
        start, prompt = len(tokens), len(sample.prompt)
        segments.append(Segment(start, prompt, tuple(map(len, sample.responses))))
        tokens += sample.prompt
        positions += range(prompt)
        for words in sample.responses:
            first = len(tokens)
            before = [start + prompt - 1] if prompt else []
            scored = words if prompt else words[1:]
            sources += [*before, *range(first, first + len(words) - 1)]
            targets += scored
            owners += [response] * len(scored)
            tokens += words
            positions += range(prompt, prompt + len(words))
            response += 1

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Row(
        tensor(tokens)[None], tensor(positions)[None], tuple(segments), tensor(sources), tensor(targets), tensor(owners)
    )


def join(rows: Sequence[Row]) -> Row:
    """Rows one behind the other as one."""
    starts = list(accumulate((row.tokens.shape[1] for row in rows), initial=0))
    responses = accumulate((row.responses for row in rows), initial=0)
    return Row(
        torch.cat([row.tokens for row in rows], 1),
        torch.cat([row.positions for row in rows], 1),
        tuple(
            replace(s, start=s.start + start) for row, start in zip(rows, starts, strict=False) for s in row.segments
        ),
        torch.cat([row.sources + start for row, start in zip(rows, starts, strict=False)]),
        torch.cat([row.targets for row in rows]),
        torch.cat([row.owners + before for row, before in zip(rows, responses, strict=False)]),
    )


def micro_batches(samples: Sequence[Sample], budget: int) -> list[list[int]]:
    """Cut a batch into micro-batches of at most `budget` tokens, each of samples of like length, of like total size.

    Args:
        samples: of one optimizer step.
        budget: tokens in one row; a longer sample has a row of its own.

    Returns:
        the indexes of each micro-batch's samples; the batch is all of them together.
    """
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    total = sum(map(len, samples))
    level = max(
        total / max(1, -(-total // budget)), max(map(len, samples), default=1)
    )  # what each would have of equals
    found: list[list[int]] = []
    filled = 0
    for i in order:
        size = len(samples[i])
        if not found or filled + size > budget or (filled + size / 2 > level and found[-1]):
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += size
    return found
