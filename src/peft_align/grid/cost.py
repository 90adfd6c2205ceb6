"""What a run costs: parameters by the closed formula, time from measured throughput. No download, no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_align.config.schema import Peft, Shape
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run
from peft_align.store.runs import RunDir

Measured = tuple[Run, dict[str, Any]]  # a training run that is done, and its record
BYTES = {"fp32": 4, "bf16": 2}


def module_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear modules of one Llama-like decoder layer."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    return {
        "q_proj": (shape.hidden, shape.hidden),
        "k_proj": (shape.hidden, kv),
        "v_proj": (shape.hidden, kv),
        "o_proj": (shape.hidden, shape.hidden),
        "gate_proj": (shape.hidden, shape.ffn),
        "up_proj": (shape.hidden, shape.ffn),
        "down_proj": (shape.ffn, shape.hidden),
    }


def adapter_parameters(run: Run) -> int | None:
    """Trainable parameters of a run; None if a module is not known."""
    return trainable_parameters(run.config.model.shape, run.config.peft)


def trainable_parameters(shape: Shape, peft: Peft) -> int | None:
    """r × (inputs + outputs) per target module and layer. None if a module is not known."""
    modules = module_shapes(shape)
    if any(name not in modules for name in peft.target_modules):
        return None
    return shape.layers * peft.r * sum(sum(modules[name]) for name in set(peft.target_modules))


def base_parameters(shape: Shape) -> int:
    """Parameters of a Llama-like model: its linear modules, embeddings and norms."""
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return linear_parameters(shape) + 2 * shape.layers * shape.hidden + embeddings + shape.hidden


def linear_parameters(shape: Shape) -> int:
    """Of the layers' linear modules, without the head."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in module_shapes(shape).values())


def seconds_left(items: Iterable[Item], records: Iterable[Measured]) -> float | None:
    """Seconds of training still to be done, from the measured seconds a step of like runs; None without a measurement.

    A kind of run that was never measured makes the whole unknown, rather than too small.

    Args:
        items: of the plan.
        records: of its runs that are done (`measured`).
    """
    paces = measured_paces(records)
    total = 0.0
    for item in items:
        if item.run.kind != "train" or item.to_make is None:
            continue
        pace = paces.get(likeness(item.run))
        if pace is None:
            return None
        total += pace * item.run.config.train.max_steps
    return total


def measured(root: Path, items: Iterable[Item]) -> list[Measured]:
    """The training runs that are done, and their records."""
    done = (item.run for item in items if item.run.kind == "train" and item.to_make is None)
    records = ((run, RunDir(root, run.id).train_record()) for run in done)
    return [(run, record) for run, record in records if record]


def measured_paces(records: Iterable[Measured]) -> dict[tuple[str, ...], float]:
    """Median seconds a step of each likeness."""
    found: dict[tuple[str, ...], list[float]] = {}
    for run, record in records:
        if record.get("seconds_per_step"):
            found.setdefault(likeness(run), []).append(record["seconds_per_step"])
    return {alike: statistics.median(rates) for alike, rates in found.items()}


def proposals(records: Iterable[Measured]) -> list[dict[str, object]]:
    """What to ask a cluster for, from what like runs took: one entry for each model, method and precision of the base.

    The time is half as much again as the longest training took and five minutes for loading, the memory a quarter more
    than the largest; memory of a GPU is told as it was, to choose a card by.
    """
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run, record in records:
        if not {"seconds", "peak_memory_bytes"} <= record.keys():
            continue
        alike.setdefault((*likeness(run)[:3],), []).append(record)
    found: list[dict[str, object]] = []
    for (model, method, base), those in alike.items():
        minutes = 5 + math.ceil(max(record["seconds"]["total"] for record in those) * 1.5 / 60)
        resident = max(record["peak_memory_bytes"]["resident"] for record in those)
        on_gpu = max((record["peak_memory_bytes"]["gpu"] or 0 for record in those), default=0)
        entry: dict[str, object] = {"model": model, "method": method, "base": base, "runs": len(those)}
        entry |= {"time": f"{minutes // 60}:{minutes % 60:02d}:00", "mem": f"{math.ceil(resident * 1.25 / 2**30)}G"}
        found.append(entry | {"gpu_bytes": on_gpu or None})
    return found


def likeness(run: Run) -> tuple[str, ...]:
    """What runs share that take like time: model, method, precision of the base, engine and sizes."""
    config, train = run.config, run.config.train
    micro = train.micro_batch_size if train.engine == "trl" else train.micro_batch_tokens
    sizes = (train.engine, train.batch_size, train.max_length, micro, train.gradient_checkpointing, train.pack_runs)
    return (run.choices["model"], config.method.kind, run.base, *map(str, sizes))


def human_bytes(count: float) -> str:
    """1.5 GB"""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(count) // 3), 5)
    return f"{count / 1000**power:.1f} {['B', 'kB', 'MB', 'GB', 'TB', 'PB'][power]}"


def human_time(seconds: float) -> str:
    """1 h 02 min"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
