"""A sweep's report as a run of Weights & Biases: its tables, figures and files, in the group of its training runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_align.config.schema import Wandb
from peft_align.grid.runs import Sweep
from peft_align.reporting import claims, comparisons
from peft_align.reporting.cells import cell_rows, cells
from peft_align.reporting.comparisons import TOO_FEW
from peft_align.reporting.coverage import STATES
from peft_align.reporting.findings import Findings
from peft_align.reporting.table import Row, columns
from peft_align.secrecy import redacted
from peft_align.store.records import read_json, write_json
from peft_align.terminal import shown
from peft_align.training.tracking import started

FILES = ("results.csv", "findings.md", "report.html", "figures/*.svg")
HELD = "report.json"  # what was logged last
LONGEST = 100  # characters of a run's id


def track_report(tracker: Wandb, sweep: Sweep, folder: Path, table: Sequence[Row], found: Findings) -> str | None:
    """Log a report that is written; returns what people are told where that failed.

    A report that says the same as the one that was logged last is not logged again; one that says more goes on with
    the same run. What goes out is what the files in the folder hold, and the sweep's words, without secrets.

    Args:
        tracker: where it goes; offline, as trainings are, without a key or a network.
        sweep: whose report it is.
        folder: of the sweep, with the report's files in it.
        table: its result rows.
        found: what they show.
    """
    files = [path for pattern in FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    place = folder / "tracking"
    digest = _digest(tracker, folder, files)
    if (read_json(place / HELD) or {}).get("digest") == digest:
        return None
    import wandb

    try:
        run = started(
            tracker,
            group=folder.name,
            name=f"report {folder.name}",
            config={"sweep": sweep.name, "command": [redacted(word) for word in sweep.command]},
            folder=place,
            job_type="report",
            run_id=f"report-{folder.name}"[:LONGEST],
        )
        try:
            run.log(_content(wandb, sweep, folder, files, table, found))
            run.summary.update(summary(found))
            for path in files:
                run.save(str(path), base_path=str(folder), policy="now")
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()
        write_json(place / HELD, {"digest": digest})
    except (wandb.errors.Error, OSError) as error:  # the report itself is written
        return f"the report was not tracked: {type(error).__name__}: {str(error).strip()[:300]}"
    return None


def _digest(tracker: Wandb, folder: Path, files: Sequence[Path]) -> str:
    found = hashlib.sha256(repr(tracker).encode())
    for path in files:
        if path.name != "report.html":  # which says when it was written
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _content(
    wandb: Any, sweep: Sweep, folder: Path, files: Sequence[Path], table: Sequence[Row], found: Findings
) -> dict[str, Any]:
    """Tables and pictures, by the names that they are shown under."""
    content: dict[str, Any] = {}
    for name, (names, rows) in tables(sweep, table, found).items():
        data = [[_plain(row.get(key)) for key in names] for row in rows]
        content[name] = wandb.Table(columns=list(names), data=data, allow_mixed_types=True)
    for path in files:
        if path.suffix == ".svg":
            content[f"figures/{path.stem}"] = wandb.Html(path.read_text(encoding="utf-8"), inject=False)
        elif path.suffix == ".html":
            content["report"] = wandb.Html(path.read_text(encoding="utf-8"), inject=False)
    return content


def tables(sweep: Sweep, table: Sequence[Row], found: Findings) -> dict[str, tuple[Sequence[str], Sequence[Row]]]:
    """Columns and rows of each table that is logged and has any."""
    compared = comparisons.comparison_rows(found.compared)
    all_tables: dict[str, tuple[Sequence[str], Sequence[Row]]] = {
        "results": (columns(sweep), table),
        "cells": cell_rows(found.results, cells(found.results)),
        "comparisons": (comparisons.COLUMNS, compared),
        "claims": (claims.COLUMNS, claims.claim_rows(found.claims, "sweep")),
    }
    return {name: (names, rows) for name, (names, rows) in all_tables.items() if rows}


def _plain(value: Any) -> Any:
    """A value as a table has it: text as people may be shown it, numbers that JSON has."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return shown(value if isinstance(value, str) else json.dumps(value, default=str))


def summary(found: Findings) -> Mapping[str, float]:
    """Numbers of the whole: runs by state, differences and claims by verdict, means of the main measures by method."""
    told: dict[str, float] = {}
    runs = found.coverage.of()
    told |= {f"runs/{state}": runs[state] for state in STATES}
    differences = Counter("shown" if one.result in ("higher", "lower") else "not shown" for one in _tested(found))
    told |= {f"differences/{name}": differences[name] for name in ("shown", "not shown")}
    told |= {f"claims/{verdict}": n for verdict, n in Counter(str(claim.verdict) for claim in found.claims).items()}
    for measure in found.results.main:
        by_method: dict[str, list[float]] = {}
        for cell in cells(found.results, [measure]):
            if cell.last:
                method = str(cell.place.get("method") or cell.place["kind"])
                by_method.setdefault(method, []).append(cell.score.mean)
        told |= {f"{measure}/{method}": math.fsum(own) / len(own) for method, own in by_method.items()}
    return told


def _tested(found: Findings) -> Iterator[comparisons.Compared]:
    return (one for one in found.compared if one.result != TOO_FEW)
