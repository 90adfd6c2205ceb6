"""Scores against the number of samples, rank and alpha, over pairs of axes, and the shares of their variance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from peft_align.reporting.cells import VALIDATION, Measure, Results, Value, cells, plain
from peft_align.reporting.charts.common import (
    BLUE,
    Figure,
    Spec,
    bare,
    by_measure,
    direction,
    following,
    layered,
    plain_text,
    select,
    step,
    titles_of,
    top,
    wrapped,
)  # fmt: skip
from peft_align.reporting.statistics import paired
from peft_align.reporting.table import Row

REFERENCE = 1600  # samples: what the study's figure 3 sets its scores in relation to
SETTINGS = {"rank": ("peft.r", "Rank r of the adapter"), "alpha": ("peft.alpha", "Scale alpha of the adapter")}
TERMS, LEAST = 15, 0.005  # bars of a variance's chart: how many, and the least share that one can see
APART = 0.008  # of the width: how far points of one place stand apart, so that their intervals can be seen


def sample_figures(results: Results, table: Sequence[Row]) -> list[Figure]:
    """Scores relative to those at 1600 samples, or where there are none, at the most."""
    samples = {(row["run_id"], row["step"]): row["samples"] for row in table if row.get("samples") is not None}
    rows: list[Row] = []
    kept, at = [], set()
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
    for v in values:
        if v.run_id in base and v.run_id in several:
            series = (str(v.place["method"]), str(v.place["model"]), samples[v.run_id, v.step])
            cell = groups.setdefault(series, {}).setdefault(repr(sorted(v.place.items(), key=str)), [])
            cell.append(100 * (v.value / base[v.run_id] - 1))
    return [_point(series, of, "samples") for series, of in sorted(groups.items())], reference


def setting_figures(results: Results, table: Sequence[Row]) -> list[Figure]:
    """Scores against rank and alpha, also those on the validation split, where a search is scored."""
    figures = []
    for name, (key, words) in SETTINGS.items():
        rows: list[Row] = []
        measures: list[tuple[Measure, bool | None]] = []
        for measure, better, own in _last(results, table):
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


def heat_figures(results: Results) -> list[Figure]:
    """Mean scores over two axes, which are chosen on the page; a file has the first two."""
    axes = [axis for axis in results.varying() if axis not in ("merge", "inputs")]
    if len(axes) < 2:
        return []
    keys, titles = titles_of(results, [m for m in results.main if results.values.get(m)])
    rows: list[Row] = []
    for cell in cells(results, keys):
        if cell.last and cell.place["kind"] == "train":
            own = {f"a{i}": wrapped(str(cell.place.get(axis)), 14) for i, axis in enumerate(axes)}
            rows.append(own | {"measure": keys[cell.measure], "mean": cell.score.mean})
    told = {row["measure"] for row in rows}
    titles = {key: words for key, words in titles.items() if key in told}
    if not rows:
        return []
    names = {f"a{i}": plain_text(axis) for i, axis in enumerate(axes)}
    values = {key: len({row[key] for row in rows}) for key in names}
    down = "a2" if names.get("a2") == "method" else "a0"
    across = max((key for key in names if key != down), key=lambda key: (names[key] == "model", values[key]))
    params = [
        *([select("measure", "Measure", titles)] if len(titles) > 1 else []),
        *(select("down", "Rows", names, down), select("across", "Columns", names, across)),
        *({"name": "titles", "value": titles}, {"name": "names", "value": names}),
    ]
    page = _heat("@down", "@across", "datum[down]", "datum[across]")
    page = following(following(page, "names[down]", "@down"), "names[across]", "@across")
    only = next(iter(titles))
    page["title"] = {"text": {"expr": "titles[measure]"} if len(titles) > 1 else titles[only], "fontSize": 12}
    if len(titles) > 1:
        page["transform"] = [{"filter": "datum.measure == measure"}, *page["transform"]]
    panels = []
    for key, words in titles.items():
        panel = _heat(names[down], names[across], f"datum.{down}", f"datum.{across}")
        panel["transform"] = [{"filter": {"field": "measure", "equal": key}}, *panel["transform"]]
        panels.append(panel | {"width": 300, "title": {"text": words, "fontSize": 12}})
    sheet: Spec = {"columns": 2, "concat": panels, "resolve": {"scale": {"color": "independent"}}, "spacing": 40}
    caption = (
        "Mean of the cells' means at the last step, over two axes; lighter is higher. What is not there is blank, and "
        f"means over unequal sets of cells are not alike in all else: compare by the paired differences. "
        f"{len(rows)} cell means."
    )
    data = {"rows": rows}
    page_spec = top(page | {"params": params}, data, "container")
    return [Figure("heat", "curves", "Scores over two axes", caption, page_spec, top(sheet, data))]


def _heat(down: str, across: str, row: str, column: str) -> Spec:
    tooltip = [
        *(alt.Tooltip("row:N", title="row"), alt.Tooltip("column:N", title="column")),
        *(alt.Tooltip("score:Q", title="mean", format=".4~g"), alt.Tooltip("cells:Q")),
    ]
    base = alt.Chart().encode(
        y=alt.Y("row:N", title=down), x=alt.X("column:N", title=across, axis=alt.Axis(labelAngle=-35)), tooltip=tooltip
    )
    shade = alt.Color("shade:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), legend=None)
    dark = {"condition": {"test": "datum.shade > 0.6", "value": "#000"}, "value": "#fff"}  # on the cells' own colours
    text = base.mark_text(fontSize=11).encode(text=alt.Text("score:Q", format=".3~g"))
    spec = alt.layer(base.mark_rect().encode(color=shade), text, data=alt.NamedData("rows")).to_dict()
    spec["layer"][1]["encoding"]["color"] = dark
    spec["transform"] = [
        {"calculate": row, "as": "row"},
        {"calculate": column, "as": "column"},
        {
            "aggregate": [{"op": "mean", "field": "mean", "as": "score"}, {"op": "count", "as": "cells"}],
            "groupby": ["row", "column"],
        },
        {
            "joinaggregate": [
                {"op": "min", "field": "score", "as": "least"},
                {"op": "max", "field": "score", "as": "most"},
            ]
        },
        {
            "calculate": "datum.most > datum.least ? (datum.score - datum.least) / (datum.most - datum.least) : 1",
            "as": "shade",
        },
    ]
    return bare(spec) | {"height": {"step": 40}}


def variance_figures(results: Results, variance: Sequence[Row]) -> list[Figure]:
    """Bars of variance.csv, the largest terms of each measure."""
    if not variance:
        return []
    measures = list(dict.fromkeys(Measure(r["benchmark"], r["metric"], r["judge"]) for r in variance))
    keys, _ = titles_of(results, measures)
    titles = {key: f"Share of the variance of {plain_text(measure)}" for measure, key in keys.items()}
    rows: list[Row] = []
    for measure, key in keys.items():
        own = [r for r in variance if Measure(r["benchmark"], r["metric"], r["judge"]) == measure]
        for r in sorted((r for r in own if r["share"] >= LEAST), key=lambda r: -r["share"])[:TERMS]:
            row: Row = {"measure": key, "label": wrapped(r["term"]), "name": plain_text(r["term"])}
            rows.append(row | {"share": r["share"], "df": r["df"], "p": r["p"], "runs": r["runs"]})
    runs = sorted({row["runs"] for row in rows})
    caption = (
        "Shares of the variance of training runs' last scores by axis, by two axes together and by seed (sums of "
        f"squares of type II); of {' to '.join(map(str, runs if len(runs) < 3 else (runs[0], runs[-1])))} runs. "
        f"Of each measure the {TERMS} largest terms at most, none below {LEAST:.1%}."
    )

    def build(title: str) -> alt.LayerChart:
        tooltip = [
            *(alt.Tooltip("name:N", title="term"), alt.Tooltip("share:Q", format=".1%")),
            *(alt.Tooltip("df:Q"), alt.Tooltip("p:Q", format=".2~g"), alt.Tooltip("runs:Q")),
        ]
        bars = alt.Chart().mark_bar(color=BLUE).encode(
            y=alt.Y("label:N", sort=alt.EncodingSortField("share", op="max", order="descending"), title="Term"),
            x=alt.X("share:Q", title=title, axis=alt.Axis(format="%")),
            tooltip=tooltip,
        )  # fmt: skip
        return layered(bars, height=step(rows))

    return [by_measure("variance", "curves", "What moves the scores", caption, build, rows, titles)]
