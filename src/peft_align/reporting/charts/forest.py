"""Forest plots: paired differences, and the parts of claims, with their intervals; a figure for each measure."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from peft_align.reporting.cells import Measure, Results, plain
from peft_align.reporting.charts.common import (
    BLUE,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    PINK,
    Figure,
    Spec,
    direction,
    distinct,
    figure,
    layered,
    plain_text,
    select,
    slugs,
    step,
    wrapped,
)  # fmt: skip
from peft_align.reporting.claims import CONTRADICTED, SUPPORTED, UNDECIDED, Verdict
from peft_align.reporting.comparisons import NO_SPREAD, TOO_FEW, Compared, part_words
from peft_align.reporting.table import Row

BETTER, WORSE, HIGHER, LOWER, NOT_SHOWN = "better", "worse", "higher", "lower", "no difference shown"
RESULTS = {BETTER: BLUE, WORSE: ORANGE, HIGHER: GREEN, LOWER: PINK, NOT_SHOWN: GREY, NO_SPREAD: GREY}
SHAPES = dict(zip(RESULTS, ("circle", "square", "triangle-up", "triangle-down", "cross", "diamond"), strict=True))
VERDICTS = {SUPPORTED: BLUE, CONTRADICTED: ORANGE, UNDECIDED: GREY}
OURS, THEIRS = "this sweep", "published tables"
ORDER: Spec = select("order", "Order", {"by_name": "by name", "by_effect": "by difference"})


def comparison_figures(found: Sequence[Compared]) -> list[Figure]:
    """The paired differences of comparisons.csv, those that could be tested."""
    told: dict[Measure, list[Compared]] = {}
    for one in found:
        told.setdefault(one.measure, []).append(one)
    told = {measure: own for measure, own in told.items() if any(one.result != TOO_FEW for one in own)}
    figures = []
    for name, (measure, own) in zip(slugs("comparisons", list(told)), told.items(), strict=True):
        rows = comparison_rows(own)
        title = f"Difference in {plain_text(measure)}{direction(own[0].higher_is_better)}"
        lacking = len(own) - len(rows)
        caption = (
            "Mean differences over cells that are equal in all else, the seed included, with 95% t intervals. "
            "In colour: shown after Holm's correction for all comparisons of the sweep. "
            f"{len(rows)} drawn, each of as many pairs of cells and runs as its tooltip says; "
            f"{lacking} not drawn for want of runs."
        )
        drawn = figure(
            name, "comparisons", f"Paired differences: {plain_text(measure)}", caption, _forest(rows, title), rows
        )
        figures.append(_orderable(drawn))
    return figures


def comparison_rows(compared: Sequence[Compared]) -> list[Row]:
    """What is drawn of one measure: all but what there are not enough runs for."""
    kept = sorted(
        (one for one in compared if one.result != TOO_FEW), key=lambda one: (one.contrast.name, str(one.part))
    )
    names = [one.contrast.name + (f" ({part_words(one.part)})" if one.part else "") for one in kept]
    by_effect = sorted(range(len(kept)), key=lambda i: -(kept[i].effect.value or 0.0))
    rows: list[Row] = []
    for i, (one, label) in enumerate(zip(kept, distinct([wrapped(name) for name in names]), strict=True)):
        effect = one.effect
        row: Row = {"label": label, "name": plain_text(names[i]), "contrast": plain_text(one.contrast)}
        row |= {"effect": effect.value, "low": effect.low, "high": effect.high, "result": _result(one)}
        row |= {"cells": effect.cells, "runs": one.runs, "seeds": _seeds(one), "p": one.p_holm}
        rows.append(row | {"by_name": i, "by_effect": by_effect.index(i), "interval_over": effect.basis or "-"})
    return rows


def _result(one: Compared) -> str:
    """The result in terms of better and worse, where that is known."""
    if one.result not in (HIGHER, LOWER) or one.higher_is_better is None:
        return one.result
    return BETTER if (one.result == HIGHER) == one.higher_is_better else WORSE


def _seeds(one: Compared) -> str:
    few, most = one.effect.seeds
    return str(few) if few == most else f"{few} to {most}"


def _forest(rows: Sequence[Row], title: str) -> alt.LayerChart:
    told = [result for result in RESULTS if any(row["result"] == result for row in rows)]
    colour = alt.Color("result:N", title=None, scale=alt.Scale(domain=told, range=[RESULTS[r] for r in told]))
    shape = alt.Shape("result:N", title=None, scale=alt.Scale(domain=told, range=[SHAPES[r] for r in told]))
    tooltip = [
        *(alt.Tooltip("name:N", title="comparison"), alt.Tooltip("contrast:N"), alt.Tooltip("result:N")),
        *(alt.Tooltip("effect:Q", format="+.4~g"), alt.Tooltip("low:Q", format=".4~g")),
        *(alt.Tooltip("high:Q", format=".4~g"), alt.Tooltip("p:Q", title="p (Holm)", format=".2~g")),
        *(alt.Tooltip("cells:Q", title="pairs of cells"), alt.Tooltip("seeds:N"), alt.Tooltip("runs:Q")),
        alt.Tooltip("interval_over:N", title="interval over"),
    ]
    base = alt.Chart().encode(
        y=alt.Y("label:N", sort=alt.EncodingSortField("place", op="min"), title="Comparison"), tooltip=tooltip
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q", color=colour)
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        x=alt.X("effect:Q", title=title), color=colour, shape=shape
    )
    return layered(_zero(title), bars, points, height=step(rows))


def _zero(title: str) -> alt.Chart:
    line: alt.Chart = alt.Chart().mark_rule(strokeDash=[4, 3]).encode(x=alt.XDatum(0, title=title))
    return line


def _orderable(drawn: Figure) -> Figure:
    """The page's form with an order to choose."""
    spec = drawn.spec | {"params": [ORDER], "transform": [{"calculate": "datum[order]", "as": "place"}]}
    sheet = drawn.filed | {"transform": [{"calculate": "datum.by_name", "as": "place"}]}
    return Figure(drawn.name, drawn.section, drawn.title, drawn.caption, spec, sheet)


def claim_figures(results: Results, ours: Sequence[Verdict], theirs: Sequence[Verdict]) -> list[Figure]:
    """The parts of the claims on the measures that the sweep has, ours beside those of the published tables.

    Without `theirs`, ours are the published tables'.
    """
    measures = list(
        dict.fromkeys(p.compared.measure for v in ours for p in v.parts if p.compared.effect.value is not None)
    )
    figures = []
    for name, measure in zip(slugs("claims", measures), measures, strict=True):
        own = claim_rows(measure, ours, OURS if theirs else THEIRS)
        lacking = sum(p.compared.measure == measure and p.verdict == TOO_FEW for v in ours for p in v.parts)
        if not own:
            continue
        rows = own + claim_rows(measure, theirs, THEIRS)
        title = f"Difference in {plain_text(measure)}{direction(results.better.get(measure))}"
        caption = (
            "Parts of the claims: mean paired differences with 95% t intervals, coloured by what the interval alone "
            "says of the part (a claim's verdict takes all of its parts). Published tables: one value a cell, "
            f"intervals over cells. {len(own)} parts{' of this sweep' if theirs else ''} drawn; {lacking} not, "
            "for want of runs."
        )
        of = f"Parts of claims: {plain_text(measure)}"
        figures.append(figure(name, "claims", of, caption, _parts(rows, title), rows))
    return figures


def claim_rows(measure: Measure, verdicts: Sequence[Verdict], results: str) -> list[Row]:
    """The parts of one measure that could be tested."""
    rows: list[Row] = []
    for verdict in verdicts:
        for part in verdict.parts:
            one = part.compared
            same = (one.measure.benchmark, plain(one.measure.metric)) == (measure.benchmark, plain(measure.metric))
            if part.verdict == TOO_FEW or not (one.measure == measure or (results == THEIRS and same)):
                continue
            within = f" ({part_words(one.part)})" if one.part else ""
            expected = (one.contrast.expect or "").replace("_", " ")
            name = f"{verdict.claim.name}: {one.contrast}{within}, expected {expected}"
            row: Row = {"label": wrapped(name, 34), "name": plain_text(name), "claim": plain_text(verdict.claim.says)}
            row |= {"results": results, "verdict": part.verdict, "effect": one.effect.value, "low": one.effect.low}
            row |= {"high": one.effect.high, "cells": one.effect.cells, "seeds": _seeds(one), "runs": one.runs}
            rows.append(row)
    labels = distinct([row["label"] for row in rows])
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


def _parts(rows: Sequence[Row], title: str) -> alt.LayerChart:
    told = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    colour = alt.Color("verdict:N", title=None, scale=alt.Scale(domain=told, range=[VERDICTS[v] for v in told]))
    sources = [source for source in (OURS, THEIRS) if any(row["results"] == source for row in rows)]
    shapes = alt.Scale(domain=sources, range=["circle", "diamond"][: len(sources)])
    tooltip = [
        *(
            alt.Tooltip("claim:N"),
            alt.Tooltip("name:N", title="part"),
            alt.Tooltip("results:N"),
            alt.Tooltip("verdict:N"),
        ),
        *(alt.Tooltip("effect:Q", format="+.4~g"), alt.Tooltip("low:Q", format=".4~g")),
        *(alt.Tooltip("high:Q", format=".4~g"), alt.Tooltip("cells:Q", title="pairs of cells")),
        *(alt.Tooltip("seeds:N"), alt.Tooltip("runs:Q")),
    ]
    base = alt.Chart().encode(
        y=alt.Y("label:N", sort=None, title="Claim and contrast"),
        yOffset=alt.YOffset("results:N", sort=sources, scale=alt.Scale(paddingOuter=0.4)),
        color=colour,
        tooltip=tooltip,
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    points = base.mark_point(size=70, filled=True, opacity=1).encode(
        x=alt.X("effect:Q", title=title), shape=alt.Shape("results:N", title=None, scale=shapes)
    )
    lines = max(row["label"].count("\n") + 1 for row in rows)
    height = alt.Step(max(36, LINE * lines + 14), **{"for": "position"})
    return layered(_zero(title), bars, points, height=height)
