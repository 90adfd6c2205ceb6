"""Which cells no other beats on both sides of the trade-off, and which axis moves a score how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_align.reporting.cells import Cell, Measure, Results, cells
from peft_align.reporting.resampling import front_probability, on_front
from peft_align.reporting.table import Row
from peft_align.reporting.variance import shares

VARIANCE = ["benchmark", "judge", "metric", "term", "df", "sum_of_squares", "share", "f", "p", "runs"]


def front_columns(results: Results) -> list[str]:
    """Columns of front.csv; `run_id` where a cell is one run."""
    names = ["among", "kind", *results.axes, "base", "first", "first_judge", "second", "second_judge"]
    return [*names, "first_mean", "second_mean", "on_front", "probability", "cells", "seeds", "run_id"]


def fronts(results: Results, sides: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows of front.csv: each benchmark of one side against each of every other, among all cells and by model."""
    names = list(sides)
    pairs = [
        (a, b) for i, one in enumerate(names) for other in names[i + 1 :] for a in sides[one] for b in sides[other]
    ]
    rows: list[Row] = []
    for one, other in pairs:
        for first in results.measures(one):
            for second in results.measures(other):
                rows += _front(results, first, second)
    return rows


def _front(results: Results, first: Measure, second: Measure) -> list[Row]:
    axes = ("kind", "base", *results.axes)
    by_place: dict[tuple[Any, ...], dict[Measure, Cell]] = {}
    for cell in cells(results, (first, second)):
        if cell.last:
            by_place.setdefault(tuple(cell.place.get(axis) for axis in axes), {})[cell.measure] = cell
    both = [found for found in by_place.values() if len(found) == 2]
    models = list(dict.fromkeys(found[first].place["model"] for found in both))
    groups = {"all": both} if len(models) != 1 else {}
    groups |= {str(m): [found for found in both if found[first].place["model"] == m] for m in models}
    signs = [-1.0 if results.better.get(measure) is False else 1.0 for measure in (first, second)]
    rows: list[Row] = []
    for among, members in groups.items():
        if len(members) < 2:
            continue
        seeded = []
        for found in members:
            one, other = found[first].by_seed, found[second].by_seed
            seeded.append([[signs[0] * one[s], signs[1] * other[s]] for s in one if s in other])
        kept = [(found, values) for found, values in zip(members, seeded, strict=True) if values]
        means = [[sum(column) / len(values) for column in zip(*values, strict=True)] for _, values in kept]
        several = any(len(values) > 1 for _, values in kept)
        probable = front_probability([values for _, values in kept]) if several else [None] * len(kept)
        for (found, values), mean, is_on, p in zip(kept, means, on_front(means), probable, strict=True):
            row: Row = {axis: found[first].place.get(axis) for axis in axes} | {"among": among}
            row |= {"first": f"{first.benchmark} {first.metric}", "first_judge": first.judge}
            row |= {"second": f"{second.benchmark} {second.metric}", "second_judge": second.judge}
            row |= {"first_mean": signs[0] * mean[0], "second_mean": signs[1] * mean[1], "on_front": is_on}
            only = found[first].run_id if found[first].run_id == found[second].run_id else None
            rows.append(row | {"probability": p, "cells": len(kept), "seeds": len(values), "run_id": only})
    return rows


def variance_rows(results: Results) -> list[Row]:
    """Rows of variance.csv: the training runs' last steps, by the axes that vary."""
    rows: list[Row] = []
    for measure in results.main:
        values = [v for v in results.values[measure] if v.place["kind"] == "train" and v.last]
        for share in shares([v.place for v in values], [v.value for v in values], results.axes):
            row: Row = {"benchmark": measure.benchmark, "judge": measure.judge, "metric": measure.metric}
            row |= {"term": share.term, "df": share.df, "sum_of_squares": share.squares, "share": share.share}
            rows.append(row | {"f": share.f, "p": share.p, "runs": share.runs})
    return rows
