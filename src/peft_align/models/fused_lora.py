"""LoRA layers with their sum and scaling inside the matrix product, for training.

PEFT 0.21 computes `base(x) + B(A(x)) * scaling` in four passes over the output, and casts x to the adapter's precision
and back. The same in one product with an accumulator: fewer passes over memory, and fewer roundings in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear


@contextmanager
def fused(model: torch.nn.Module) -> Iterator[None]:
    """Have the LoRA layers of a model computed so; as before afterwards.

    Layers of other kinds (DoRA, merged, several active adapters, embeddings, an adapter with a bias) are left alone.

    Args:
        model: with LoRA layers of PEFT, or without.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _plain(module)]
    for layer in layers:
        layer.forward = _forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain(layer: Any) -> bool:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        hasattr(layer.get_base_layer(), "in_features")
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and len(active) == 1
        and not layer.lora_bias[active[0]]
    )


def _forward_of(layer: Any) -> Callable[..., torch.Tensor]:
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout, scaling, before = layer.lora_dropout[name], layer.scaling[name], type(layer).forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not (a.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
            found: torch.Tensor = before(layer, x, *args, **kwargs)
            return found
        result = layer.base_layer(x)
        low = linear(dropout(x), a)
        if type(layer.base_layer) is not torch.nn.Linear:  # what quantised layers give may be a view that must stay
            return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.t(), alpha=scaling).view_as(result)
        result.flatten(0, -2).addmm_(low.flatten(0, -2), b.t().to(low.dtype), alpha=scaling)
        return result  # type: ignore[no-any-return]

    return forward
