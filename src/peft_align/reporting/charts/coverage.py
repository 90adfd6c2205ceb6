"""What of the sweep is there: runs done, failed and missing, and excluded cells, for each value of each axis."""

from __future__ import annotations

import altair as alt

from peft_align.reporting.charts.common import (
    BLUE,
    GREY,
    ORANGE,
    VIOLET,
    Figure,
    figure,
    layered,
    plain_text,
    step,
    wrapped,
)
from peft_align.reporting.coverage import ALL, DONE, EXCLUDED, FAILED, MISSING, STATES, Coverage
from peft_align.reporting.table import Row

COLOURS = {DONE: BLUE, FAILED: ORANGE, MISSING: GREY, EXCLUDED: VIOLET}
REASONS = 5  # in a tooltip


def coverage_figures(coverage: Coverage) -> list[Figure]:
    """Stacked bars of the counts over every axis; nothing of a sweep without runs."""
    rows = coverage_rows(coverage)
    if not rows:
        return []
    told = [state for state in STATES if any(row["state"] == state for row in rows)]
    bars = (
        alt.Chart(alt.NamedData("rows"))
        .mark_bar()
        .encode(
            y=alt.Y("label:N", sort=alt.EncodingSortField("place", op="min"), title="Axis and value"),
            x=alt.X("runs:Q", title="Number of runs (of what is excluded: cells)", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("state:N", title="State", scale=_scale(told)),
            order=alt.Order("state_place:Q"),
            tooltip=[
                alt.Tooltip("name:N", title="axis"),
                alt.Tooltip("state:N"),
                alt.Tooltip("runs:Q"),
                alt.Tooltip("reasons:N"),
            ],
        )
    )
    chart = layered(bars, height=step(rows))
    caption = (
        "Runs by state, counted over every axis that varies: each group of bars has all runs that have the axis. "
        f"{coverage.text().splitlines()[0]}"
    )
    return [figure("coverage", "coverage", "What of the sweep is there", plain_text(caption), chart, rows)]


def _scale(states: list[str]) -> alt.Scale:
    return alt.Scale(domain=states, range=[COLOURS[state] for state in states])


def _number(value: str) -> tuple[bool, float, str]:
    """Numbers in their order, before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def coverage_rows(coverage: Coverage) -> list[Row]:
    """One for each axis, value and state that there is."""
    rows: list[Row] = []
    axes = list(dict.fromkeys(axis for axis, *_ in coverage.counts))
    places = sorted({key[:2] for key in coverage.counts}, key=lambda place: (axes.index(place[0]), _number(place[1])))
    for place, (axis, value) in enumerate(places):
        name = "all runs" if axis == ALL else f"{axis}: {value}"
        for state, runs in coverage.of(axis, value).items():
            own = [
                (n, reason)
                for (a, v, s, reason), n in coverage.counts.items()
                if (a, v, s) == (axis, value, state) and reason
            ]
            reasons = "; ".join(
                f"{n} × {plain_text(reason)}" for n, reason in sorted(own, key=lambda x: -x[0])[:REASONS]
            )
            rows.append(
                {"label": wrapped(name, 30), "name": plain_text(name), "place": place, "state": state, "runs": runs}
                | {"state_place": STATES.index(state), "reasons": reasons or "-"}
            )
    return rows
