"""What the axes do: scores over two axes, and the shares of the scores' variance."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from peft_align.reporting.cells import Measure, Results, cells
from peft_align.reporting.charts.common import (
    BLUE,
    CHOSEN,
    Figure,
    Spec,
    bare,
    by_measure,
    following,
    layered,
    plain_text,
    select,
    step,
    titles_of,
    top,
    wrapped,
)
from peft_align.reporting.table import Row

TERMS, LEAST = 15, 0.005  # bars of a variance's chart: how many, and the least share that one can see


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
    down = next((key for key, axis in names.items() if axis == "method"), "a0")
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
        page["transform"] = [{"filter": CHOSEN}, *page["transform"]]
    panels = []
    for key, words in titles.items():
        panel = _heat(names[down], names[across], f"datum.{down}", f"datum.{across}")
        panel["transform"] = [{"filter": {"field": "measure", "equal": key}}, *panel["transform"]]
        panels.append(panel | {"width": 300, "title": {"text": words, "fontSize": 12}})
    sheet: Spec = {"columns": 2, "concat": panels, "resolve": {"scale": {"color": "independent"}}, "spacing": 40}
    caption = (
        "Mean of the cells' means at the last step, over two axes; lighter is higher. What is not there is blank, and "
        "means over unequal sets of cells are not alike in all else: compare by the paired differences. "
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
    spec = alt.layer(base.mark_rect().encode(color=shade), text, data=alt.NamedData("rows")).to_dict(validate=False)
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
    titles = {key: f"Share of variance: {plain_text(measure)}" for measure, key in keys.items()}
    rows: list[Row] = []
    for measure, key in keys.items():
        own = [r for r in variance if Measure(r["benchmark"], r["metric"], r["judge"]) == measure]
        for r in sorted((r for r in own if r["share"] >= LEAST), key=lambda r: -r["share"])[:TERMS]:
            row: Row = {"measure": key, "label": wrapped(r["term"]), "name": plain_text(r["term"])}
            rows.append(row | {"share": r["share"], "df": r["df"], "p": r["p"], "runs": r["runs"]})
    runs = sorted({row["runs"] for row in rows})
    caption = (
        "Shares of the variance of training runs' last scores by axis, by two axes together and by seed (sums "
        f"of squares of type II); of {' to '.join(map(str, runs if len(runs) < 3 else (runs[0], runs[-1])))} runs. "
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
