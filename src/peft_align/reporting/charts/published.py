"""The study's tables 2 to 5 as figures: its numbers and the sweep's own of the same cells."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from peft_align.reporting.cells import Measure, Results
from peft_align.reporting.charts.common import (
    BLUE,
    ORANGE,
    Figure,
    by_measure,
    distinct,
    plain_text,
    slug,
    step,
    titles_of,
    wrapped,
)
from peft_align.reporting.published import PLACE
from peft_align.reporting.table import Row

OURS, THEIRS = "this sweep", "published"


def published_figures(results: Results, beside: Sequence[Row]) -> list[Figure]:
    """A figure for each table of which the sweep has a number."""
    figures = []
    measured = [row for row in beside if row["measured"] is not None]
    for table in sorted({str(row["table"]) for row in measured}):
        own = [row for row in measured if str(row["table"]) == table]
        measures = list(dict.fromkeys(Measure(r["benchmark"], r["metric"], r["judge"]) for r in own))
        keys, titles = titles_of(results, measures)
        titles = {key: _title(results, measure) for measure, key in keys.items()}
        rows: list[Row] = []
        for measure, key in keys.items():
            of = [r for r in own if Measure(r["benchmark"], r["metric"], r["judge"]) == measure]
            rows += [row | {"measure": key} for row in published_rows(of, _varying(own))]
        number = f"table {table}"
        caption = (
            "Means of this sweep with 95% intervals (over seeds; over items where a cell has one seed) and the numbers "
            f"of the study's {number}, means of five seeds published without a spread. "
            f"{len(own)} numbers of this sweep."
        )
        title = f"Beside the published {number}"
        build = lambda words, rows=rows: _chart(rows, words)  # noqa: E731
        figures.append(
            by_measure(f"published-table{slug(table)}", "published", title, plain_text(caption), build, rows, titles)
        )
    return figures


def _title(results: Results, measure: Measure) -> str:
    """The published numbers' metrics have no filter in their name: which way is better is said of the measured one."""
    known = [m for m in results.better if m.benchmark == measure.benchmark and m.judge == measure.judge]
    better = next((results.better[m] for m in known if m.metric.startswith(measure.metric)), None)
    words = "" if better is None else f" ({'higher' if better else 'lower'} is better)"
    return f"{plain_text(measure)}{words}"


def _varying(rows: Sequence[Row]) -> list[str]:
    return [key for key in PLACE[1:] if len({row[key] for row in rows}) > 1]


def published_rows(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Two for each number: the sweep's with its interval, and the published one."""
    names = [" ".join(str(row[key]) for key in keys if row[key]) or str(row["model"]) for row in rows]
    names = [f"unaligned {n}" if row["kind"] == "baseline" else n for row, n in zip(rows, names, strict=True)]
    if len(set(names)) < len(names):  # settings that the published tables do not tell apart
        names = [f"{name} {row['cell'] or ''}".strip() for row, name in zip(rows, names, strict=True)]
    found: list[Row] = []
    for row, name, label in zip(rows, names, distinct([wrapped(name) for name in names]), strict=True):
        both: Row = {"label": label, "name": plain_text(name), "difference": row["difference"], "seeds": row["seeds"]}
        found.append(both | {"source": OURS, "value": row["measured"], "low": row["low"], "high": row["high"]})
        found.append(both | {"source": THEIRS, "value": row["published"], "low": None, "high": None})
    return found


def _chart(rows: Sequence[Row], title: str) -> alt.LayerChart:
    colour = alt.Color("source:N", title=None, scale=alt.Scale(domain=[OURS, THEIRS], range=[BLUE, ORANGE]))
    shape = alt.Shape("source:N", title=None, scale=alt.Scale(domain=[OURS, THEIRS], range=["circle", "diamond"]))
    tooltip = [
        *(alt.Tooltip("name:N", title="cell"), alt.Tooltip("source:N"), alt.Tooltip("value:Q", format=".4~g")),
        *(alt.Tooltip("low:Q", format=".4~g"), alt.Tooltip("high:Q", format=".4~g"), alt.Tooltip("seeds:Q")),
        alt.Tooltip("difference:Q", title="this sweep − published", format="+.4~g"),
    ]
    base = alt.Chart().encode(y=alt.Y("label:N", sort=None, title="Cell"), color=colour, tooltip=tooltip)
    score = alt.Scale(zero=False)
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title, scale=score), x2="high:Q")
    points = base.mark_point(size=70, filled=True, opacity=0.9).encode(
        x=alt.X("value:Q", title=title, scale=score), shape=shape
    )
    return alt.layer(bars, points, data=alt.NamedData("rows")).properties(height=step(rows))
