"""What the charts share: words of axes, colours, and the two forms of each chart, for the page and for a file.

The page's form is as wide as its place and may have things to choose. The file's form (SVG, PDF) has a width of its own
and shows what could be chosen side by side. Neither names a background or the colour of text: a theme does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from peft_align.reporting.cells import Measure, Results
from peft_align.reporting.table import Row
from peft_align.terminal import one_line, shown_once

Spec = dict[str, Any]
Build = Callable[[str], alt.LayerChart]  # of the title of the score's axis
# Hues of Okabe and Ito (2008), made as dark as it takes to stand out on white and on black by 3 to 1 at least.
BLUE, ORANGE, GREEN, PINK, BROWN, CYAN, VIOLET, GREY = (
    *("#1f7ac4", "#d55e00", "#00946b", "#c8609f", "#a67c00", "#2a94b8", "#8a6fd1", "#808080"),
)
PALETTE = (BLUE, ORANGE, GREEN, PINK, BROWN, CYAN, VIOLET, GREY)
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is fetched
WIDE, NARROW = 520, 300  # pixels of a file's only chart, and of each where there are several
LINE, GAP = 13, 9  # pixels of a line of a label, and between labels
TICKS = 8  # about as many: by default there are so many on a wide chart that they nearly touch
LABEL = 26  # characters of a line: beside such labels, half of a phone's width is left
CONFIG: Spec = {
    "lineBreak": "\n",
    "range": {"category": list(PALETTE)},
    "axis": {"labelLimit": 0, "titleLimit": 0, "tickCount": TICKS, "maxExtent": 400},  # by default a title is in labels
    "legend": {"orient": "bottom", "columns": 2, "labelLimit": 0, "titleLimit": 0, "symbolLimit": 0}
    | {"symbolOpacity": 1, "symbolBaseFillColor": GREY, "symbolBaseStrokeColor": GREY},
    "header": {"labelLimit": 0, "titleLimit": 0},
    "rule": {"color": GREY},
    "title": {"limit": 0, "anchor": "start"},
}
TITLE = "@title"  # stands for the title that follows what is chosen, until the chart is a dict
CHOSEN = "datum.measure == measure"


@dataclass(frozen=True)
class Figure:
    """A chart and what is said of it.

    Attributes:
        name: of its files, and of its place in the page.
        section: of the page: coverage, tradeoff, comparisons, curves, claims or published.
        caption: plain text: what is shown, what the intervals are, of how many.
        spec: Vega-Lite, its data in it, as wide as its place.
        sheet: the same for a file: of a set width, with nothing to choose; None: `spec` with such a width.
    """

    name: str
    section: str
    title: str
    caption: str
    spec: Spec
    sheet: Spec | None = None

    @property
    def filed(self) -> Spec:
        """What a file shows."""
        return self.spec | {"width": WIDE} if self.sheet is None else self.sheet


def layered(*charts: alt.Chart, height: Any) -> alt.LayerChart:
    """Charts over each other, all of the data `rows`."""
    whole = alt.layer(*charts, data=alt.NamedData("rows")).properties(height=height)
    assert isinstance(whole, alt.LayerChart)  # facets are not made here
    return whole


def figure(name: str, section: str, title: str, caption: str, chart: alt.LayerChart, rows: Sequence[Row]) -> Figure:
    """A chart with nothing to choose. `rows` are its data."""
    spec = chart.to_dict(validate=False)  # tests hold charts against the schema; here it would take most of the time
    return Figure(name, section, title, caption, top(spec, {"rows": rows}, "container"))


def by_measure(
    name: str, section: str, title: str, caption: str, build: Build, rows: Sequence[Row], titles: Mapping[str, str]
) -> Figure:
    """A chart of one measure, which is chosen on the page; the file has all, each with its own scale.

    Args:
        name, section, title, caption: of the figure.
        build: the chart, with the title of the score's axis.
        rows: of all measures; `measure` is one of the keys of `titles`.
        titles: the axis titles.
    """
    data = {"rows": rows}
    if len(titles) == 1:
        spec = build(*titles.values()).to_dict(validate=False)
        return Figure(name, section, title, caption, top(spec, data, "container"))
    page = following(build(TITLE).to_dict(validate=False), "titles[measure]")
    page["params"] = [select("measure", "Measure", titles), {"name": "titles", "value": dict(titles)}]
    page["transform"] = [{"filter": CHOSEN}, *page.get("transform", [])]
    panels = []
    for key, words in titles.items():
        panel = build(words).to_dict(validate=False)
        panel["transform"] = [{"filter": {"field": "measure", "equal": key}}, *panel.get("transform", [])]
        panels.append(bare(panel) | {"width": NARROW})
    sheet: Spec = {"columns": 2, "concat": panels, "spacing": 40}
    sheet["resolve"] = {"scale": {"color": "shared", "shape": "shared", "strokeDash": "shared"}}
    return Figure(name, section, title, caption, top(page, data, "container"), top(sheet, data))


def bare(spec: Spec) -> Spec:
    """Without what only a whole specification has."""
    return {key: value for key, value in spec.items() if key not in ("$schema", "config", "datasets")}


def top(spec: Spec, data: Mapping[str, Sequence[Row]], width: int | str | None = None) -> Spec:
    """A whole specification, with its data."""
    whole = {"$schema": SCHEMA, "config": CONFIG} | bare(spec) | {"datasets": {k: list(v) for k, v in data.items()}}
    return whole if width is None else whole | {"width": width}


def following(node: Any, expression: str, mark: str = TITLE) -> Any:
    """The same with the titles that stand for a chosen one replaced by an expression.

    A signal, as Vega has it: Vega-Lite passes it on as it is, also where the titles of layers are merged (an `expr` is
    lost there), though its schema, by which Altair checks, does not say so.
    """
    if isinstance(node, dict):
        return {key: following(value, expression, mark) for key, value in node.items()}
    if isinstance(node, list):
        return [following(value, expression, mark) for value in node]
    return {"signal": expression} if node == mark else node


def select(name: str, words: str, options: Mapping[str, str], value: str | None = None) -> Spec:
    """Something to choose: a parameter with its list. `options` are values and what they are called."""
    bind = {"input": "select", "options": list(options), "labels": list(options.values()), "name": f"{words} "}
    return {"name": name, "value": next(iter(options)) if value is None else value, "bind": bind}


def measure_title(results: Results, measure: Measure) -> str:
    """A measure as an axis names it."""
    return f"{plain_text(measure)}{direction(results.better.get(measure))}"


def direction(higher_is_better: bool | None) -> str:
    """Which way is better."""
    return "" if higher_is_better is None else f" ({'higher' if higher_is_better else 'lower'} is better)"


def titles_of(results: Results, measures: Sequence[Measure]) -> tuple[dict[Measure, str], dict[str, str]]:
    """A short key for each measure, and by key the titles of their axes.

    Only keys stand in expressions: what a name holds is never part of one.
    """
    keys = {measure: f"m{i}" for i, measure in enumerate(measures)}
    return keys, {key: measure_title(results, measure) for measure, key in keys.items()}


def plain_text(value: Any) -> str:
    """A name as a chart shows it: one line without control characters."""
    return one_line(shown_once(str(value)))


def wrapped(text: str, width: int = LABEL) -> str:
    """A label in several lines, none of it cut: between words, in long ones behind what joins their parts."""
    lines = [""]
    for piece in (piece for word in plain_text(text).split() for piece in _pieces(word, width)):
        space = " " if lines[-1] and piece[1] else ""
        if lines[-1] and len(lines[-1]) + len(space) + len(piece[0]) > width:
            lines.append("")
            space = ""
        lines[-1] += space + piece[0]
    return "\n".join(lines) or " "


def _pieces(word: str, width: int) -> list[tuple[str, bool]]:
    """What a word can be broken into, and whether a space stands before each."""
    parts = [word]
    for joint in ("(?<=[+,/])", "(?<=[=_.])"):
        parts = [found for part in parts for found in (re.split(joint, part) if len(part) > width else [part])]
    parts = [part[i : i + width] for part in parts for i in range(0, max(1, len(part)), width)]
    return [(part, i == 0) for i, part in enumerate(parts)]


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels that would fall on one place told apart by a number."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found


def step(rows: Sequence[Row], field: str = "label") -> alt.Step:
    """How high a line of the chart is, in pixels, so that the longest label has room."""
    lines = max((str(row[field]).count("\n") + 1 for row in rows), default=1)
    return alt.Step(LINE * lines + GAP)


def slug(text: str) -> str:
    """A name for files and for the page: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def slugs(prefix: str, measures: Sequence[Measure]) -> list[str]:
    """A file name for each measure, no two alike."""
    found: list[str] = []
    for measure in measures:
        name, n = f"{prefix}-{slug(str(measure))}", 2
        while name in found:
            name, n = f"{prefix}-{slug(str(measure))}-{n}", n + 1
        found.append(name)
    return found
