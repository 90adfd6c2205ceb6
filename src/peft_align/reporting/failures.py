"""Which runs failed, why, and the last words of their logs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_align.config.schema import MAIN_AXES
from peft_align.grid.planner import Item
from peft_align.reporting.table import NOT_TRAINED, Row
from peft_align.reporting.told import Told, labels, number, text, told_of
from peft_align.terminal import shown

FAILURES = [
    *("run_id", "label", "kind", *MAIN_AXES, "seed", "stage", "category", "reason"),
    *("when", "step", "attempts", "host", "task", "log_end"),
]
LINES = 20
LINE = 400  # characters
END = 64 * 1024  # bytes of a log that are read


def failure_rows(items: Sequence[Item], root: Path, told: Mapping[str, Told] | None = None) -> list[Row]:
    """Rows of failures.csv: the runs that are not done because their last attempt failed.

    category is one of store.runs.STOPS; when, in UTC, is the time at which it was recorded; step the last one that was
    told; attempts how often it stopped by itself since it last got further; log_end the last lines of train.log, rid of
    secrets and of control characters; None where there is no log.

    Args:
        items: the state of the runs.
        root: where they lie.
        told: what was read of them; None: it is read now.
    """
    told = told_of(items, root) if told is None else told
    names = labels([item.run for item in items])
    rows: list[Row] = []
    for item in items:
        run, own = item.run, told[item.run.id]
        failure = own.failure
        if failure is None:
            continue
        row: Row = dict.fromkeys(FAILURES)
        if run.kind in NOT_TRAINED:
            row |= {"model": run.choices["model"], "peft": run.base}
        else:
            row |= {key: run.choices[key] for key in MAIN_AXES} | {"seed": run.config.seed}
        row |= {"run_id": run.id, "label": shown(names[run.id]), "kind": run.kind}
        row |= {key: shown(failure[of]) for key, of in (("stage", "stage"), ("category", "kind"), ("reason", "reason"))}
        step, host, task = number(failure, "step"), text(failure, "host"), text(failure, "task")
        row |= {"when": _when(number(failure, "time")), "step": None if step is None else int(step)}
        row |= {"host": host and shown(host), "task": task and shown(task), "attempts": own.directory.attempts()}
        rows.append(row | {"log_end": log_end(own.directory.log)})
    return rows


def _when(seconds: float | None) -> str | None:
    """A time as ISO 8601 has it; None for one that no calendar has."""
    try:
        return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return None


def log_end(path: Path, lines: int = LINES) -> str | None:
    """The last lines of a log as people may see them; of a line that was written over again and again (a bar of
    progress), what stood there last. None where it cannot be read, or says nothing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END))
            read = file.read()
    except OSError:
        return None
    found: list[str] = []
    for raw in read.decode(errors="replace").split("\n"):
        last = next((part for part in reversed(raw.split("\r")) if part.strip()), "")
        if last:
            found.append(_shortened(shown(last.rstrip())))
    return "\n".join(found[-lines:]) or None


def _shortened(line: str) -> str:
    return line if len(line) <= LINE else f"{line[:LINE]} ..."
