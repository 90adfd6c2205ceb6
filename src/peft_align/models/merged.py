"""A merge as a stage: its recipe is recorded, evaluation makes the merged model of it in memory, and it can be saved.

The recipe is the inputs with their digests, the parameters and the seed: whoever has the adapters has the merge.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from peft_align.config.compose import scientific
from peft_align.config.identity import short_hash
from peft_align.config.schema import Arithmetic, Slerp
from peft_align.grid.expand import Run
from peft_align.grid.planner import adapter_digest
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
from peft_align.store.records import Digests, inventory, sync_tree, write_json
from peft_align.store.runs import FORMAT, RunDir


class MergeRefused(RuntimeError):
    """The merge cannot be saved as asked; the message says why."""


def merge(run: Run, directory: RunDir, load: Callable[[], Base]) -> dict[str, Any]:
    """Record a merge, and save what `merge.save` asks for. Returns the record, which is on disk then.

    Args:
        run: of kind merge; its inputs are its parents, in order.
        directory: where it goes; the caller holds its lock.
        load: gives the base that it is evaluated on, if that is needed; given back as it was.

    Raises:
        Damaged: an input is not what its record says.
        MergeRefused: the adapter asked for would differ too much from the merge.
    """
    started = time.time()
    how = _how(run)
    (directory.path / "merge.json").unlink(missing_ok=True)
    shutil.rmtree(directory.merged, ignore_errors=True)
    parents = {parent: adapter_digest(RunDir(directory.root, parent).train_record()) for parent in run.parents}
    recipe = {"merge": scientific(type(how), how), "adapters": list(parents.values()), "seed": run.config.seed}
    details: dict[str, Any] = {}
    if how.save == "adapter":
        details = save_as_adapter(run, directory, load())
    elif how.save == "full":
        base = load()
        with merged_model(run, directory, base) as model:
            model.save_pretrained(directory.merged, safe_serialization=True)
            base.tokenizer.save_pretrained(directory.merged)
            sync_tree(directory.merged)
    names = sorted(path.name for path in directory.merged.glob("*"))
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "merge",
        **recipe,
        "digest": short_hash(json.dumps(recipe, sort_keys=True), 64),
        "parents": parents,
        "weights": run.base,
        "save": how.save,
        "details": details,
        "files": inventory(directory.merged, names, Digests()),
        "seconds": round(time.time() - started, 3),
        "provenance": provenance(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(directory.path / "merge.json", record)
    return record


@contextmanager
def merged_model(run: Run, directory: RunDir, base: Base) -> Iterator[Any]:
    """The base with the merged weights in place of its own; it is as before afterwards. Raises Damaged."""
    how = _how(run)
    adapters = [read_adapter(RunDir(directory.root, parent).product()) for parent in run.parents]
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


def save_as_adapter(run: Run, directory: RunDir, base: Base) -> dict[str, Any]:
    """Write the merge as one PEFT adapter, and say with which rank and relative error.

    A linear combination of adapters is an adapter: their factors side by side. Any other merge is cut to the rank
    asked for by a singular value decomposition, and refused if that loses more than `merge.save_tolerance`.
    """
    how = _how(run)
    adapters = [read_adapter(RunDir(directory.root, parent).product()) for parent in run.parents]
    full_rank = sum(max(len(f.a) for f in adapter.values()) for adapter in adapters)
    rank = how.save_rank or full_rank
    weights: dict[str, Tensor] = {}
    lost = total = 0.0
    modules = modules_of(adapters)
    for module in modules:
        factors = [adapter.get(module) for adapter in adapters]
        weight = base.model.get_submodule(module).weight
        deltas = [factor.delta(weight.device) if factor else None for factor in factors]
        changes = [torch.zeros_like(weight, dtype=torch.float32) if d is None else d for d in deltas]
        multiplied = coefficients(how, changes)
        if multiplied is not None and rank >= full_rank:
            b, a = side_by_side(factors, multiplied, rank, weight.shape)
        else:
            change = merge_weight(how, weight, deltas, module, run.config.seed) - weight.to(torch.float32)
            b, a = truncated(change, rank)
            lost += float(torch.linalg.vector_norm(change - b @ a)) ** 2
            total += float(torch.linalg.vector_norm(change)) ** 2
        weights[PREFIX + module + SUFFIX_A] = a.to("cpu", torch.float32).contiguous()
        weights[PREFIX + module + SUFFIX_B] = b.to("cpu", torch.float32).contiguous()
    error = (lost / total) ** 0.5 if total else 0.0
    if error > how.save_tolerance:
        raise MergeRefused(
            f"an adapter of rank {rank} is off by {error:.2g} of the merged change, more than"
            f" merge.save_tolerance={how.save_tolerance:g}; merge.save=full keeps all of it"
        )
    directory.merged.mkdir(parents=True)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,  # a scale of 1: the factors carry it
        target_modules=targets,
        base_model_name_or_path=base.source["name"],
        inference_mode=True,
    ).save_pretrained(str(directory.merged))
    save_file(weights, directory.merged / "adapter_model.safetensors", metadata={"format": "pt"})
    sync_tree(directory.merged)
    return {"rank": rank, "relative_error": error}


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
