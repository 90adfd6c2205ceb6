"""How weight changes are merged: the arithmetic, tensor by tensor, as mergekit 0.1.5 does it, and DARE as its paper.

An adapter changes a weight W (out, in) by D = scale · B · A. A merge makes one D of several:

    linear, task arithmetic   sum of w_i D_i (divided by the sum of the w_i if `normalize`), times lambda
    ties                      entries of D_i outside its largest are dropped first, then those against the elected sign
    dare                      entries of D_i are dropped at random, what is left is divided by the density (Yu et al.
                              2024; mergekit 0.1.5 scales it to the L1 norm that it had instead)
    slerp                     two inputs, along the arc between them

All of it in fp32. Random masks are drawn on the CPU, from the seed, the module's name and the input's place, so they do
not depend on the device or on which modules were merged before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_align.config.schema import Arithmetic, Slerp

NEARLY_PARALLEL = 0.9995  # cosine beyond which slerp is linear interpolation (mergekit's threshold)
PREFIX, SUFFIX_A, SUFFIX_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
PATTERNS = ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "modules_to_save", "layer_replication")


@dataclass(frozen=True)
class Factors:
    """One module's part of an adapter: a change of scale · b (out, r) · a (r, in)."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self, device: torch.device | str = "cpu") -> Tensor:
        """The weight change (out, in) in fp32."""
        return self.scale * (self.b.to(device, torch.float32) @ self.a.to(device, torch.float32))


def read_adapter(folder: Path) -> dict[str, Factors]:
    """The factors of a saved LoRA adapter by the name of the module they change.

    Raises:
        ValueError: it is no plain LoRA: what its factors mean is then not known here.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    special = [name for name in PATTERNS if config.get(name)]
    if config.get("peft_type") != "LORA" or special:
        raise ValueError(f"{folder} is no plain LoRA adapter ({', '.join(special) or config.get('peft_type')})")
    weights = load_file(folder / "adapter_model.safetensors")
    if unknown := [key for key in weights if not key.endswith((SUFFIX_A, SUFFIX_B))]:
        raise ValueError(f"{folder} is no plain LoRA adapter (it has {unknown[0]})")
    scale = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix(PREFIX).removesuffix(SUFFIX_A): Factors(
            weights[key], weights[key.removesuffix(SUFFIX_A) + SUFFIX_B], scale
        )
        for key in sorted(weights)
        if key.endswith(SUFFIX_A)
    }


def merge_weight(
    merge: Slerp | Arithmetic, base: Tensor, deltas: Sequence[Tensor | None], module: str, seed: int
) -> Tensor:
    """The merged weight of one module.

    Args:
        merge: how.
        base: the unaligned weight (out, in), of any floating dtype; the result has its shape, in fp32.
        deltas: each input's change, fp32 on the base's device; None where an input leaves the module alone.
        module, seed: what random masks are drawn from.
    """
    whole = base.to(torch.float32)
    changes = [torch.zeros_like(whole) if delta is None else delta for delta in deltas]
    if isinstance(merge, Slerp) and merge.space == "weights":
        return slerp(whole + changes[0], whole + changes[1], merge.t)
    return whole + merge_changes(merge, changes, module, seed)


def merge_changes(merge: Slerp | Arithmetic, changes: Sequence[Tensor], module: str, seed: int) -> Tensor:
    """The merged change of one module, of the inputs' changes (out, in) in fp32."""
    if isinstance(merge, Slerp):
        return slerp(changes[0], changes[1], merge.t)
    kept = [sparsify(merge, change, module, i, seed) for i, change in enumerate(changes)]
    weights = input_weights(merge, len(changes))
    stacked = torch.stack([w * change for w, change in zip(weights, kept, strict=True)])
    took_part = torch.tensor(weights, device=stacked.device).view(-1, *[1] * (stacked.dim() - 1))
    if merge.elect_sign:
        elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
        agrees = stacked.sign() == elected
        stacked, took_part = stacked * agrees, took_part * agrees
    merged = stacked.sum(0)
    if merge.normalize:
        total = took_part.sum(0)
        merged = merged / torch.where(total.abs() < 1e-8, 1.0, total)
    return merge.scaling * merged


def input_weights(merge: Arithmetic, inputs: int) -> list[float]:
    """The weight of each input: equal ones unless given."""
    return merge.weights if merge.weights is not None else [1 / inputs] * inputs


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at t on the arc from a to b, which are taken for vectors; lengths are interpolated along with it."""
    first, second = slerp_coefficients(a, b, t)
    return first * a + second * b


def slerp_coefficients(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """What slerp multiplies a and b with."""
    lengths = [length if (length := float(torch.linalg.vector_norm(v.double()))) > 1e-8 else 1.0 for v in (a, b)]
    cosine = float((a.double() * b.double()).sum()) / lengths[0] / lengths[1]
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def sparsify(merge: Arithmetic, change: Tensor, module: str, index: int, seed: int) -> Tensor:
    """The change with a share of `merge.density` of its entries, the others zero."""
    if merge.sparsify == "none" or merge.density == 1:
        return change
    if merge.sparsify == "magnitude":
        keep = max(1, int(merge.density * change.numel()))
        places = change.abs().flatten().topk(keep).indices
        mask = torch.zeros(change.numel(), device=change.device).scatter_(0, places, 1.0)
        return change * mask.view_as(change)
    generator = torch.Generator().manual_seed(mask_seed(seed, module, index))
    mask = torch.bernoulli(torch.full(change.shape, merge.density), generator=generator).to(change.device)
    return change * mask / (merge.density if merge.rescale else 1)


def mask_seed(seed: int, module: str, index: int) -> int:
    """The seed of one random mask."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module} {index}".encode()).digest()[:7], "big")


def coefficients(merge: Slerp | Arithmetic, base: Tensor, changes: Sequence[Tensor]) -> list[float] | None:
    """What a merge multiplies each change of a weight with, where it is a linear combination of them; else None."""
    if isinstance(merge, Slerp):
        if merge.space == "delta":
            return list(slerp_coefficients(changes[0], changes[1], merge.t))
        whole = base.to(torch.float32)
        found = slerp_coefficients(whole + changes[0], whole + changes[1], merge.t)
        return list(found) if found == (1 - merge.t, merge.t) else None  # nearly parallel: the base stays as it is
    if merge.elect_sign or (merge.sparsify != "none" and merge.density < 1):
        return None
    weights = input_weights(merge, len(changes))
    total = sum(weights) if merge.normalize and abs(sum(weights)) >= 1e-8 else 1.0
    return [merge.scaling * w / total for w in weights]


def modules_of(adapters: Sequence[Mapping[str, Factors]]) -> list[str]:
    """Every module that one of the adapters changes."""
    return sorted({module for adapter in adapters for module in adapter})
