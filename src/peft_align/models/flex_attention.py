"""Attention over rows by torch's flex attention: one kernel for a row, where packed_attention has one for each part.

Made for GPUs, on which many small kernels are slow; never run on one so far. On a CPU torch 2.13 has no fused kernel
with a backward pass: its plain implementation of the same operator runs, which holds all products of a row, for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from peft_align.models import packed_attention
from peft_align.models.packed_attention import only_known, parts
from peft_align.models.packing import Segment

NAME = "peft_align_flex"
WAYS = {"parts": packed_attention.NAME, "flex": NAME}  # of attending in rows -> its name in transformers
BLOCK = 128  # tokens; what torch's own masks have
RECOMPILATIONS = 64  # torch's 8 do not suffice a process that trains and evaluates models of several shapes
ROUNDS = 3  # of which the fastest counts


def flex_row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    segments: Sequence[Segment] = (),
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for a layer; see packed_attention for the arguments. Nothing can be `kept`."""
    only_known(other)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in fp32
    mask = block_mask(tuple(segments), query.device)
    if query.device.type == "cpu":
        found = torch.ops.higher_order.flex_attention(query, key, value, _as_it_is, mask.as_tuple(), scale, {})[0]
    else:
        found = _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return found.transpose(1, 2), None


AttentionInterface.register(NAME, flex_row_attention)


def _compiled() -> Any:
    # A setting of torch's holds in the thread that makes it, and runs of a pack have one each.
    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    return _compiled_once()


@cache
def _compiled_once() -> Any:
    """Once for rows of all lengths. fullgraph: too many recompilations are an error, not the plain implementation."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _as_it_is(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
    return score


@lru_cache(maxsize=4)  # all layers of a row, forward and backward
def block_mask(segments: tuple[Segment, ...], device: torch.device) -> BlockMask:
    """Who sees whom in a row, for flex attention: the blocks that hold anything seen, and a function of two places.

    The blocks come from the segments: torch's create_block_mask would lay out every pair of a row's tokens.

    Args:
        segments: of the row, in order and without gaps.
        device: of the row.
    """
    every = parts(segments)
    length = every[-1].own[1]
    own, first, end = torch.zeros(3, length, dtype=torch.int32)
    count = -(-length // BLOCK)
    seen = torch.zeros(count, count, dtype=torch.bool)
    for part in every:
        mine, rows = slice(*part.own), _blocks(*part.own)
        own[mine] = part.own[0]
        seen[rows, rows] = True
        if part.prompt is not None:
            first[mine], end[mine] = part.prompt
            seen[rows, _blocks(*part.prompt)] = True
    seen.tril_()
    own, first, end = (x.to(device) for x in (own, first, end))

    def sees(batch: torch.Tensor, head: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (other <= one) & ((other >= own[one]) | ((other >= first[one]) & (other < end[one])))
        return found

    order = seen.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        seen.sum(-1, dtype=torch.int32)[None, None].to(device),
        order[None, None].to(device),
        mask_mod=sees,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(length, length),
    )


def _blocks(start: int, end: int) -> slice:
    return slice(start // BLOCK, -(-end // BLOCK))


@dataclass(frozen=True)
class Trial:
    """Both ways on one row.

    Attributes:
        seconds: of the fastest of some rounds, by way; empty where none was timed.
        why_not: what speaks against flex attention.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    why_not: str | None = None

    @property
    def chosen(self) -> str:
        """The faster way; flex attention where none was timed and nothing speaks against it."""
        flex = not self.why_not and (not self.seconds or self.seconds["flex"] < self.seconds["parts"])
        return "flex" if flex else "parts"

    def __str__(self) -> str:
        if self.why_not:
            return f"warning: flex attention is not used: {self.why_not}"
        timed = (f"{way} {seconds * 1000:.1f} ms a row" for way, seconds in self.seconds.items())
        return f"attention by {self.chosen}" + (f" ({', '.join(timed)})" if self.seconds else "")


def of_all(trials: Sequence[Trial]) -> Trial:
    """What several processes found, as one: the slowest counts, and whoever has a reason."""
    why = next((trial.why_not for trial in trials if trial.why_not), None)
    return Trial({} if why else {way: max(t.seconds[way] for t in trials) for way in trials[0].seconds}, why)


def try_both(work: Callable[[str], torch.Tensor], tolerance: float, *, timed: bool) -> Trial:
    """Run a row both ways and hold the results against each other.

    Args:
        work: runs it in a way of WAYS and returns what must come to the same.
        tolerance: relative, of each number.
        timed: whether it is also about which is faster.

    Raises:
        whatever `work` raises in parts; in flex attention that is a reason against it.
    """
    expected = work("parts")
    try:
        found = work("flex")
    except Exception as error:  # of torch's compiler, of Triton's, of a driver
        reason = str(error).strip() or type(error).__name__
        return Trial(why_not=f"it failed: {reason.splitlines()[0][:300]}")
    apart = float(((found - expected).abs() / expected.abs().clamp_min(1e-6)).max())
    if not apart <= tolerance:
        return Trial(why_not=f"its results are {apart:.2g} of themselves away from those of parts")
    return Trial({way: min(_seconds(work, way) for _ in range(ROUNDS)) for way in WAYS} if timed else {})


def _seconds(work: Callable[[str], torch.Tensor], way: str) -> float:
    began = time.perf_counter()
    work(way).cpu()  # waits for the device
    return time.perf_counter() - began
