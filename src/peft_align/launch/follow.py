"""What the runs of a sweep are doing on a cluster: the disk first, Slurm for what it does not say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.live import Live

from peft_align.grid.planner import Item, Planner
from peft_align.launch import queue
from peft_align.launch.outcome import GONE, settle
from peft_align.launch.watch import State, observe, running, summary, table
from peft_align.store.runs import RunDir
from peft_align.store.submissions import Submission, submissions
from peft_align.terminal import plain_console, say

SOON, LATER = 2.0, 30.0  # seconds between looks at the queue: at first, and in the end
PLAIN_INTERVAL = 60.0  # seconds between lines where there is no terminal


def cluster_states(planner: Planner, items: Sequence[Item]) -> tuple[list[State], set[str]]:
    """The state of every run, and the jobs that live; without Slurm, or submissions, what the disk says.

    Args:
        planner: of the root.
        items: of a plan that was made just now.

    Raises:
        Unanswered: Slurm does not answer; it holds what the disk says.
    """
    states = [observe(planner, item, item) for item in items]
    known = submissions(planner.root)
    open_ids = {state.run_id for state in states if state.state != "done"}
    if not known or not queue.is_there():
        return states, set()
    tasks = _tasks_of(known, open_ids)
    try:
        names = {job: name for submission in known for job, name in submission.names.items()}
        living = queue.live_tasks(names, {submission.content["user"] for submission in known})
        silent = {s.run_id: _untold(planner, s) for s in states if s.state in ("lost", "failed")}
        asked = [task for task in silent.values() if task and task not in living]
        ends = queue.ends_of(asked) if asked else {}
    except queue.SlurmError as error:
        raise Unanswered(error, states) from None
    told = [
        state
        if state.run_id not in open_ids
        else _explained(planner, state, tasks.get(state.run_id, []), living, ends, silent.get(state.run_id))
        for state in states
    ]
    return told, {task.job for task in living.values()}


class Unanswered(RuntimeError):
    """Slurm does not answer; `states` is what the disk says."""

    def __init__(self, error: Exception, states: list[State]) -> None:
        super().__init__(f"Slurm does not answer, so this is what the disk says alone: {error}")
        self.states = states


def _explained(
    planner: Planner,
    state: State,
    tasks: Iterable[str],
    living: dict[str, queue.Task],
    ends: dict[str, queue.End],
    last: str | None,
) -> State:
    """A run's state with what Slurm says put to what the disk says."""
    mine = [living[task] for task in tasks if task in living]
    if state.state == "lost":
        if any(task.id == last and not task.waits for task in mine):  # its lock cannot be seen from here
            return running(state.run_id, RunDir(planner.root, state.run_id).progress() or {"time": time.time()})
        if not mine:
            end = ends.get(last or "")
            return replace(state, state="failed" if end else "lost", detail=end.told if end else GONE)
    if state.state == "failed" and not mine and last in ends:
        failure = RunDir(planner.root, state.run_id).failure() or {}
        if failure.get("kind") == "stopped":
            return replace(state, detail=f"{state.detail}; {ends[str(last)].told}")
    if mine and state.state != "running":
        waits = [task for task in mine if task.waits]
        if len(waits) < len(mine):
            return replace(state, state="pending", detail="its task runs")
        return replace(state, state="pending", detail=f"{waits[0].id}: {waits[0].reason}")
    return state


def _tasks_of(known: Sequence[Submission], runs: set[str]) -> dict[str, list[str]]:
    """The tasks that were submitted for each of these runs."""
    found: dict[str, list[str]] = {}
    for submission in known:
        for task, _, members in submission.tasks():
            for run in runs & set(members):
                found.setdefault(run, []).append(task)
    return found


def _untold(planner: Planner, state: State) -> str | None:
    """The task that was at a run last, if the record does not say why it stopped."""
    directory = RunDir(planner.root, state.run_id)
    told: dict[str, Any] = directory.progress() or directory.failure() or {}
    return told.get("task") if state.state == "lost" or told.get("kind") == "stopped" else None


def follow(planner: Planner, items: Sequence[Item], folder: Path) -> list[State]:
    """Show what the runs do until none of the sweep's jobs is left; returns their states then.

    An interruption ends the showing, not the jobs.
    """
    own = {job for submission in submissions(planner.root, folder.name) for job in submission.jobs}
    console, begun, told, pause = plain_console(), time.monotonic(), 0.0, SOON
    states: list[State] = []

    def look() -> bool:
        nonlocal states, pause
        pause = min(LATER, pause * 1.5)
        try:
            states, living = cluster_states(planner, [planner.item(item.run) for item in items])
        except Unanswered as error:  # it will answer again
            states = error.states
            return True
        return bool(living & own)

    try:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=2, transient=True) as live:
                while look():
                    live.update(table(states, begun))
                    time.sleep(pause)
        else:
            while look():
                if time.monotonic() - told > PLAIN_INTERVAL:
                    say(summary(Counter(state.state for state in states)), flush=True)
                    told = time.monotonic()
                time.sleep(pause)
    except KeyboardInterrupt:
        say("the jobs go on; python -m peft_align.cancel ends them", flush=True)
        raise
    settle([RunDir(planner.root, state.run_id) for state in states if state.state != "done"])
    with suppress(Unanswered):
        states, _ = cluster_states(planner, [planner.item(item.run) for item in items])
    say(summary(Counter(state.state for state in states)), flush=True)
    return states
