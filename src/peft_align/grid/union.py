"""Several sweeps as one: what is asked of a run by any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from peft_align.grid.runs import Run, Sweep, value


def united(sweeps: Sequence[Sweep]) -> Sweep:
    """Every run once, with all that is evaluated of it; parents before children, baselines last.

    A cell that one sweep excludes and another has is not excluded.
    """
    runs: dict[str, Run] = {}
    for run in (run for sweep in sweeps for run in sweep.runs):
        known = runs.get(run.id)
        runs[run.id] = run if known is None else _both(known, run)
    ordered = [run for run in runs.values() if run.kind != "baseline"]
    ordered += [run for run in runs.values() if run.kind == "baseline"]
    keys = list(dict.fromkeys(key for sweep in sweeps for key in sweep.axis_keys))
    keys = [key for key in keys if key != "inputs"] + ["inputs"] * ("inputs" in keys)
    trained = [run for run in ordered if run.kind == "train"]
    excluded = [cell for sweep in sweeps for cell in sweep.excluded]
    there = {names: {_place(run, names) for run in trained} for names in {tuple(cell.values) for cell in excluded}}
    excluded = [cell for cell in excluded if repr(list(cell.values.values())) not in there[tuple(cell.values)]]
    name = "+".join(dict.fromkeys(sweep.name for sweep in sweeps))
    notes = list(dict.fromkeys(note for sweep in sweeps for note in sweep.notes))
    return Sweep(name, ordered, excluded, notes, tuple(keys), sweeps[0].config)


def _both(one: Run, other: Run) -> Run:
    """A run that two sweeps have."""
    return dataclasses.replace(
        one,
        axes=one.axes | other.axes,
        scorings=[*one.scorings, *(scoring for scoring in other.scorings if scoring not in one.scorings)],
        steps=tuple(sorted({*one.steps, *other.steps})),
        is_parent_only=one.is_parent_only and other.is_parent_only,
        saves=tuple(sorted({*one.saves, *other.saves})),
    )


def _place(run: Run, keys: Sequence[str]) -> str:
    """A run's values of these settings, to be compared with those of a cell."""
    return repr([value(run, key) for key in keys])
