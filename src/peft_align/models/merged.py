"""A merge as a stage: its recipe is recorded, evaluation makes the merged model of it in memory, and it can be saved.

The recipe is the inputs with their digests, the parameters and the seed: whoever has the adapters has the merge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from peft_align.config.compose import scientific
from peft_align.config.identity import short_hash
from peft_align.config.schema import Arithmetic, Slerp
from peft_align.errors import WorkError
from peft_align.grid.planner import adapter_digest, asked_of
from peft_align.grid.runs import Run
from peft_align.models.adapters import settle_config
from peft_align.models.loading import Base
from peft_align.models.merging import (
    PREFIX,
    SUFFIX_A,
    SUFFIX_B,
    Factors,
    coefficients,
    merge_weight,
    modules_of,
    read_adapter,
)
from peft_align.models.provenance import provenance
from peft_align.store.records import Digests, forget_damage, inventory, remove_tree, sync_tree, write_json
from peft_align.store.runs import FORMAT, RunDir

ARITHMETIC = 1  # the version of models/merging.py; another one makes other scores


class MergeRefused(WorkError):
    """The merge cannot be saved as asked; the message says why."""


def record_merge(run: Run, directory: RunDir) -> dict[str, Any]:
    """Record a merge's recipe, which is all that evaluation needs. Returns the record, which is on disk then.

    Args:
        run: of kind merge; its inputs are its parents, in order.
        directory: where it goes; the caller holds its lock.
    """
    how = _how(run)
    parents = {parent: adapter_digest(RunDir(directory.root, parent).train_record()) for parent in run.parents}
    recipe = {
        "version": ARITHMETIC,
        "merge": scientific(type(how), how),
        "adapters": list(parents.values()),
        "seed": run.config.seed,
    }
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "merge",
        **recipe,
        "digest": short_hash(json.dumps(recipe, sort_keys=True), 64),
        "parents": parents,
        "weights": run.base,
        "saved": {},
        "provenance": provenance(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    directory.check()
    write_json(directory.path / "merge.json", record)
    forget_damage(directory.path / "merge.json")
    return record


def save_merge(run: Run, directory: RunDir, base: Base, form: str) -> dict[str, Any]:
    """Save a recorded merge as an adapter or as a full model, and say so in its record.

    The new copy is complete before it takes the place of an old one, so a refusal leaves that as it was.

    Raises:
        Damaged: an input is not what its record says.
        MergeRefused: the adapter would differ too much from the merge.
    """
    place = directory.merged(form)
    fresh = place.with_name(f".{form}")
    remove_tree(fresh)  # a disk that refuses is told as such, not by what stands in the way then
    fresh.mkdir(parents=True)
    details: dict[str, Any] = {}
    if form == "adapter":
        details = save_as_adapter(run, directory, base, fresh)
    else:
        with merged_model(run, directory, base) as model:
            model.save_pretrained(fresh, safe_serialization=True)
            base.tokenizer.save_pretrained(fresh)
    sync_tree(fresh)
    remove_tree(place)
    fresh.replace(place)
    files = inventory(place, sorted(path.name for path in place.iterdir()), Digests())
    directory.check()
    record = directory.merge_record() or {}
    own = {"asked": asked_of(run, form), "files": files, "inputs": {"model": base.source}, **details}
    record["saved"] = {**record["saved"], form: own}
    write_json(directory.path / "merge.json", record)
    return own


@contextmanager
def merged_model(run: Run, directory: RunDir, base: Base) -> Iterator[Any]:
    """The base with the merged weights in place of its own; it is as before afterwards. Raises Damaged."""
    how, adapters = _how(run), _inputs(run, directory)
    before: dict[str, Tensor] = {}
    try:
        for module in modules_of(adapters):
            weight = base.model.get_submodule(module).weight
            before[module] = weight.detach().to("cpu", copy=True)
            deltas = [adapter[module].delta(weight.device) if module in adapter else None for adapter in adapters]
            with torch.no_grad():
                weight.copy_(merge_weight(how, weight, deltas, module, run.config.seed))
        yield base.model
    finally:
        with torch.no_grad():
            for module, weight in before.items():
                base.model.get_submodule(module).weight.copy_(weight)


def save_as_adapter(run: Run, directory: RunDir, base: Base, folder: Path) -> dict[str, Any]:
    """Write the merge as one PEFT adapter, and say with which rank and relative error.

    A linear combination of adapters is an adapter: their factors side by side. Any other merge is cut to the rank
    asked for by a singular value decomposition, and refused as soon as that is sure to lose more than
    `merge.save_tolerance`.
    """
    how, adapters = _how(run), _inputs(run, directory)
    full_rank = sum(max(len(f.a) for f in adapter.values()) for adapter in adapters)
    rank = how.save_rank or full_rank
    modules = modules_of(adapters)

    def changes_of(module: str) -> tuple[Tensor, list[Tensor]]:
        weight = base.model.get_submodule(module).weight
        found = [adapter[module].delta(weight.device) if module in adapter else None for adapter in adapters]
        return weight, [torch.zeros_like(weight, dtype=torch.float32) if d is None else d for d in found]

    def merged_change(module: str) -> Tensor:
        weight, changes = changes_of(module)
        return merge_weight(how, weight, changes, module, run.config.seed) - weight.to(torch.float32)

    combined = {module: coefficients(how, *changes_of(module)) if rank >= full_rank else None for module in modules}
    cut = [module for module in modules if combined[module] is None]
    total = sum(float(torch.linalg.vector_norm(merged_change(module))) ** 2 for module in cut)
    lost, weights = 0.0, {}
    for module in [*cut, *(module for module in modules if module not in cut)]:
        multiplied = combined[module]
        if multiplied is None:
            change = merged_change(module)
            b, a = truncated(change, rank)
            lost += float(torch.linalg.vector_norm(change - b @ a)) ** 2
        else:
            shape = base.model.get_submodule(module).weight.shape
            b, a = side_by_side([adapter.get(module) for adapter in adapters], multiplied, rank, shape)
        if lost > how.save_tolerance**2 * total:
            raise MergeRefused(
                f"an adapter of rank {rank} is off by {(lost / total) ** 0.5:.2g} or more of the merged change, above"
                f" merge.save_tolerance={how.save_tolerance:g}; merge.save=full keeps all of it"
            )
        weights[PREFIX + module + SUFFIX_A] = a.to("cpu", torch.float32).contiguous()
        weights[PREFIX + module + SUFFIX_B] = b.to("cpu", torch.float32).contiguous()
    targets = sorted({module.rpartition(".")[2] for module in modules})
    LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,  # a scale of 1: the factors carry it
        target_modules=targets,
        inference_mode=True,
    ).save_pretrained(str(folder))
    settle_config(folder, base.source["name"])
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"rank": rank, "relative_error": (lost / total) ** 0.5 if total else 0.0}


def side_by_side(
    factors: Sequence[Factors | None], multiplied: Sequence[float], rank: int, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Factors b (out, rank), a (rank, in) of a linear combination of adapters; unused ranks are zero."""
    b, a = torch.zeros(shape[0], rank), torch.zeros(rank, shape[1])
    at = 0
    for factor, multiplier in zip(factors, multiplied, strict=True):
        if factor is not None:
            end = at + len(factor.a)
            b[:, at:end] = multiplier * factor.scale * factor.b.to("cpu", torch.float32)
            a[at:end] = factor.a.to("cpu", torch.float32)
            at = end
    return b, a


def truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors b (out, rank), a (rank, in) of a change (out, in); unused ranks are zero."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank, len(s))
    b, a = change.new_zeros(change.shape[0], rank), change.new_zeros(rank, change.shape[1])
    b[:, :kept], a[:kept] = u[:, :kept] * s[:kept], v[:kept]
    return b, a


def _how(run: Run) -> Slerp | Arithmetic:
    how = run.config.merge
    assert isinstance(how, (Slerp, Arithmetic))
    return how


def _inputs(run: Run, directory: RunDir) -> list[dict[str, Factors]]:
    return [read_adapter(RunDir(directory.root, parent).product()) for parent in run.parents]
