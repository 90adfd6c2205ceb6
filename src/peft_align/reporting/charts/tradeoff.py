"""One side of the trade-off against the other: runs, cells with their intervals, and the front.

The page's form has the two measures to choose, what the colours tell, and the values of axes that are shown. It holds
every measure of a run in one row, by a key (m0, m1, ...), and every axis likewise (a0, a1, ...): expressions name keys
alone, never what a user called something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from peft_align.config.schema import MAIN_AXES
from peft_align.reporting.cells import Measure, Results, cells
from peft_align.reporting.charts.common import (
    GREY,
    WIDE,
    Figure,
    Spec,
    bare,
    following,
    plain_text,
    select,
    titles_of,
    top,
)  # fmt: skip
from peft_align.reporting.table import NOT_TRAINED, Row

DOTS = 1000  # runs; of more, only cells are drawn: so many dots are a cloud, and make the page slow
MOST = 24  # measures that can be chosen: the main ones first
EVERY, OWN = "all", "kind"
HEIGHT = 340
PAIRS = ("dataset", "preference")  # whose held-out pairs are scored: of a base, several
Found = dict[tuple[Any, ...], dict[tuple[Any, ...], Row]]  # rows of a run or a cell, by their pairs


def tradeoff_figures(results: Results, fronts: Sequence[Row]) -> list[Figure]:
    """Nothing where no two cells have two measures in common."""
    measures = _measures(results)
    keys, titles = titles_of(results, measures)
    axes = [axis for axis in results.varying() if axis in MAIN_AXES]
    names = {f"a{i}": axis for i, axis in enumerate(axes)}
    runs, means = run_rows(results, keys, names), cell_rows(results, keys, names)
    if len(runs) > DOTS:
        runs = []
    front = front_rows(fronts, {str(measure): key for measure, key in keys.items()}, names)
    pair = _first_pair(front, means, list(titles))
    if pair is None:
        return []
    data = {"runs": runs, "cells": means, "front": front}
    colour = next((key for name in ("model", "method") for key, axis in names.items() if axis == name), OWN)
    page = _chart("datum[first]", "datum[second]", "datum[colour]", "@first", "@second", _shown(names, front))
    page = following(following(page, "titles[first]", "@first"), "titles[second]", "@second")
    page["params"] = [
        *(select("first", "Across", titles, pair[0]), select("second", "Up", titles, pair[1])),
        select("colour", "Colour", {**names, OWN: "kind of run"}, colour),
        *(select(f"only_{key}", axis, _values(means, key)) for key, axis in names.items()),
        {"name": "titles", "value": titles},
    ]
    one, other = pair
    sides = f"datum.{one}", f"datum.{other}", f"datum.{colour}", titles[one], titles[other]
    alike = names.get(colour, "method") == "method"  # colours tell what shapes do
    sheet = _chart(*sides, _shown({}, front), (one, other), one_legend=alike)
    small = {"runs": _only(runs, pair), "cells": _only(means, pair)}
    small["front"] = [r for r in front if (r["first"], r["second"]) == pair]
    return [
        Figure(
            *("tradeoff", "tradeoff", "One side against the other", _caption(small, bool(front), len(titles))),
            *(top(page, data, "container"), top(sheet, small, WIDE)),
        )
    ]


def _caption(small: Mapping[str, Sequence[Row]], any_front: bool, measures: int) -> str:
    text = "Small dots are runs (seeds), large ones cells" if small["runs"] else f"Cells, of more than {DOTS} runs"
    text += (
        ": means at the last step with 95% intervals in both directions (over seeds; over items where a cell has one "
        f"seed). First pair: {len(small['cells'])} cells"
        + (f", {len(small['runs'])} runs. " if small["runs"] else ". ")
    )
    if any_front:
        text += (
            "The dashed line joins the cells that no other beats on both sides, among all cells, or among those of the "
            "model that is chosen; a tooltip says with which probability (bootstrap over seeds) a cell is one of them."
        )
    else:
        text += (
            "No pair of these measures stands for the two sides (conf/report/sides.yaml), so that no front is drawn."
        )
    return text + (f" {measures} measures can be set against each other." if measures > 2 else "")


def _measures(results: Results) -> list[Measure]:
    """Main ones, then others of which it is known which way is better."""
    rest = [m for m, better in results.better.items() if better is not None and results.values.get(m)]
    return list(dict.fromkeys([*(m for m in results.main if results.values.get(m)), *rest]))[:MOST]


def _first_pair(front: Sequence[Row], means: Sequence[Row], keys: Sequence[str]) -> tuple[str, str] | None:
    if front:
        return front[0]["first"], front[0]["second"]
    pairs = ((a, b) for i, a in enumerate(keys) for b in keys[i + 1 :])
    return next((pair for pair in pairs if len(_only(means, pair)) > 1), None)


def _only(rows: Sequence[Row], pair: tuple[str, str]) -> list[Row]:
    """The rows that have both measures; of a base's several sets of pairs one, where neither is of pairs."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if all(row.get(key) is not None for key in pair):
            found.setdefault((row["whose"], *(row[key] for key in pair)), row)
    return list(found.values())


def _place(place: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """The axes of a run or a cell. An unaligned base has its model alone, and is shown whatever else is chosen."""
    own: Row = {key: place.get(axis) for key, axis in names.items()}
    if place["kind"] in NOT_TRAINED:
        own = {key: value if names[key] == "model" else None for key, value in own.items()}
    own = {key: None if value is None else plain_text(value) for key, value in own.items()}
    words = [place["kind"] if place["kind"] != "train" else None, *(place.get(axis) for axis in (*MAIN_AXES, "merge"))]
    kind = place["kind"] if place["kind"] != "train" else str(place.get("method"))
    return own | {"kind": plain_text(kind), "label": plain_text(" ".join(str(word) for word in words if word))}


def run_rows(results: Results, keys: Mapping[Measure, str], names: Mapping[str, str]) -> list[Row]:
    """One for each run and set of held-out pairs, with its scores at the last step."""
    found: Found = {}
    for measure, key in keys.items():
        for value in results.values.get(measure, ()):
            if value.last:
                own, pairs = found.setdefault((value.run_id,), {}), value.at(PAIRS)
                if pairs not in own:
                    own[pairs] = _place(value.place, names) | {"run_id": value.run_id, "seed": value.seed}
                own[pairs][key] = value.value
    return _joined(found)


def cell_rows(results: Results, keys: Mapping[Measure, str], names: Mapping[str, str]) -> list[Row]:
    """One for each cell, with its means at the last step and their intervals."""
    found: Found = {}
    axes = [axis for axis in ("kind", "base", *results.axes) if axis not in PAIRS]
    for cell in cells(results, keys):
        if cell.last:
            own = found.setdefault(tuple(map(cell.place.get, axes)), {})
            pairs = tuple(map(cell.place.get, PAIRS))
            if pairs not in own:
                own[pairs] = _place(cell.place, names) | {"run_id": cell.run_id}
            if cell.run_id != own[pairs]["run_id"]:
                own[pairs]["run_id"] = None  # another of its measures is of several
            key, mean = keys[cell.measure], cell.score
            own[pairs] |= {key: mean.mean, f"{key}_low": mean.low, f"{key}_high": mean.high, "seeds": mean.seeds}
    return _joined(found)


def _joined(found: Found) -> list[Row]:
    """The rows; a base's scores that belong to no set of pairs stand beside those on each of its sets."""
    rows: list[Row] = []
    for own in found.values():
        anywhere = own.pop((None, None), {}) if len(own) > 1 else {}
        first = len(rows)
        rows += [anywhere | row | {"whose": first if anywhere else first + i} for i, row in enumerate(own.values())]
    return rows


def front_rows(fronts: Sequence[Row], keys: Mapping[str, str], names: Mapping[str, str]) -> list[Row]:
    """front.csv, with the measures by their keys."""
    found = []
    for row in fronts:
        sides = [
            row[side] + (f" ({row[f'{side}_judge']})" if row[f"{side}_judge"] else "") for side in ("first", "second")
        ]
        if all(side in keys for side in sides):
            own = _place(row, names) | {"first": keys[sides[0]], "second": keys[sides[1]]}
            own |= {"among": plain_text(row["among"]), "run_id": row["run_id"]}
            own |= {"first_mean": row["first_mean"], "second_mean": row["second_mean"], "on_front": row["on_front"]}
            found.append(own | {"probability": row["probability"], "seeds": row["seeds"], "of": row["cells"]})
    return found


def _values(rows: Sequence[Row], key: str) -> dict[str, str]:
    """What can be chosen of an axis."""
    return {EVERY: EVERY} | {value: value for value in sorted({row[key] for row in rows if row[key] is not None})}


def _shown(names: Mapping[str, str], front: Sequence[Row]) -> tuple[str, str]:
    """Which rows are shown, and which front: that among all, or that within the model that is chosen."""
    rows = " && ".join(f"(only_{k} == '{EVERY}' || !isValid(datum.{k}) || datum.{k} == only_{k})" for k in names)
    model = next((key for key, axis in names.items() if axis == "model"), None)
    amongs = {row["among"] for row in front}
    if model is not None and EVERY in amongs:
        return rows or "true", f"datum.among == only_{model}"
    return rows or "true", f"datum.among == '{EVERY}'" if EVERY in amongs else "true"


def _chart(
    x: str,
    y: str,
    colour: str,
    first: str,
    second: str,
    shown: tuple[str, str],
    pair: tuple[str, str] | None = None,
    *,
    one_legend: bool = False,
) -> Spec:
    """The layers: seeds, intervals, cell means, front.

    Args:
        x, y, colour: expressions for a row's values.
        first, second: axis titles.
        shown: which rows, and which of the fronts.
        pair: the keys of the measures; None where they are chosen.
        one_legend: colours and shapes are of the same field, and share a legend; else each says what it is of.
    """
    places = (
        alt.X("x:Q", title=first, scale=alt.Scale(zero=False)),
        alt.Y("y:Q", title=second, scale=alt.Scale(zero=False)),
    )
    shades = alt.Color("kind:N", title=None) if one_legend else alt.Color("shade:N", title="colour")
    kinds = alt.Shape("kind:N", title=None if one_legend else "shape")
    told = [alt.Tooltip("label:N", title="cell"), alt.Tooltip("x:Q", format=".4~g"), alt.Tooltip("y:Q", format=".4~g")]
    ends = [alt.Tooltip(f"{axis}_{end}:Q", format=".4~g") for axis in "xy" for end in ("low", "high")]

    def points(name: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(name)).encode(*places)

    seeds = points("runs").mark_point(size=14, opacity=0.5, filled=True).encode(
        color=shades, shape=kinds, tooltip=[*told, alt.Tooltip("seed:Q"), alt.Tooltip("run_id:N")]
    )  # fmt: skip
    across = alt.Chart(alt.NamedData("cells")).mark_rule(opacity=0.6).encode(
        x=alt.X("x_low:Q", title=first), x2="x_high:Q", y=places[1], color=shades
    )  # fmt: skip
    up = alt.Chart(alt.NamedData("cells")).mark_rule(opacity=0.6).encode(
        y=alt.Y("y_low:Q", title=second), y2="y_high:Q", x=places[0], color=shades
    )  # fmt: skip
    means = points("cells").mark_point(size=75, opacity=1, filled=True).encode(
        color=shades, shape=kinds, tooltip=[*told, *ends, alt.Tooltip("seeds:Q")]
    )  # fmt: skip
    line = points("front").mark_line(strokeDash=[5, 4], color=GREY, strokeWidth=1.5).encode(order=alt.Order("x:Q"))
    rings = points("front").mark_point(size=170, color=GREY, strokeWidth=1.5).encode(
        opacity=alt.condition("datum.on_front", alt.value(1), alt.value(0)),
        tooltip=[
            *told,
            alt.Tooltip("on_front:N", title="on the front"),
            alt.Tooltip("probability:Q", title="probability of being on it", format=".2f"),
            *(alt.Tooltip("of:Q", title="cells compared"), alt.Tooltip("among:N"), alt.Tooltip("seeds:Q")),
        ],
    )  # fmt: skip
    spec = bare(alt.layer(seeds, across, up, means, line, rings).properties(height=HEIGHT).to_dict(validate=False))
    own = [
        {"calculate": x, "as": "x"},
        {"calculate": y, "as": "y"},
        {"calculate": f"isValid({colour}) ? {colour} : datum.kind", "as": "shade"},
        {"filter": f"isValid(datum.x) && isValid(datum.y) && {shown[0]}"},
    ]
    a, b = ("first", "second") if pair is None else (f"'{pair[0]}'", f"'{pair[1]}'")
    lows = [
        {"calculate": f"datum[{key} + '_{end}']", "as": f"{axis}_{end}"}
        for key, axis in ((a, "x"), (b, "y"))
        for end in ("low", "high")
    ]
    straight, turned = (
        f"datum.first == {a} && datum.second == {b}",
        f"datum.first == {b} && datum.second == {a}",
    )
    of_front = [
        {"filter": f"(({straight}) || ({turned})) && {shown[1]} && {shown[0]}"},
        {"calculate": f"datum.first == {a} ? datum.first_mean : datum.second_mean", "as": "x"},
        {"calculate": f"datum.first == {a} ? datum.second_mean : datum.first_mean", "as": "y"},
    ]
    kept = {"filter": "datum.on_front"}
    for layer, transform in zip(
        spec["layer"],
        (own, [*own, *lows], [*own, *lows], [*own, *lows], [*of_front, kept], of_front),
        strict=True,
    ):
        layer["transform"] = transform
    return spec
