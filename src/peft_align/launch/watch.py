"""What the runs are doing, read from the disk alone: for the live table of a sweep, and for `status`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peft_align.grid.cost import human_time
from peft_align.grid.planner import Item, Planner
from peft_align.store.runs import RunDir
from peft_align.terminal import one_line, shown

STATES = ("done", "running", "pending", "waiting", "blocked", "failed", "lost")
ENDED_BADLY = ("blocked", "failed", "lost")
LOG_TAIL, LOG_BYTES = 15, 65536  # lines shown of a failed run's log, and where they are looked for
SHOWN = 24  # rows of the live table


@dataclass(frozen=True)
class State:
    """One run as people see it."""

    run_id: str
    state: str
    detail: str = ""
    step: str = ""
    loss: str = ""
    speed: str = ""
    eta: str = ""


def observe(planner: Planner, item: Item, fresh: Item | None = None) -> State:
    """The state of one run. `lost`: it was in progress, and the process that did it is gone.

    Args:
        planner: looks at the run again, where its item does not say that it is done.
        item: of the plan, which may have been made some time ago.
        fresh: it was made just now, and is not made again.
    """
    if item.done:
        return State(item.run.id, "done", item.why)
    directory = RunDir(planner.root, item.run.id)
    progress = directory.progress()
    if progress is not None:
        if directory.is_locked(by_clock=True):
            return running(item.run.id, progress)
        return State(item.run.id, "lost", f"{progress.get('stage', '')}: its process is gone")
    fresh, failure = fresh or planner.item(item.run), directory.failure()
    if failure is not None and not fresh.done:
        name = "blocked" if failure.get("kind") == "blocked" else "failed"
        return State(item.run.id, name, f"{failure['stage']}: {failure['reason']}")
    return State(item.run.id, "done" if fresh.done else "waiting", fresh.why)


def running(run_id: str, progress: dict[str, Any]) -> State:
    """A running run from its progress file."""
    per_step, eta, loss, step, of = (progress.get(k) for k in ("seconds_per_step", "eta", "loss", "step", "of"))
    left = max(0.0, eta - (time.time() - progress["time"])) if eta is not None else None
    return State(
        run_id,
        "running",
        str(progress.get("stage", "")),
        f"{step}/{of}" if of else (str(step) if step else ""),
        f"{loss:.4f}" if loss is not None else "",
        f"{per_step:.2f} s/step" if per_step else "",
        human_time(left) if left is not None else "",
    )


def table(states: Sequence[State], started: float) -> RenderableType:
    """The live table: a bar, the counts, then what runs and what failed."""
    counts = Counter(state.state for state in states)
    rows_of = [s for s in states if s.state == "running"] + [s for s in states if s.state in ENDED_BADLY]
    rows = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "state", "step", "loss", "speed", "ETA", ""):
        rows.add_column(column, no_wrap=column != "", overflow="ellipsis")
    for s in rows_of[:SHOWN]:
        style = "red" if s.state in ENDED_BADLY else ""
        detail = "" if s.state == "running" else s.detail
        label = s.detail if s.state == "running" else s.state
        texts = (shown(s.run_id), shown(one_line(label)), shown(one_line(detail)))
        rows.add_row(texts[0], Text(texts[1], style), s.step, s.loss, s.speed, s.eta, Text(texts[2], style))
    bar = ProgressBar(total=max(1, len(states)), completed=counts["done"], width=40)
    head = Text(f"{summary(counts)}, {human_time(time.monotonic() - started)}")
    return Group(Group(bar, head), rows if rows_of else Text(""))


def summary(counts: Counter[str]) -> str:
    """'3 done, 1 running, 2 waiting'"""
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "nothing to do"


def line(state: State) -> str:
    """A plain line for a log."""
    parts = [state.detail, state.step and f"step {state.step}", state.loss and f"loss {state.loss}", state.speed]
    parts.append(f"ETA {state.eta}" if state.eta else "")
    return one_line(f"{state.state:8} {state.run_id}  {'  '.join(filter(None, parts))}".rstrip())


def tail(path: Path, lines: int = LOG_TAIL) -> str:
    """The end of a log, indented."""
    try:
        if not path.is_file():  # a device has no end
            return "  (no log)"
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode(errors="replace")
    except OSError:
        return "  (no log)"
    ends = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").rstrip("\n").split("\n")[-lines:]]
    return "\n".join([f"  the end of {path}:", *(f"  | {line}" for line in ends)])
