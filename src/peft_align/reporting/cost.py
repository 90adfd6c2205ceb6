"""What each run took: hours, memory, throughput, energy; and what a cell's gain over the unaligned base took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_align.config.schema import MAIN_AXES
from peft_align.grid.planner import Item
from peft_align.reporting.cells import Cell, Measure, Results, cells, plain
from peft_align.reporting.table import NOT_TRAINED, Row
from peft_align.reporting.told import Told, device, labels, number, part, told_of

if TYPE_CHECKING:  # what is computed with numpy, which details do without
    from peft_align.reporting.findings import Findings

MEASURED = (
    *("device", "device_kind", "processes", "packed_with", "train_hours", "device_hours", "evaluation_hours"),
    *("judging_hours", "peak_memory_gb", "memory_of", "tokens", "tokens_per_second", "samples_per_second"),
    *("energy_kwh", "evaluated_on"),
)
COLUMNS = ["run_id", "label", "kind", "is_parent_only", *MAIN_AXES, "base", "seed", *MEASURED]
HOUR, GB, KWH = 3600.0, 1e9, 3.6e6  # seconds; bytes; joules
# Metrics that are shares of one, of which a point is a hundredth; all others are counted as they are.
SHARES = (
    *("acc", "acc_norm", "exact_match", "accuracy", "reward_accuracy", "mc1", "mc2", "toxicity_probability"),
    *("over_refusal", "refusal_of_harmful"),
)
SHARES_END = ("_acc", "_by_wording")


def cost_of(told: Told) -> dict[str, Any]:
    """What a run took, by the names in MEASURED; None where its records do not say.

    train_hours: of all attempts that it goes on from, loading and reference included as far as they are of the last
    attempt; of a run that was trained in one pass with others (packed_with: how many), its share. device_hours: the
    same times the processes, each of which has a GPU of its own (device_kind GPU), or none. evaluation_hours,
    judging_hours: of what the sweep asks for. peak_memory_gb: the largest of GPU or process, as memory_of says.
    tokens_per_second, samples_per_second: of training steps alone. energy_kwh: of the GPUs as their own counters told.
    """
    record, found = told.train, dict.fromkeys(MEASURED)
    own = device(record) if record else None
    scored = [device(each.record) for each in told.scored if each.judgement is None]
    on = sorted({name for place in scored if place for name in place[1:]})
    found["evaluated_on"] = "; ".join(on) or None
    found["evaluation_hours"] = _hours([s.record for s in told.scored if s.judgement is None])
    found["judging_hours"] = _hours([s.record for s in told.scored if s.judgement is not None])
    if not record:
        return found
    together = part(record, "packed_with")
    others = len(together) if isinstance(together, list) else 0
    training, total = number(record, "seconds", "training"), number(record, "seconds", "total")
    known = [seconds for seconds in ((training,) if others and training is not None else (training, total))
             if seconds is not None]  # fmt: skip
    hours = max(known) / HOUR if known else None
    processes = int(number(record, "processes") or 1)
    on_gpu, resident = number(record, "peak_memory_bytes", "gpu"), number(record, "peak_memory_bytes", "resident")
    memory = on_gpu if on_gpu is not None else resident
    samples, energy = number(record, "samples"), number(record, "energy_joules")
    found |= {"device_kind": own[0], "device": own[1]} if own else {}
    found |= {"processes": processes, "packed_with": others, "train_hours": hours}
    found["device_hours"] = None if hours is None else hours * processes
    found |= {"peak_memory_gb": None if memory is None else memory / GB}
    found["memory_of"] = None if memory is None else "process" if on_gpu is None else "GPU"
    found |= {"tokens": number(record, "tokens"), "tokens_per_second": number(record, "tokens_per_second")}
    found["samples_per_second"] = samples / training if samples and training else None
    found["energy_kwh"] = None if energy is None else energy / KWH
    return found


def _hours(records: Sequence[Mapping[str, Any]]) -> float | None:
    known = [seconds for record in records if (seconds := number(record, "seconds")) is not None]
    return math.fsum(known) / HOUR if known else None


def cost_rows(
    items: Sequence[Item], root: Path, table: Sequence[Row] = (), told: Mapping[str, Told] | None = None
) -> list[Row]:
    """Rows of cost.csv: the runs of which a record tells anything, in their order; parents of others too.

    Args:
        items: the state of the runs.
        root: where they lie.
        table: of the sweep; runs of kinds that only it knows are named as it does.
        told: what was read of the runs; None: it is read now.
    """
    told = told_of(items, root) if told is None else told
    named = {row["run_id"]: row for row in table}
    names = labels([item.run for item in items])
    rows: list[Row] = []
    for item in items:
        run = item.run
        cost = cost_of(told[run.id])
        if all(value is None for value in cost.values()):
            continue
        row: Row = dict.fromkeys(COLUMNS)
        if run.kind in NOT_TRAINED:
            row |= {"model": run.choices["model"], "peft": run.base, "method": run.axes.get("adapter")}
        else:
            row |= {key: named.get(run.id, run.choices).get(key) for key in MAIN_AXES} | {"seed": run.config.seed}
        row |= {"run_id": run.id, "label": names[run.id], "kind": run.kind, "is_parent_only": run.is_parent_only}
        rows.append(row | {"base": run.base} | cost)
    return rows


def per_point_columns(results: Results) -> list[str]:
    """Columns of `per_point`."""
    names = ["kind", *results.axes, "base", "benchmark", "judge", "metric", "higher_is_better", "point", "baseline"]
    names += ["mean", "gain", "gain_low", "gain_high", "is_gain_shown", "hours", "device_kind", "hours_per_point"]
    return [*names, "seeds"]


def per_point(found: Findings, rows: Sequence[Row]) -> list[Row]:
    """What a cell's gain over the unaligned base took, for each benchmark's main measure, at the last step.

    gain: in points, positive is better whatever the measure's direction; a point is a hundredth of a measure that is a
    share, else one of its units (`point`). gain_low, gain_high: its 95% interval, which takes the base for exact;
    is_gain_shown: all of it is above 0.
    hours: what training one run of the cell took (cost_of's device_hours, the mean over its seeds; of a merge, the sum
    over its inputs); of evaluations nothing. hours_per_point: None where there is no gain, or it is not known.

    Args:
        found: what the sweep shows.
        rows: of `cost_rows`.
    """
    results = found.results
    hours = {row["run_id"]: (row["device_hours"], row["device_kind"]) for row in rows}
    trained = [cell for cell in cells(results, results.main) if cell.last and cell.place["kind"] in ("train", "merge")]
    members: dict[tuple[Any, ...], list[str]] = {}
    bases: dict[tuple[Any, ...], float] = {}
    axes = ("kind", "base", *results.axes)
    for measure in results.main:
        for value in results.values[measure]:
            if value.place["kind"] == "baseline":
                bases[measure, *value.at(("model", "base", "dataset", "preference"))] = value.value
            members.setdefault((measure, *value.at(axes), value.step), []).append(value.run_id)
    told: list[Row] = []
    for cell in trained:
        base = _base_of(cell, bases)
        if base is None:
            continue
        ids = members[cell.measure, *(cell.place.get(axis) for axis in axes), cell.step]
        told.append(_point_row(results, cell, base, [_took(run, results, hours) for run in ids]))
    return told


def _base_of(cell: Cell, bases: Mapping[tuple[Any, ...], float]) -> float | None:
    """The unaligned base's value, as comparisons take it."""
    model, base, *pairs = (cell.place.get(axis) for axis in ("model", "base", "dataset", "preference"))
    base = str(base).removesuffix(" dequantized")
    of_pairs = bases.get((cell.measure, model, base, *pairs))
    return of_pairs if of_pairs is not None else bases.get((cell.measure, model, base, None, None))


def _took(
    run_id: str, results: Results, hours: Mapping[str, tuple[float | None, str | None]]
) -> tuple[float | None, str | None]:
    """Hours and kind of device; of a merge, of all its inputs together."""
    parts = [hours.get(each, (None, None)) for each in results.parents.get(run_id) or (run_id,)]
    kinds = {kind for _, kind in parts}
    known = [taken for taken, _ in parts if taken is not None]
    whole = len(known) == len(parts) and len(kinds) == 1
    return (math.fsum(known), kinds.pop()) if whole else (None, None)


def _point_row(results: Results, cell: Cell, base: float, took: Sequence[tuple[float | None, str | None]]) -> Row:
    measure, score = cell.measure, cell.score
    better, point = results.better[measure], _point(results, measure)
    sign = -1.0 if better is False else 1.0
    bounds = [None if v is None else sign * (v - base) / point for v in (score.low, score.high)]
    low, high = bounds[::-1] if better is False else bounds
    gain = sign * (score.mean - base) / point
    kinds = {kind for _, kind in took}
    known = [taken for taken, _ in took if taken is not None]
    one = statistics.fmean(known) if len(known) == len(took) and len(kinds) == 1 else None
    row: Row = {axis: cell.place.get(axis) for axis in ("kind", *results.axes, "base")}
    row |= {"benchmark": measure.benchmark, "judge": measure.judge, "metric": measure.metric}
    row |= {"higher_is_better": better, "point": point, "baseline": base, "mean": score.mean}
    row |= {"gain": gain, "gain_low": low, "gain_high": high, "hours": one, "seeds": score.seeds}
    row["is_gain_shown"] = None if low is None else low > 0
    row["device_kind"] = kinds.pop() if one is not None else None
    return row | {"hours_per_point": one / gain if one is not None and gain > 0 else None}


def _point(results: Results, measure: Measure) -> float:
    """What of a measure is a point: a hundredth of a share, as its name and all its values say."""
    name = plain(measure.metric)
    named = name in SHARES or name.endswith(SHARES_END)
    return 0.01 if named and all(0 <= value.value <= 1 for value in results.values[measure]) else 1.0
