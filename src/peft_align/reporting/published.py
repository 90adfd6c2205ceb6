"""The study's published numbers (its tables 2 to 5, conf/report/published/): as results, and beside those of a sweep.

They are means over five seeds without a spread: one value a cell. So what they say of a claim is said over cells alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft_align.config.compose import ConfigSpace, config_dir
from peft_align.config.schema import MAIN_AXES
from peft_align.reporting.cells import Cell, Measure, Results, cells, gather, plain
from peft_align.reporting.frame import Frame, Planned
from peft_align.reporting.statistics import t_quantile
from peft_align.reporting.table import Row, columns

SEEDS = 5  # of each published mean
STEPS = 700  # of each training
NAME = "the study's published numbers"  # of the sweep that they make
NUMBERS = {  # column of the files -> benchmark and metric
    "bbh": ("bbh", "exact_match"),
    "mmlu": ("mmlu", "acc"),
    "alpaca_eval": ("alpaca_eval", "win_rate"),
    "real_toxicity": ("real_toxicity", "score"),
}
PLACE = ("kind", "dataset", "preference", "method", "model", "peft", "merge", "inputs")
COLUMNS = [
    *("table", *PLACE, "cell", "benchmark", "judge", "metric", "published", "measured", "difference"),
    *("low", "high", "interval_over", "seeds", "inside_interval", "rerun_low", "rerun_high", "inside_rerun"),
]


def read(name: str) -> list[dict[str, str]]:
    """The rows of one of the files."""
    path = config_dir() / "report" / "published" / f"{name}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def entries() -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    """Every published cell: its table, its place as the result table names it, its numbers by column."""
    found = []
    for row in read("results"):
        numbers = {column: float(row[column]) for column in NUMBERS if row[column]}
        place: dict[str, Any] = dict.fromkeys(PLACE) | {"kind": "train", "base": None}
        place |= {key: row[key] for key in ("dataset", "preference", "method", "model", "peft")}
        if row["method"] == "none":  # the unaligned base, as it was trained on
            base = {"qlora": "nf4", "lora": "bf16"}[row["peft"]]
            place |= {"kind": "baseline", "dataset": None, "preference": None, "method": None}
            place |= {"peft": base, "base": base}
        found.append((row["table"], place, numbers))
    for row in read("merges"):
        numbers = {column: float(row[column]) for column in NUMBERS if row[column]}
        inputs = [each.split("_") for each in row["inputs"].split("+")]
        methods, preferences = ("+".join(dict.fromkeys(words)) for words in zip(*inputs, strict=True))
        place = {"kind": "merge", "base": None, "dataset": "beavertails", "peft": "qlora", "model": row["model"]}
        place |= {"method": methods, "preference": preferences, "merge": row["merge"], "inputs": row["inputs"]}
        found.append((row["table"], place, numbers))
    return found


def as_table(space: ConfigSpace) -> tuple[Frame, list[Row]]:
    """The published numbers as the table of a sweep with one value a cell and no seeds."""
    ids: dict[tuple[Any, ...], str] = {}  # of the runs that merges are made from
    runs, rows = [], []
    for table, place, numbers in entries():
        place |= {"base": place["base"] or {"qlora": "nf4", "lora": "bf16"}[place["peft"]]}
        run_id = "-".join(["published", table, *(str(place[key]) for key in PLACE[1:] if place[key])])
        ids[tuple(place[key] for key in MAIN_AXES)] = run_id
        parents: tuple[str, ...] = ()
        if place["kind"] == "merge":
            inputs = (each.split("_") for each in place["inputs"].split("+"))
            parents = tuple(ids[place["dataset"], p, m, place["model"], place["peft"]] for m, p in inputs)
        step = 0 if place["kind"] == "baseline" else STEPS
        steps = {NUMBERS[column][0]: (step,) for column in numbers}
        choices = {key: place[key] for key in (*MAIN_AXES, "merge") if place[key]}
        axes = choices | ({"inputs": place["inputs"]} if place["inputs"] else {})
        runs.append(Planned(run_id, place["kind"], place["base"], parents, False, choices, axes, {}, steps))
        for column, number in numbers.items():
            benchmark, metric = NUMBERS[column]
            own = {"run_id": run_id, "step": step, "benchmark": benchmark, "metric": metric, "value": number}
            rows.append(place | own | {"higher_is_better": True})
    loaded = {name: space.load("model", name) for name in dict.fromkeys(run.choices["model"] for run in runs)}
    told = ("tuned_from", "instruction_tuned")
    models = {name: {key: model.get(key) for key in told} for name, model in loaded.items()}
    metrics = {benchmark: (metric,) for benchmark, metric in NUMBERS.values()}
    frame = Frame(NAME, (*MAIN_AXES, "merge", "inputs"), tuple(runs), metrics, models)
    return frame, [dict.fromkeys(columns(frame)) | row for row in rows]


def as_results(space: ConfigSpace) -> Results:
    """The published numbers as the results of a sweep."""
    frame, rows = as_table(space)
    return gather(frame, columns(frame), rows)


def beside(results: Results) -> list[Row]:
    """Every published number with the sweep's own of the same cell: rows of published.csv.

    `inside_interval` says whether the published number lies in the 95% interval of the sweep's mean. Theirs is the
    mean of five seeds too: `rerun_low` to `rerun_high` is where such a mean of five new seeds would lie in 95% of the
    cases if both were runs of one and the same (a prediction interval: Patil, Peng and Leek 2016).
    """
    wanted = [m for m in results.values if any(_is(m, column) for column in NUMBERS)]
    ours: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells(results, wanted):
        if cell.last:
            ours.setdefault(_key(cell.place), []).append(cell)
    rows = []
    for table, place, numbers in entries():
        for column, number in numbers.items():
            own: Row = {"table": table} | {key: place[key] for key in PLACE}
            own |= {"benchmark": NUMBERS[column][0], "metric": NUMBERS[column][1], "published": number}
            found = [cell for cell in ours.get(_key(place), []) if _is(cell.measure, column)]
            rows += [dict.fromkeys(COLUMNS) | own | _measured(results, cell, number) for cell in found]
            if not found:
                rows.append(dict.fromkeys(COLUMNS) | own | {"seeds": 0})
    return rows


def _is(measure: Measure, column: str) -> bool:
    return (measure.benchmark, plain(measure.metric)) == NUMBERS[column]


def _key(place: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two cells the same; an unaligned base is its model and precision."""
    if place["kind"] == "baseline":
        return place["kind"], place["model"], place["base"]
    return tuple(place.get(key) for key in PLACE)


def _measured(results: Results, cell: Cell, number: float) -> Row:
    mean = cell.score
    more = [axis for axis in results.axes if axis not in PLACE and cell.place.get(axis) is not None]
    row: Row = {"cell": " ".join(f"{axis}={cell.place[axis]}" for axis in more) or None, "judge": cell.measure.judge}
    row |= {"measured": mean.mean, "difference": mean.mean - number, "low": mean.low, "high": mean.high}
    row |= {"interval_over": mean.basis or None, "seeds": mean.seeds}
    row |= {"inside_interval": None if mean.low is None or mean.high is None else mean.low <= number <= mean.high}
    if mean.basis == "seeds" and mean.high is not None:
        error = (mean.high - mean.mean) / t_quantile(mean.seeds - 1) * math.sqrt(mean.seeds)
        half = t_quantile(mean.seeds - 1) * error * math.sqrt(1 / mean.seeds + 1 / SEEDS)
        row |= {"rerun_low": mean.mean - half, "rerun_high": mean.mean + half}
        row |= {"inside_rerun": abs(number - mean.mean) <= half}
    return row


def summary(rows: Sequence[Row]) -> str:
    """How many published numbers were measured, and how many of them fit; without rows: nothing is beside them."""
    if not rows:
        return "these are the published numbers, so that there is nothing to set them against"
    measured = [row for row in rows if row["measured"] is not None]
    if not measured:
        return f"of the {len(rows)} published numbers none is measured"
    text = f"of the {len(rows)} published numbers {len(measured)} are measured"
    judged = [row for row in measured if row["inside_interval"] is not None]
    rerun = [row for row in measured if row["inside_rerun"] is not None]
    if judged:
        text += f", {sum(row['inside_interval'] for row in judged)} of {len(judged)} inside the 95% interval"
    if rerun:
        text += f", {sum(row['inside_rerun'] for row in rerun)} of {len(rerun)} inside that of a rerun"
    return text
