"""Scores against the number of samples, and against the rank and alpha of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from peft_align.reporting.cells import VALIDATION, Measure, Results, Value, plain
from peft_align.reporting.charts.common import Figure, Spec, by_measure, direction, layered, plain_text, titles_of
from peft_align.reporting.statistics import paired
from peft_align.reporting.table import Row

REFERENCE = 1600  # samples: what the study's figure 3 sets its scores in relation to
SETTINGS = {"rank": ("peft.r", "Rank r of the adapter"), "alpha": ("peft.alpha", "Scale alpha of the adapter")}
APART = 0.008  # of the width: how far points of one place stand apart, so that their intervals can be seen


def sample_figures(results: Results, table: Sequence[Row]) -> list[Figure]:
    """Scores relative to those at 1600 samples, or where there are none, at the most."""
    samples = {(row["run_id"], row["step"]): row["samples"] for row in table if row.get("samples") is not None}
    rows: list[Row] = []
    kept: list[Measure] = []
    at: set[int] = set()
    for measure in results.main:
        own = [v for v in results.values[measure] if v.place["kind"] == "train" and (v.run_id, v.step) in samples]
        drawn, reference = relative_rows(own, samples)
        if drawn:
            kept.append(measure)
            at.add(reference)
            rows += [row | {"measure": measure} for row in drawn]
    if not rows:
        return []
    keys, _ = titles_of(results, kept)
    titles = {keys[m]: f"{plain_text(m)}, change in %{direction(results.better.get(m))}" for m in kept}
    rows = _side_by_side([row | {"measure": keys[row["measure"]]} for row in rows], "samples")
    caption = (
        f"Scores of training runs relative to those of the same run at {' or '.join(map(str, sorted(at)))} samples, "
        f"mean over cells, by method and model, with 95% t intervals over seeds within cells "
        f"({len({v.run_id for m in kept for v in results.values[m] if v.place['kind'] == 'train'})} runs)."
    )
    build = lambda title: _lines(rows, "samples", "Samples trained on", title, ".0f")  # noqa: E731
    return [by_measure("samples", "curves", "Scores against the number of samples", caption, build, rows, titles)]


def relative_rows(values: Sequence[Value], samples: Mapping[tuple[str, int], int]) -> tuple[list[Row], int]:
    """Changes in percent from the reference, and the reference in samples; nothing where only one number was measured.

    Runs whose score there is zero or below have no relative score and are left out.
    """
    known = {samples[v.run_id, v.step] for v in values}
    if len(known) < 2:
        return [], 0
    reference = REFERENCE if REFERENCE in known else max(known)
    base = {v.run_id: v.value for v in values if samples[v.run_id, v.step] == reference and v.value > 0}
    several = {v.run_id for v in values if samples[v.run_id, v.step] != reference}
    groups: dict[tuple[str, str, int], dict[Any, list[float]]] = {}
    cells: dict[int, str] = {}  # the steps of a run share its place
    for v in values:
        if v.run_id in base and v.run_id in several:
            series = (str(v.place["method"]), str(v.place["model"]), samples[v.run_id, v.step])
            if id(v.place) not in cells:
                cells[id(v.place)] = repr(sorted(v.place.items(), key=str))
            own = groups.setdefault(series, {}).setdefault(cells[id(v.place)], [])
            own.append(100 * (v.value / base[v.run_id] - 1))
    return [_point(series, of, "samples") for series, of in sorted(groups.items())], reference


def setting_figures(results: Results, table: Sequence[Row]) -> list[Figure]:
    """Scores against rank and alpha, also those on the validation split, where a search is scored."""
    figures = []
    for name, (key, words) in SETTINGS.items():
        rows: list[Row] = []
        measures: list[tuple[Measure, bool | None]] = []
        for measure, better, own in _last(results, table) if table and key in table[0] else ():
            drawn = setting_rows(own, key)
            if drawn:
                rows += [row | {"measure": f"m{len(measures)}"} for row in drawn]
                measures.append((measure, better))
        if not rows:
            continue
        rows = _side_by_side(rows, "x")
        titles = {f"m{i}": f"{plain_text(m)}{direction(better)}" for i, (m, better) in enumerate(measures)}
        caption = (
            f"Scores at the last step against {key}, mean over cells, by method and model, with 95% t intervals over "
            f"seeds within cells (none where a point has too few seeds); {sum(row['runs'] for row in rows)} values."
        )
        build = lambda title, rows=rows, words=words: _lines(rows, "x", words, title, ".3~g")  # noqa: E731
        figures.append(by_measure(name, "curves", f"Scores against {key}", caption, build, rows, titles))
    return figures


def _last(results: Results, table: Sequence[Row]) -> Iterable[tuple[Measure, bool | None, list[Row]]]:
    """The rows of training runs' last steps by measure: the main ones, and their like on the validation split."""
    main = {(m.benchmark, plain(m.metric), m.judge) for m in results.main}
    first: dict[str, str] = {}
    groups: dict[Measure, dict[tuple[Any, ...], Row]] = {}
    for row in table:
        if row["kind"] != "train" or row["value"] is None or row["higher_is_better"] is None:
            continue
        benchmark, metric = str(row["benchmark"]), plain(str(row["metric"]))
        alone = benchmark.removesuffix(VALIDATION)
        if benchmark.endswith(VALIDATION):  # its main metric is that of the test split, or its first
            named = [m for b, m, _ in main if b == alone] or [first.setdefault(benchmark, metric)]
            wanted = metric in named
        else:
            wanted = (benchmark, metric, row["judge"]) in main
        if wanted:
            own = groups.setdefault(Measure(benchmark, str(row["metric"]), row["judge"]), {})
            at = (row["run_id"], row["dataset"], row["preference"])
            if at not in own or row["step"] >= own[at]["step"]:
                own[at] = row
    for measure, of in groups.items():
        rows = list(of.values())
        yield measure, rows[0]["higher_is_better"], rows


def setting_rows(rows: Sequence[Row], key: str) -> list[Row]:
    """Means by method, model and the setting; nothing where a method has but one value of it."""
    groups: dict[tuple[str, str, Any], dict[Any, list[float]]] = {}
    for row in rows:
        if isinstance(row.get(key), (int, float)):
            cell = repr([(k, v) for k, v in row.items() if k in ("dataset", "preference", "peft", "base") or "." in k])
            groups.setdefault((str(row["method"]), str(row["model"]), row[key]), {}).setdefault(cell, []).append(
                row["value"]
            )
    lines: dict[tuple[str, str], set[Any]] = {}
    for method, model, x in groups:
        lines.setdefault((method, model), set()).add(x)
    kept = {series: of for series, of in groups.items() if len(lines[series[:2]]) > 1}
    return [_point(series, of, "x") for series, of in sorted(kept.items())]


def _point(series: tuple[str, str, Any], of: Mapping[Any, Sequence[float]], field: str) -> Row:
    effect = paired(of)
    row: Row = {"method": plain_text(series[0]), "model": plain_text(series[1]), field: series[2]}
    row |= {"value": effect.value, "low": effect.low, "high": effect.high, "cells": effect.cells}
    return row | {"runs": sum(map(len, of.values()))}


def _doubling(rows: Sequence[Row], field: str) -> bool:
    """Whether values are spread as powers of two, so that a plain scale would press the small ones together."""
    least, most = min(row[field] for row in rows), max(row[field] for row in rows)
    return bool(least > 0 and most >= 8 * least and field == "x")


def _side_by_side(rows: list[Row], field: str) -> list[Row]:
    """The rows with where they are drawn: each method and model a little beside the others."""
    series = sorted({(row["method"], row["model"]) for row in rows})
    least, most = min(row[field] for row in rows), max(row[field] for row in rows)
    found = []
    for row in rows:
        aside = APART * (series.index((row["method"], row["model"])) - (len(series) - 1) / 2)
        doubling = _doubling(rows, field)
        at = row[field] * (most / least) ** aside if doubling else row[field] + (most - least) * aside
        found.append(row | {"at": at})
    return found


def _lines(rows: Sequence[Row], field: str, words: str, title: str, number: str) -> alt.LayerChart:
    tooltip = [
        *(alt.Tooltip("method:N"), alt.Tooltip("model:N"), alt.Tooltip(f"{field}:Q", title=words)),
        *(alt.Tooltip("value:Q", format=".4~g"), alt.Tooltip("low:Q", format=".4~g")),
        *(alt.Tooltip("high:Q", format=".4~g"), alt.Tooltip("cells:Q"), alt.Tooltip("runs:Q")),
    ]
    scale: Spec = {"zero": False, "nice": False, "padding": 16}
    scale |= {"type": "log", "base": 2} if _doubling(rows, field) else {}
    ticks = alt.Axis(values=sorted({row[field] for row in rows}), format=number, labelOverlap=True)
    base = alt.Chart().encode(
        x=alt.X("at:Q", title=words, axis=ticks, scale=alt.Scale(**scale)),
        color=alt.Color("model:N", title="Model"),
        tooltip=tooltip,
    )
    score = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    lines = base.mark_line(strokeWidth=1.5).encode(y=score, strokeDash=alt.StrokeDash("method:N", legend=None))
    bars = base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", title=title, scale=alt.Scale(zero=False)), y2="high:Q")
    points = base.mark_point(filled=True, size=45, opacity=1).encode(
        y=score, shape=alt.Shape("method:N", title="Method")
    )
    return layered(lines, bars, points, height=260)
