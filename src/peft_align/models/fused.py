"""Layers in fewer passes over memory, for training: LoRA on linear layers, and RMSNorm.

PEFT 0.21 computes `base(x) + B(A(x)) * scaling` in four passes over the output, casts x to the adapter's precision and
back, and adds the gradients of both ways to x. Here both sums are taken inside the matrix products. transformers 5.23
computes RMSNorm (Zhang and Sennrich 2019) operation by operation, and autograd keeps and passes over what each gave in
fp32; here the input is kept alone. Fewer roundings in bf16, the same in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")  # of transformers: weight * (x / rms(x))


@contextmanager
def fused(model: torch.nn.Module) -> Iterator[None]:
    """Have the LoRA layers and norms of a model computed so; as before afterwards.

    Layers of other kinds (DoRA, merged, several active adapters, embeddings, an adapter with a bias, norms that are
    trained or of another formula) are left alone.

    Args:
        model: with LoRA layers of PEFT, or without.
    """
    found: list[tuple[Any, Callable[..., torch.Tensor]]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and _plain(module):
            found.append((module, _lora_of(module)))
        elif type(module).__name__ in RMS_NORMS and not module.weight.requires_grad:
            found.append((module, _norm_of(module)))
    for module, forward in found:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in found:
            del module.forward


def _plain(layer: Any) -> bool:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        hasattr(layer.get_base_layer(), "in_features")
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and len(active) == 1
        and not layer.lora_bias[active[0]]
    )


def _lora_of(layer: Any) -> Callable[..., torch.Tensor]:
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout, scaling, before = layer.lora_dropout[name], layer.scaling[name], type(layer).forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if args or kwargs or (a.dtype != compute and not torch.is_autocast_enabled(device)):
            found: torch.Tensor = before(layer, x, *args, **kwargs)
            return found
        x, low_a, low_b = x.to(compute), a.to(compute), b.to(compute)
        if type(base) is not torch.nn.Linear or base.weight.dtype != compute or base.weight.requires_grad:
            result = base(x)
            low = linear(dropout(x), low_a)
            return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), low_b.t(), alpha=scaling).view_as(result)
        dropped = dropout(x) if layer.training and getattr(dropout, "p", 0) else None
        out: torch.Tensor = _LoRA.apply(x, dropped, base.weight, base.bias, low_a, low_b, scaling)  # type: ignore[no-untyped-call]
        return out

    return forward


class _LoRA(torch.autograd.Function):
    """x W' + bias + scaling * (dropped or x) A' B', with W frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        seen = (x if dropped is None else dropped).flatten(0, -2)
        out = linear(x, weight, bias)
        low = seen @ a.t()
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(seen, low, weight, a, b)
        ctx.scaling, ctx.shape, ctx.same = scaling, x.shape, dropped is None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, low, weight, a, b = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        to_low = (grad @ b).mul_(ctx.scaling)
        to_a, to_b = to_low.t() @ seen, (grad.t() @ low).mul_(ctx.scaling)
        to_x = grad @ weight if ctx.needs_input_grad[0] else None
        to_dropped = None
        if ctx.same and to_x is not None:
            to_x.addmm_(to_low, a)
        elif ctx.needs_input_grad[1]:
            to_dropped = (to_low @ a).view(ctx.shape)
        return None if to_x is None else to_x.view(ctx.shape), to_dropped, None, None, to_a, to_b, None


def _norm_of(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _RMSNorm.apply(x, layer.weight, layer.variance_epsilon)  # type: ignore[no-untyped-call]
        return out

    return forward


class _RMSNorm(torch.autograd.Function):
    """weight * (x / sqrt(mean(x^2) + epsilon)), in fp32 up to the product with the weight, which is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: torch.Tensor = weight * (wide * scale).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = (grads[0] * weight).float(), x.float().mul_(scale) if x.dtype != torch.float32 else x * scale
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), None, None
