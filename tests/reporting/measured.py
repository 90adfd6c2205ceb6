"""Tables of sweeps that were never run: every run, step and benchmark with the value that a test gives it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_align.grid.planner import Item
from peft_align.grid.runs import Run, Sweep
from peft_align.reporting.cells import Results, gather
from peft_align.reporting.table import FIRST, NOT_TRAINED, Row, columns

Give = Callable[[Run, str, int], float | None]  # of a run, a benchmark and a step; None: it was not measured


def table(sweep: Sweep, give: Give, judges: Mapping[str, Sequence[str]] | None = None) -> list[Row]:
    """The rows that a sweep's table would have; benchmarks have their main metric alone."""
    found = []
    for run in sweep.runs:
        if run.is_parent_only:
            continue
        places: dict[tuple[str, int], tuple[Any, ...]] = {}
        for scoring in run.scorings:
            for name, benchmark in scoring.benchmarks:
                paired = (scoring.dataset_name, scoring.preference_name) if name == "preference" else (None, None)
                for step in scoring.steps:
                    places[name, step] = (benchmark.metrics[0], *paired)
        for (name, step), (metric, dataset, preference) in places.items():
            value = give(run, name, step)
            if value is None:
                continue
            row: Row = dict.fromkeys(columns(sweep)) | {"run_id": run.id, "kind": run.kind, "base": run.base}
            if run.kind in NOT_TRAINED:
                row |= {"model": run.choices["model"], "peft": run.base, "dataset": dataset, "preference": preference}
            else:
                row |= {key: run.choices[key] for key in FIRST[2:-1]} | {"seed": run.config.seed}
                further = [key for key in row if "." in key]
                row |= {key: _setting(run.config, key) for key in further}
                row |= {"inputs": run.axes["inputs"], "merge": run.choices["merge"]} if run.kind == "merge" else {}
            row |= {"step": step, "benchmark": name, "metric": metric, "value": value, "stderr": 0.01, "n": 100}
            row |= {"higher_is_better": True}
            found += [row | {"judge": judge} for judge in (judges or {}).get(name, [None])]
    return found


def results(sweep: Sweep, give: Give, asked: Iterable[str] = (), **more: Any) -> Results:
    """The same as values of cells."""
    return gather(sweep, columns(sweep), table(sweep, give, **more), asked)


def noise(run: Run, *words: object, spread: float = 1.0) -> float:
    """A draw that is always the same for a run and these words, and independent of those for others."""
    text = " ".join(map(str, (run.id, *words)))
    return float(np.random.default_rng(zlib.crc32(text.encode())).normal(0, spread))


def done(sweep: Sweep) -> list[Item]:
    """Its runs as if nothing were left to do."""
    return [Item(run) for run in sweep.runs]


def _setting(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name, None)
    return config
