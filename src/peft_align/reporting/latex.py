"""The study's tables 2 to 5 as LaTeX, from the results of a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_align.grid.runs import Sweep
from peft_align.reporting.cells import Cell, Measure, Results, cells, plain
from peft_align.reporting.frame import Frame, Planned, frame_of, in_table
from peft_align.reporting.published import NUMBERS

ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}
SINGLE = ("harmless", "helpful")
TRAINED = ("peft", "dataset", "preference", "model", "method")


@dataclass(frozen=True)
class Layout:
    """One of the study's tables.

    Attributes:
        number: as the study counts.
        keys: its columns before those of the benchmarks.
        caption: what it shows.
    """

    number: int
    keys: tuple[str, ...]
    caption: str

    def line(self, place: Mapping[str, Any]) -> dict[str, Any] | None:
        """What stands in the columns for a cell; None where the table does not have it."""
        kind, preference = place["kind"], place.get("preference")
        if self.number == 3:
            return {key: place[key] for key in self.keys} if kind == "merge" else None
        if self.number == 2 and kind == "baseline":
            bare = {"peft": "qlora", "dataset": "beavertails", "preference": "none", "method": "none"}
            return bare | {"model": place["model"]} if place["base"] == "nf4" else None
        wanted = {
            2: place["peft"] == "qlora" and preference == "mixture",
            4: place["peft"] == "qlora" and preference in SINGLE,
            5: place["peft"] == "lora" and preference in SINGLE,
        }
        return {key: place[key] for key in self.keys} if kind == "train" and wanted[self.number] else None


LAYOUTS = (
    Layout(2, TRAINED, "The mixture of both preferences, and the unaligned bases, with QLoRA."),
    Layout(3, ("model", "merge", "inputs"), "Merged adapters."),
    Layout(4, TRAINED, "Alignment with QLoRA."),
    Layout(5, TRAINED, "Alignment with LoRA."),
)


def tables(results: Results, sweep: Sweep | Frame | None = None) -> dict[str, str]:
    """LaTeX by file name: each table of which at least one number is there.

    Args:
        results: measured so far.
        sweep: whose cells have a line even while nothing of them is measured.
    """
    measures: dict[str, Measure] = {}
    for column, named in NUMBERS.items():
        found = [m for m in results.values if (m.benchmark, plain(m.metric)) == named]
        if found:
            measures[column] = found[0]  # of several judges the first, which the caption names
    measured = [cell for cell in cells(results, measures.values()) if cell.last]
    written = {}
    for layout in LAYOUTS:
        text = _table(layout, results, measures, measured, sweep)
        if text:
            written[f"table{layout.number}.tex"] = text
    return written


def _table(
    layout: Layout,
    results: Results,
    measures: Mapping[str, Measure],
    measured: Sequence[Cell],
    sweep: Sweep | Frame | None,
) -> str:
    own = [(line, cell) for cell in measured if (line := layout.line(cell.place)) is not None]
    if not own:
        return ""
    further = [axis for axis in results.axes if axis not in (*TRAINED, "merge", "inputs")]
    trained = [run for run in frame_of(sweep).runs if run.kind == "train"] if sweep is not None and further else []
    further = [axis for axis in further if _tells_apart(axis, layout, own, trained)]
    keys = [*layout.keys, *further]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    if layout.number == 2 and not any(cell.place["kind"] == "train" for _, cell in own):
        return ""  # bases alone are no table of the mixture
    for line, cell in own:
        line |= {axis: cell.place.get(axis) for axis in further}
        column = next(name for name, measure in measures.items() if measure == cell.measure)
        lines.setdefault(tuple(_text(line[key]) for key in keys), {})[column] = number(cell)
    for run in [] if sweep is None else sweep.runs:
        place = {"kind": run.kind, "base": run.base, **run.choices, **run.axes}
        planned = None if run.is_parent_only or run.kind == "external" else layout.line(place)
        if planned is not None and not further:
            lines.setdefault(tuple(_text(planned[key]) for key in keys), {})
    head = [*keys, *NUMBERS]
    body = [[*key, *(found.get(column, "--") for column in NUMBERS)] for key, found in lines.items()]
    seeds = sorted({cell.score.seeds for _, cell in own})
    spread = any(cell.score.basis == "seeds" for _, cell in own)
    caption = layout.caption + (
        " Mean $\\pm$ half of the 95\\% $t$ interval over seeds" if spread else " One value a cell"
    )
    caption += f"; {seeds[0]} to {seeds[-1]} seeds." if len(seeds) > 1 else f"; {seeds[0]} seeds." if spread else "."
    judges = {m.benchmark: m.judge for m in measures.values() if m.judge}
    caption += "".join(f" {escape(b)} judged by {escape(judge)}." for b, judge in judges.items())
    columns = "l" * len(keys) + "r" * len(NUMBERS)
    rows = [" & ".join(line) + r" \\" for line in body]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:study-{layout.number}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(escape, head)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _tells_apart(
    axis: str, layout: Layout, own: Sequence[tuple[Mapping[str, Any], Cell]], trained: Sequence[Planned]
) -> bool:
    """Whether lines that are else the same differ in an axis, or will: ranks do not, where each method has its own."""
    of = [(line, cell.place.get(axis)) for line, cell in own]
    for run in trained:
        line = layout.line({"kind": run.kind, "base": run.base, **run.choices, **run.axes})
        if line is not None and any(name in run.steps for name, _ in NUMBERS.values()):
            of.append((line, in_table(run.value(axis))))
    known: dict[str, str] = {}
    return any(known.setdefault(repr(line), repr(value)) != repr(value) for line, value in of)


def number(cell: Cell) -> str:
    """A mean, with half of its interval where that is over seeds."""
    mean = cell.score
    if mean.basis != "seeds" or mean.high is None:
        return f"{mean.mean:.3f}".replace("-", "$-$")
    return f"{mean.mean:.3f} $\\pm$ {mean.high - mean.mean:.3f}".replace("-", "$-$")


def escape(text: str) -> str:
    """A text as LaTeX shows it."""
    return re.sub(r"[\\~^&%$#_{}]", lambda match: ESCAPES[match[0]], text)


def _text(value: Any) -> str:
    return escape("none" if value is None else str(value))
