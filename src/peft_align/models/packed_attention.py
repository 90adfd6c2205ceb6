"""Attention over rows of models/packing.py, put into transformers' models under a name of its own.

A model's layers hand what they do not know (`segments`) on to the attention function. Each sample is computed by itself
with torch's scaled_dot_product_attention: no mask over the row, no product of one sample with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from peft_align.models.packing import Segment

NAME = "peft_align_packed"
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
        other: what other attention functions are told.

    Returns:
        (1, T, heads, head size), and no weights.
    """
    unknown = sorted(name for name in OTHER_WAYS if other.get(name) is not None)
    if unknown:
        raise Unsupported(f"its attention has {', '.join(unknown)}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    sizes = [size for s in segments for size in (s.prompt + s.responses[0], *s.responses[1:])]
    pieces = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
    out = []
    for segment in segments:
        q, k, v = next(pieces)  # the prompt and the first response: as one text
        out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        prompt_k, prompt_v = k[:, :, : segment.prompt], v[:, :, : segment.prompt]
        for length in segment.responses[1:]:
            q, k, v = next(pieces)
            mask = _seen(segment.prompt, length, q.device)
            k, v = torch.cat((prompt_k, k), 2), torch.cat((prompt_v, v), 2)
            out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(out, dim=2).transpose(1, 2), None


@lru_cache(maxsize=64)
def _seen(prompt: int, response: int, device: torch.device) -> torch.Tensor:
    """(response, prompt + response): what each token of a response attends to."""
    ones = torch.ones(response, prompt + response, dtype=torch.bool, device=device)
    return ones.tril(diagonal=prompt)


AttentionInterface.register(NAME, packed_attention)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Have a transformers model attend by segments; as before afterwards."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
