"""Attention over rows of models/packing.py, put into transformers' models under a name of its own.

A model's layers hand what they do not know (`segments`) on to the attention function. Each sample is computed by itself
with torch's scaled_dot_product_attention: no mask over the row, no product of one sample with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from peft_align.models.packing import Segment

NAME = "peft_align_packed"
Kept = dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]  # layer -> keys, values: (1, their heads, P, head size)
OTHER_WAYS = ("softcap", "s_aux", "position_bias")  # of attending, that some models ask for


class Unsupported(RuntimeError):
    """A model attends in a way that rows do not know."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    segments: Sequence[Segment] = (),
    kept: Kept | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for a layer.

    Args:
        module: the layer.
        query: (1, heads, T, head size).
        key: (1, key-value heads, T, head size).
        value: like key.
        attention_mask: None: the segments say it all.
        scaling: of the products.
        segments: of the row, in order and without gaps.
        kept: for rows of one segment each, of the same prompt, without gradients: the first row leaves its prompt's
            keys and values here, the following ones, which do not hold the prompt, attend to them.
        other: what other attention functions are told.

    Returns:
        (1, T, heads, head size), and no weights.
    """
    only_known(other)
    behind = 0
    if kept is not None and module in kept:
        key, value = (torch.cat(both, 2) for both in zip(kept[module], (key, value), strict=True))
        behind = key.shape[2] - query.shape[2]
    elif kept is not None:  # a view would keep the whole row
        kept[module] = (key[:, :, : segments[0].prompt].clone(), value[:, :, : segments[0].prompt].clone())
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    every = parts(tuple(segments), behind)
    if query.device.type in OWN_BACKWARD and kept is None:
        return OWN_BACKWARD[query.device.type].apply(query, key, value, every, scale), None
    out = [
        scaled_dot_product_attention(
            query[:, :, part.own[0] - behind : part.own[1] - behind],
            part.seen_of(key),
            part.seen_of(value),
            attn_mask=None if part.prompt is None else part.mask(query.device),
            is_causal=part.prompt is None,
            scale=scale,
        )
        for part in every
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def only_known(told: Mapping[str, Any]) -> None:
    """Raise Unsupported if an attention function is told of a way that rows do not know."""
    unknown = sorted(name for name in OTHER_WAYS if told.get(name) is not None)
    if unknown:
        raise Unsupported(f"its attention has {', '.join(unknown)}")


@dataclass(frozen=True)
class Part:
    """Tokens of a row that attend together: a prompt with its first response, or a further response.

    Attributes:
        own: where they begin and end.
        prompt: where their prompt does, if it is not among them.
    """

    own: tuple[int, int]
    prompt: tuple[int, int] | None = None

    def own_of(self, x: torch.Tensor) -> torch.Tensor:
        """Their share of (1, heads, T, head size)."""
        return x[:, :, slice(*self.own)]

    def seen_of(self, x: torch.Tensor) -> torch.Tensor:
        """What they see of keys or values."""
        return self.own_of(x) if self.prompt is None else torch.cat((x[:, :, slice(*self.prompt)], self.own_of(x)), 2)

    def mask(self, device: torch.device) -> torch.Tensor:
        """(own, seen): what each of them sees."""
        return _seen(0 if self.prompt is None else self.prompt[1] - self.prompt[0], self.own[1] - self.own[0], device)


@lru_cache(maxsize=64)
def parts(segments: tuple[Segment, ...], behind: int = 0) -> tuple[Part, ...]:
    """What attends together, in the order of the row.

    Args:
        segments: of the row.
        behind: tokens of a prompt that all responses have, before the row's own.
    """
    if behind:
        ends = list(accumulate((length for s in segments for length in s.responses), initial=behind))
        return tuple(Part(own, (0, behind)) for own in pairwise(ends))
    found = []
    for segment in segments:
        at, prompt = segment.start, (segment.start, segment.start + segment.prompt)
        for i, length in enumerate(segment.responses):
            end = (at if i else prompt[1]) + length
            found.append(Part((at, end), prompt if i else None))
            at = end
    return tuple(found)


@lru_cache(maxsize=64)
def _seen(prompt: int, response: int, device: torch.device) -> torch.Tensor:
    """(response, prompt + response): what each token of a response attends to."""
    ones = torch.ones(response, prompt + response, dtype=torch.bool, device=device)
    return ones.tril(diagonal=prompt)


class _OnCPU(torch.autograd.Function):
    """The kernel that scaled_dot_product_attention takes on a CPU (torch 2.13), each part's results written in place.

    It computes in fp32, whatever it is given: in bf16 the kernel's backward takes more than twice the time.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, every: Sequence[Part], scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        whole_q, whole_k, whole_v = map(_wide, (query, key, value))
        sums = []
        for part in every:
            q, k, v = part.own_of(whole_q), part.seen_of(whole_k), part.seen_of(whole_v)
            found, logsumexp = KERNEL(q, k, v, 0.0, part.prompt is None, attn_mask=_bias(part, q), scale=scale)
            part.own_of(out).copy_(found)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.every, ctx.scale = every, scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: with activations recomputed, a second time would be an error
        given, sums = saved[:4], saved[4:]
        to_query, to_key, to_value = (torch.empty_like(x) for x in given[:3])
        query, key, value, out = map(_wide, given)
        grad = _wide(grads[0].transpose(1, 2))
        for part, logsumexp in zip(ctx.every, sums, strict=True):
            own, q = part.own[1] - part.own[0], part.own_of(query)
            of_own, *of_seen = BACKWARD(
                *(part.own_of(grad), q, part.seen_of(key), part.seen_of(value), part.own_of(out)),
                *(logsumexp, 0.0, part.prompt is None),
                attn_mask=_bias(part, q),
                scale=ctx.scale,
            )
            part.own_of(to_query).copy_(of_own)
            for whole, seen in zip((to_key, to_value), of_seen, strict=True):
                part.own_of(whole).copy_(seen[:, :, -own:])
                if part.prompt is not None:  # which comes earlier in the row, with the first response
                    whole[:, :, slice(*part.prompt)] += seen[:, :, :-own]
        return to_query, to_key, to_value, None, None


# By device; elsewhere autograd's backward, which keeps a prompt for each response.
OWN_BACKWARD: dict[str, Any] = {"cpu": _OnCPU}
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bias(part: Part, query: torch.Tensor) -> torch.Tensor | None:
    """What hides a token as the kernel takes it: added to the products."""
    if part.prompt is None:
        return None
    seen = part.mask(query.device)
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)


AttentionInterface.register(NAME, packed_attention)


@contextmanager
def packed(model: Any, name: str = NAME) -> Iterator[None]:
    """Have a transformers model attend by segments; as before afterwards.

    Args:
        model: of transformers.
        name: of the attention function: this module's, or flex_attention's.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
