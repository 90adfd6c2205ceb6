"""The result table as values of cells: what comparisons, claims, fronts and published numbers are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft_align.config.schema import MAIN_AXES
from peft_align.grid.runs import Sweep
from peft_align.reporting.frame import Frame, frame_of, in_table
from peft_align.reporting.statistics import Score, score
from peft_align.reporting.table import FIRST, LAST, Row, differ

MERGED = ("merge", "inputs")
TUNED, FAMILY = "model.instruction_tuned", "family"  # what a model's option says; its pre-trained model, or itself
VALIDATION = "/validation"


@dataclass(frozen=True)
class Measure:
    """One benchmark's metric; where a judge scored it, that judge's."""

    benchmark: str
    metric: str
    judge: str | None = None

    def __str__(self) -> str:
        return f"{self.benchmark} {self.metric}" + (f" ({self.judge})" if self.judge else "")


class Value(NamedTuple):
    """One measure of one checkpoint of one run.

    Attributes:
        place: the kind of run, the precision of its base and its axes, without the seed; what its model's option says.
        first, last: whether the step is the first or the last of those at which its run's benchmark is evaluated.
    """

    run_id: str
    place: Mapping[str, Any]
    seed: int | None
    step: int
    first: bool
    last: bool
    value: float
    error: float | None
    n: int | None

    def at(self, axes: Iterable[str]) -> tuple[Any, ...]:
        """What tells its cell from others, by these axes."""
        return tuple(map(self.place.get, axes))


@dataclass
class Results:
    """What a sweep has measured so far.

    Attributes:
        values: by measure, one for each run and step.
        axes: all that tell cells apart: the main ones, the sweep's own, those of merges.
        main: the measure that stands for each benchmark: the first metric that its option names.
        better: whether higher is better.
        parents: ids of a merge's inputs, by its own.
        dropped: values that are no finite numbers, which are left out.
        planned: by benchmark, the runs that are to be scored on it (on its test split), without a score.
        cells: the means by measure, once they were asked for (see `cells`): then `values` may change no more.
    """

    values: dict[Measure, list[Value]] = field(default_factory=dict)
    axes: tuple[str, ...] = (*MAIN_AXES, *MERGED)
    main: list[Measure] = field(default_factory=list)
    better: dict[Measure, bool | None] = field(default_factory=dict)
    parents: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: int = 0
    planned: dict[str, list[Value]] = field(default_factory=dict)
    cells: dict[Measure, list[Cell]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def varying(self) -> list[str]:
        """The axes of which there is more than one value among the trained runs."""
        trained = [v.place for values in self.values.values() for v in values if v.place["kind"] == "train"]
        return [axis for axis in self.axes if differ(place.get(axis) for place in trained)]

    def measures(self, benchmark: str, metric: str | None = None) -> list[Measure]:
        """Those of one benchmark: its main ones, or of this metric; one for each judge."""
        named = self.values if metric else self.main
        return [m for m in named if m.benchmark == benchmark and metric in (None, plain(m.metric))]


def plain(metric: str) -> str:
    """A metric's name without lm-eval's filter: exact_match,get-answer is exact_match."""
    return metric.partition(",")[0]


def gather(sweep: Sweep | Frame, names: Sequence[str], table: Sequence[Row], asked: Iterable[str] = ()) -> Results:
    """The values of a sweep's table.

    Of several evaluations of one run under other conditions, that of the most items counts. Scores on the validation
    split are left out: a search is no result.

    Args:
        sweep: what the table is of.
        names: its columns.
        table: its rows.
        asked: settings that a value's place tells besides the axes.
    """
    frame = frame_of(sweep)
    asked = tuple(asked)
    by_id = {run.id: run for run in frame.runs}
    further = names[len(FIRST) : -len(LAST)]
    results = Results(axes=tuple(dict.fromkeys((*MAIN_AXES, *further, *MERGED))))
    results.parents = {run.id: run.parents for run in frame.runs if run.kind == "merge"}
    best: dict[tuple[Any, ...], Value] = {}
    measures: dict[tuple[str, str, str | None], Measure] = {}
    places: dict[tuple[Any, ...], Mapping[str, Any]] = {}  # what the rows of a run share, once

    def place_of(row: Row) -> Mapping[str, Any]:
        own = (row["run_id"], row["kind"], row["base"], *map(row.get, results.axes))
        if own in places:
            return places[own]
        known = by_id.get(row["run_id"])
        place = {"kind": row["kind"], "base": row["base"]} | {axis: row.get(axis) for axis in results.axes}
        if row["kind"] == "train" and known:
            place |= {key: in_table(known.value(key)) for key in asked if key not in place}
        return places.setdefault(own, place | _family(frame, row["model"]))

    for run in frame.runs:
        if run.kind != "train" or run.is_parent_only:
            continue
        place = {key: in_table(run.value(key)) for key in (*results.axes, *asked)} | {
            "kind": run.kind,
            "base": run.base,
        }
        planned = Value(run.id, place | _family(frame, run.value("model")), None, 0, True, True, math.nan, None, None)
        for name in run.steps:
            results.planned.setdefault(name, []).append(planned)
    for row in table:
        if str(row["benchmark"]).endswith(VALIDATION) or row["value"] is None:
            continue
        if not math.isfinite(row["value"]):
            results.dropped += 1
            continue
        name = str(row["benchmark"]).partition("/")[0]
        known = by_id.get(row["run_id"])
        steps = (known.steps.get(name) if known else None) or (row["step"],)
        first, last = row["step"] == min(steps) < max(steps), row["step"] == max(steps)
        numbers = (float(row["value"]), row["stderr"], row["n"])
        value = Value(row["run_id"], place_of(row), row["seed"], row["step"], first, last, *numbers)
        named = (str(row["benchmark"]), str(row["metric"]), row["judge"])
        if named not in measures:
            measures[named] = Measure(*named)
            results.better[measures[named]] = row["higher_is_better"]
        key = (named, value.run_id, value.step, row["dataset"], row["preference"])
        if key not in best or (value.n or 0) > (best[key].n or 0):
            best[key] = value
    for (named, *_), value in best.items():
        results.values.setdefault(measures[named], []).append(value)
    for measure in results.values:
        wanted = (*frame.metrics.get(measure.benchmark.partition("/")[0], ()), "*")[0]
        if results.better[measure] is not None and (wanted == "*" or plain(measure.metric) == wanted):
            there = {(m.benchmark, m.judge) for m in results.main}
            if wanted != "*" or (measure.benchmark, measure.judge) not in there:
                results.main.append(measure)
    return results


def _family(frame: Frame, model: str) -> dict[str, Any]:
    """What a model's option says of it."""
    told = frame.models.get(model, {})
    return {TUNED: told.get("instruction_tuned"), FAMILY: told.get("tuned_from") or model}


@dataclass(frozen=True)
class Cell:
    """One cell's mean of one measure, at one step; `run_id` where it is of one run."""

    measure: Measure
    place: Mapping[str, Any]
    step: int
    score: Score
    last: bool
    by_seed: Mapping[Any, float]
    run_id: str | None


def cells(results: Results, measures: Iterable[Measure] | None = None) -> list[Cell]:
    """The mean over seeds of every cell and step; of each measure it is computed once."""
    asked = list(measures if measures is not None else results.values)
    for measure in asked:
        if measure not in results.cells:
            results.cells[measure] = _cells(results, measure)
    return [cell for measure in asked for cell in results.cells[measure]]


def _cells(results: Results, measure: Measure) -> list[Cell]:
    groups: dict[tuple[Any, ...], list[Value]] = {}
    for value in results.values.get(measure, ()):
        groups.setdefault((*value.at(("kind", "base", *results.axes)), value.step), []).append(value)
    found = []
    for members in groups.values():
        one = members[0]
        mean = score([v.value for v in members], [v.error for v in members])
        by_seed = {v.seed: v.value for v in members}
        only = one.run_id if len(members) == 1 else None
        found.append(Cell(measure, one.place, one.step, mean, one.last, by_seed, only))
    return found


def cell_rows(results: Results, found: Sequence[Cell]) -> tuple[list[str], list[Row]]:
    """Columns and rows of cells.csv."""
    names = ["kind", *results.axes, "base", "step", "benchmark", "judge", "metric"]
    names += ["mean", "low", "high", "interval_over", "seeds", "item_error", "wide_low", "wide_high"]
    rows: list[Row] = []
    for cell in found:
        own, mean = cell.measure, cell.score
        row = {axis: cell.place.get(axis) for axis in ("kind", "base", *results.axes)} | {"step": cell.step}
        row |= {"benchmark": own.benchmark, "judge": own.judge, "metric": own.metric}
        row |= {"mean": mean.mean, "low": mean.low, "high": mean.high, "interval_over": mean.basis or None}
        row |= {"seeds": mean.seeds, "item_error": mean.items, "wide_low": mean.wide_low, "wide_high": mean.wide_high}
        rows.append(row)
    return names, rows
