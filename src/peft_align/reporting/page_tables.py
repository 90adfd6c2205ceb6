"""The page's tables: what each cell shows, what it is sorted by, and how sure it is, without any HTML."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_align.config.schema import MAIN_AXES
from peft_align.reporting.cells import MERGED
from peft_align.reporting.comparisons import TOO_FEW, Compared, effect_row, part_words
from peft_align.reporting.coverage import ALL, STATES, Coverage
from peft_align.reporting.findings import Findings
from peft_align.reporting.table import Row

# A verdict is a word and a shape: colour alone tells those nothing who do not see it, or print in black.
SHAPES = {
    "supported": "✓",
    "contradicted": "✗",
    "undecided": "○",
    TOO_FEW: "·",
    "higher": "▲",
    "lower": "▼",
    "no difference shown": "○",
    "no spread": "◇",
    "done": "✓",
    "failed": "✗",
    "missing": "·",
    "excluded": "–",
    "inside": "✓",
    "outside": "✗",
}
EMPTY = "–"
CELL = ("kind", *MAIN_AXES, *MERGED, "base")
IN_THE_LABEL = ("label", "kind", "is_parent_only", *MAIN_AXES, "base", "seed")  # of a run


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as it is shown.
        sort: what it is sorted by; None comes last.
        shape: beside the text, of a verdict.
        run: the id of the run whose details it leads to.
        is_number: set in digits of one width, to the right.
    """

    text: str
    sort: float | str | None = None
    shape: str = ""
    run: str | None = None
    is_number: bool = False

    @property
    def verdict(self) -> str:
        """The word as a class of CSS."""
        return self.text.replace(" ", "-") if self.shape else ""


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        caption: what it shows, for those who hear the page too.
        heads: its columns' names.
    """

    caption: str
    heads: list[str]
    rows: list[list[Cell]]


def cell(value: Any, digits: int = 4, sign: bool = False) -> Cell:
    """A value as a cell: numbers with so many significant digits, yes and no, a dash for nothing."""
    if value is None or value == "":
        return Cell(EMPTY)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if isinstance(value, (int, float)):
        return Cell(number(value, digits, sign), float(value) if math.isfinite(value) else None, is_number=True)
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return Cell(str(value), str(value))


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number for people, with a real minus."""
    value = value or 0  # a zero has no sign
    plus = "+" if sign and value else ""
    if isinstance(value, int):
        text = f"{value:{plus},}"
    elif value and math.isfinite(value) and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:{plus}.{digits - 1}e}"
    else:
        text = f"{value:{plus}.{digits}g}"
    return text.replace("-", "−") if "e" not in text else text


def verdict(word: str) -> Cell:
    """A verdict with its shape."""
    return Cell(word, word, SHAPES.get(word, "·"))


def interval(low: float | None, high: float | None) -> Cell:
    """An interval, sorted by its lower end."""
    if low is None or high is None:
        return Cell(EMPTY)
    return Cell(f"[{number(low, 3)}, {number(high, 3)}]", low, is_number=True)


def probability(p: float | None) -> Cell:
    """A p value."""
    if p is None:
        return Cell(EMPTY)
    return Cell("< 0.001" if p < 0.001 else f"{p:.2g}", p, is_number=True)


def from_rows(caption: str, rows: Sequence[Row], labels: Mapping[str, str], without: Collection[str] = ()) -> PageTable:
    """Rows of a CSV file as a table: `run_id` leads to the run, columns without any value are left out."""
    named = dict.fromkeys(key for row in rows for key in row if key not in without)
    keys = [key for key in named if any(_told(row.get(key)) for row in rows)]
    heads = ["run" if key == "run_id" else words(key) for key in keys]
    shown = [[_run(row.get(key), labels) if key == "run_id" else cell(row.get(key)) for key in keys] for row in rows]
    return PageTable(caption, heads, shown)


def words(key: str) -> str:
    """A column's name for people."""
    return " ".join({"gb": "GB", "kwh": "kWh", "gpu": "GPU"}.get(word, word) for word in key.split("_"))


def cost(rows: Sequence[Row], labels: Mapping[str, str]) -> PageTable:
    """What each run took."""
    return from_rows("Cost of each run", rows, labels, IN_THE_LABEL)


def per_point(rows: Sequence[Row]) -> PageTable:
    """What each cell gained over its unaligned base, and what that took; the cheapest points first."""
    ordered = sorted(rows, key=lambda row: (row.get("hours_per_point") is None, row.get("hours_per_point") or 0.0))
    shown = []
    for row in ordered:
        place = [str(row[key]) for key in row if key in CELL and _told(row[key]) and row[key] != "train"]
        judge = f" ({row['judge']})" if row.get("judge") else ""
        one = [cell(" ".join(place)), cell(f"{row['benchmark']} {row['metric']}{judge}"), cell(row["baseline"])]
        one += [cell(row["mean"]), cell(row["gain"], 3, sign=True), interval(row["gain_low"], row["gain_high"])]
        shown.append([*one, cell(row["hours"], 3), cell(row["device_kind"]), cell(row["hours_per_point"], 3)])
    heads = ["cell", "measure", "base", "cell’s mean", "points gained", "95% interval", "hours of one run", "on"]
    return PageTable("Hours for a point gained over the unaligned base", [*heads, "hours per point"], shown)


def _told(value: Any) -> bool:
    return value is not None and value != ""


def _run(run_id: Any, labels: Mapping[str, str]) -> Cell:
    if run_id is None:
        return Cell(EMPTY)
    label = labels.get(run_id, run_id)
    return Cell(label, label, run=run_id if run_id in labels else None)


def coverage_reasons(found: Coverage) -> PageTable:
    """Why runs are not there."""
    rows = [
        [verdict(state), cell(reason), cell(n)]
        for state in STATES[1:]
        for reason, n in found.reasons(state).most_common()
    ]
    return PageTable("Why runs are not there, by how many", ["state", "reason", "runs"], rows)


def coverage_axes(found: Coverage) -> PageTable:
    """How many runs of each value of each axis there are."""
    places = dict.fromkeys((axis, value) for axis, value, *_ in found.counts if axis != ALL)
    rows = []
    for axis, value in places:
        own = found.of(axis, value)
        rows.append([cell(axis), cell(value), *(cell(own[state]) for state in STATES)])
    return PageTable("Runs by kind and by each axis that varies", ["axis", "value", *STATES], rows)


def comparisons(compared: Sequence[Compared]) -> PageTable:
    """Every comparison that has a pair of cells."""
    rows = []
    for one in compared:
        if not one.effect.cells:
            continue
        row = effect_row(one)
        name = one.contrast.name + (f" ({part_words(one.part)})" if one.part else "")
        few, most = one.effect.seeds
        seeds = Cell(str(most) if few == most else f"{few}–{most}", float(most), is_number=True)
        shown = [cell(name), cell(str(one.measure)), cell(row["effect"], 3, sign=True)]
        shown += [interval(row["low"], row["high"]), probability(row["p"]), probability(one.p_holm)]
        shown += [verdict(one.result), _quality(one)]
        rows.append([*shown, cell(one.effect.cells), seeds, cell(one.runs)])
    heads = ["comparison", "measure", "difference", "95% interval", "p", "p (Holm)", "result", "which is"]
    return PageTable("Paired comparisons", [*heads, "pairs of cells", "seeds", "runs"], rows)


def _quality(one: Compared) -> Cell:
    if one.result not in ("higher", "lower") or one.higher_is_better is None:
        return Cell(EMPTY)
    return cell("better" if (one.result == "higher") == one.higher_is_better else "worse")


def published(rows: Sequence[Row]) -> PageTable:
    """The published numbers that the sweep has measured, beside its own."""
    shown = []
    for row in rows:
        if row["measured"] is None:
            continue
        keys = ("kind", "dataset", "preference", "method", "model", "peft", "merge", "inputs", "cell")
        words = [str(row[key]) for key in keys if row[key] and row[key] != "train"]
        measure = f"{row['benchmark']} {row['metric']}" + (f" ({row['judge']})" if row["judge"] else "")
        inside = [_inside(row[key]) for key in ("inside_interval", "inside_rerun")]
        numbers = [cell(row["measured"]), cell(row["published"]), cell(row["difference"], 3, sign=True)]
        own = [cell(row["table"]), cell(" ".join(words)), cell(measure), *numbers]
        shown.append([*own, interval(row["low"], row["high"]), *inside, cell(row["seeds"])])
    heads = ["table", "cell", "measure", "ours", "theirs", "difference", "our 95% interval", "theirs in it"]
    return PageTable("Measured and published numbers", [*heads, "theirs in that of a rerun", "seeds"], shown)


def _inside(told: bool | None) -> Cell:
    return Cell(EMPTY) if told is None else verdict("inside" if told else "outside")


def runs(found: Findings, details: Mapping[str, Mapping[str, Any]]) -> PageTable:
    """Every run, with its main scores at its last step."""
    scores: dict[str, dict[int, float]] = {}
    for i, measure in enumerate(found.results.main):
        for value in found.results.values.get(measure, ()):
            if value.last:
                scores.setdefault(value.run_id, {})[i] = value.value
    shown = []
    for run_id, told in details.items():
        label, own = str(told.get("label") or run_id), scores.get(run_id, {})
        row = [Cell(label, label, run=run_id), cell(told.get("kind")), verdict(str(told.get("state") or "missing"))]
        shown.append(row + [cell(own.get(i)) for i in range(len(found.results.main))])
    heads = ["run", "kind", "state", *map(str, found.results.main)]
    return PageTable("Every run with its scores at the last step", heads, shown)
