"""The figures of a report: Vega-Lite specifications for the page, and the same as SVG and PDF for a paper.

Drawn by Vega-Altair and vl-convert, without a browser and without a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_align.reporting.charts.axes import heat_figures, variance_figures
from peft_align.reporting.charts.common import Figure
from peft_align.reporting.charts.coverage import coverage_figures
from peft_align.reporting.charts.curves import sample_figures, setting_figures
from peft_align.reporting.charts.forest import claim_figures, comparison_figures
from peft_align.reporting.charts.published import published_figures
from peft_align.reporting.charts.tradeoff import tradeoff_figures
from peft_align.reporting.drawing import drawn
from peft_align.reporting.findings import Findings
from peft_align.reporting.table import Row
from peft_align.store.records import atomic_write

__all__ = ["Figure", "draw", "figures", "write_figures"]


def figures(found: Findings, table: Sequence[Row]) -> list[Figure]:
    """The charts in the page's order; what the sweep has no data for is left out.

    Args:
        found: all that is computed.
        table: the rows of results.csv, which tell how many samples a step is, and the scores of searches.
    """
    return [
        *coverage_figures(found.coverage),
        *tradeoff_figures(found.results, found.fronts),
        *comparison_figures(found.compared),
        *sample_figures(found.results, table),
        *setting_figures(found.results, table),
        *heat_figures(found.results),
        *variance_figures(found.results, found.variance),
        *claim_figures(found.results, found.claims, found.published),
        *published_figures(found.results, found.beside),
    ]


def draw(figures: Sequence[Figure]) -> dict[str, bytes]:
    """Each figure as NAME.svg and NAME.pdf. Touches no file, so that a thread may wait for it. Raises WorkError."""
    return drawn({one.name: one.filed for one in figures}) if figures else {}


def write_figures(pictures: Mapping[str, bytes], folder: Path) -> None:
    """Write what was drawn into figures/ under a folder; what an earlier state had there is removed."""
    target = folder / "figures"
    shutil.rmtree(target, ignore_errors=True)
    for name, content in pictures.items():
        with atomic_write(target / name) as temporary:
            temporary.write_bytes(content)
