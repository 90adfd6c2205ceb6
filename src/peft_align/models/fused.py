"""Layers in fewer passes over memory, for training: LoRA on linear layers, and RMSNorm.

PEFT 0.21 computes `base(x) + B(A(x)) * scaling` in four passes over the output, casts x to the adapter's precision and
back, and adds the gradients of both ways to x. Here both sums are taken inside the matrix products. transformers 5.23
computes RMSNorm (Zhang and Sennrich 2019) operation by operation, and autograd keeps and passes over what each gave in
fp32; here the input is kept alone. Fewer roundings in bf16, the same in fp32.

A row may hold the tokens of several runs, each with an adapter of its own: the frozen product is taken once for all of
them (for serving, so does Punica, Chen et al. 2023; for training, ASPEN, Ye et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")  # of transformers: weight * (x / rms(x))


@dataclass(frozen=True)
class Share:
    """Tokens of a row that have an adapter of their own.

    Attributes:
        model: with the adapter on its LoRA layers, which are named as the layers of the model that the row is given to.
        tokens: where in the row they lie.
        drawing: what their dropout is drawn in, by the name of the layer.
    """

    model: torch.nn.Module
    tokens: slice
    drawing: Callable[[str], AbstractContextManager[None]]


@contextmanager
def fused(model: torch.nn.Module, shares: Sequence[Share] = ()) -> Iterator[None]:
    """Have the LoRA layers and norms of a model computed so; as before afterwards.

    Layers of other kinds (DoRA, merged, several active adapters, embeddings, an adapter with a bias, norms that are
    trained or of another formula) are left alone.

    Args:
        model: with LoRA layers of PEFT, or without.
        shares: of the row to come, in its order and without gaps, of a model without LoRA layers: each layer takes the
            frozen product once for the whole row, and adds to each share what its adapter says.
    """
    found: list[tuple[Any, Callable[..., torch.Tensor]]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and _plain(module):
            found.append((module, _lora_of(module)))
        elif type(module).__name__ in RMS_NORMS and not module.weight.requires_grad:
            found.append((module, _norm_of(module)))
    found += _adapted(model, shares)
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


@dataclass(frozen=True)
class _Low:
    """The low-rank product of some tokens of a row."""

    a: torch.Tensor
    b: torch.Tensor
    dropout: Any
    scaling: float
    drawing: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(cls, layer: Any, drawing: Callable[[], AbstractContextManager[None]]) -> _Low:
        (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return cls(a, b, layer.lora_dropout[name], layer.scaling[name], drawing)

    def dropped(self, x: torch.Tensor) -> torch.Tensor | None:
        """The tokens' input with dropout; None where nothing is dropped."""
        if not (self.dropout.training and getattr(self.dropout, "p", 0)):
            return None
        with self.drawing():
            found: torch.Tensor = self.dropout(x)
        return found


Lows = Sequence[tuple[slice, _Low | None]]  # by the tokens of a row, without gaps; None: these have no adapter here


def _lora_of(layer: Any) -> Callable[..., torch.Tensor]:
    base, low, before = layer.base_layer, _Low.of(layer, nullcontext), type(layer).forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or (low.a.dtype != _compute(x) and not torch.is_autocast_enabled(x.device.type)):
            found: torch.Tensor = before(layer, x, *args, **kwargs)
            return found
        return _with_adapters(x, base, base, [(slice(None), low)])

    return forward


def _adapted(
    model: torch.nn.Module, shares: Sequence[Share]
) -> Iterator[tuple[torch.nn.Module, Callable[..., torch.Tensor]]]:
    """Each layer that one of the adapters is on, and what it computes."""
    layers: dict[str, list[_Low | None]] = {}
    for at, share in enumerate(shares):
        for name, module in share.model.named_modules():
            if isinstance(module, LoraLayer):
                layers.setdefault(name, [None] * len(shares))[at] = _Low.of(module, partial(share.drawing, name))
    tokens = [share.tokens for share in shares]
    for name, lows in layers.items():
        base = model.get_submodule(name)
        frozen = partial(type(base).forward, base)  # base.forward is what is given here
        yield base, partial(_with_adapters, base=base, frozen=frozen, lows=list(zip(tokens, lows, strict=True)))


def _compute(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _with_adapters(
    x: torch.Tensor, base: Any, frozen: Callable[[torch.Tensor], torch.Tensor], lows: Lows
) -> torch.Tensor:
    """What a layer computes of x.

    Args:
        x: (..., in).
        base: the layer without adapters.
        frozen: what it computes.
        lows: of the tokens of x.
    """
    compute = _compute(x)
    x = x.to(compute)
    flat = x.flatten(0, -2)
    if type(base) is not torch.nn.Linear or base.weight.dtype != compute or base.weight.requires_grad:
        result, parts = frozen(x), []
        for tokens, low in lows:
            part = result.flatten(0, -2)[tokens]
            if low is not None:
                dropped = low.dropped(flat[tokens])
                down = linear(flat[tokens] if dropped is None else dropped, low.a.to(compute))
                part = torch.addmm(part, down, low.b.to(compute).t(), alpha=low.scaling)
            parts.append(part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(result)
    given: list[torch.Tensor | None] = []
    scaled: list[tuple[slice, float]] = []
    for tokens, low in lows:
        if low is not None:
            given += [low.dropped(flat[tokens]), low.a.to(compute), low.b.to(compute)]
            scaled.append((tokens, low.scaling))
    out: torch.Tensor = _LoRA.apply(x, base.weight, base.bias, scaled, *given)  # type: ignore[no-untyped-call]
    return out


class _LoRA(torch.autograd.Function):
    """x W' + bias, and of some tokens + scaling * (dropped or x) A' B' with A and B of their own; W is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scaled: Sequence[tuple[slice, float]],
        *given: Any,
    ) -> torch.Tensor:
        flat, out = x.flatten(0, -2), linear(x, weight, bias)
        saved: list[torch.Tensor | None] = []
        for (tokens, scaling), dropped, a, b in zip(scaled, given[::3], given[1::3], given[2::3], strict=True):
            seen = flat[tokens] if dropped is None else dropped
            low = seen @ a.t()
            out.view(-1, out.shape[-1])[tokens].addmm_(low, b.t(), alpha=scaling)
            saved += [seen, low, a, b]
        ctx.save_for_backward(weight, *saved)
        ctx.scaled, ctx.shape = scaled, x.shape
        ctx.same = [dropped is None for dropped in given[::3]]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        whole = grads[0].flatten(0, -2)
        to_x = whole @ weight if ctx.needs_input_grad[0] else None
        to_given: list[torch.Tensor | None] = []
        for i, ((tokens, scaling), same) in enumerate(zip(ctx.scaled, ctx.same, strict=True)):
            seen, low, a, b = saved[4 * i : 4 * i + 4]
            grad = whole[tokens]
            to_low = (grad @ b).mul_(scaling)
            to_dropped = None
            if same and to_x is not None:
                to_x[tokens].addmm_(to_low, a)
            elif ctx.needs_input_grad[4 + 3 * i]:
                to_dropped = to_low @ a
            to_given += [to_dropped, to_low.t() @ seen, (grad.t() @ low).mul_(scaling)]
        return None if to_x is None else to_x.view(ctx.shape), None, None, None, *to_given


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
