"""Why runs stopped: as a worker knows it, and where it could not say a word, as Slurm does."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_align.errors import DISK_FAULTS, InputError, WorkError, disk_fault
from peft_align.launch import queue
from peft_align.store.runs import RunDir, this_task

LOG_END = 65536  # bytes of a log that are looked at
FULL = 2**20  # bytes: with less left, a disk is full
CANCELLED = re.compile(r"CANCELLED AT \S+(?: DUE TO ([A-Z]+(?: [A-Z]+)?))?")
REQUEUES = {  # what Slurm says in the log -> kind and reason for the record
    "PREEMPTION": ("preempted", "preempted, and queued again"),
    "NODE FAILURE": ("node_failure", "its node failed; queued again"),
    "JOB REQUEUE": ("requeued", "queued again by an administrator or its owner"),
    "TIME LIMIT": ("time_limit", "its time limit came before it could save its state"),
}
GONE = "its job is gone, and Slurm knows nothing of it any more"


class Blocked(WorkError):
    """A run cannot start because its parent is not done."""


def kind_of(error: Exception) -> str:
    """What the record calls it: one of store.runs.STOPS."""
    if isinstance(error, Blocked):
        return "blocked"
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported
    return "out_of_memory" if is_memory else "failed"


def note_end_of_earlier(directory: RunDir, log: Path | None = None) -> None:
    """If this task was started before and queued again by Slurm, say why it stopped then; the caller holds the lock.

    Args:
        directory: the run's.
        log: of the task, in which Slurm left its reason.
    """
    progress, failure = directory.progress(), directory.failure()
    restarted = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    if progress is not None:  # nobody is at it: the lock is ours
        mine = restarted and progress.get("task") == this_task()
        kind, what = (last_word(log) or REQUEUES["NODE FAILURE"]) if mine else ("lost", "its process was gone")
        directory.fail(str(progress.get("stage")), what, kind)
    elif failure is not None and failure.get("kind") == "stopped" and failure.get("task") == this_task() and restarted:
        kind, what = last_word(log) or REQUEUES["JOB REQUEUE"]
        directory.remember({**failure, "kind": kind, "reason": what})


def last_word(log: Path | None) -> tuple[str, str] | None:
    """Kind and reason of what Slurm last ended a task for, from the line that it leaves in the log (as of 22.05)."""
    try:
        text = log.read_bytes()[-LOG_END:].decode(errors="replace") if log else ""
    except OSError:
        return None
    ends = CANCELLED.findall(text)
    return REQUEUES.get(ends[-1]) if ends else None


def details(error: Exception) -> dict[str, Any]:
    """What else a record has of it: of a training that failed, the step, the value and the rows."""
    found: dict[str, Any] = getattr(error, "details", {})
    return found


def reason(error: BaseException, folder: Path) -> str:
    """One line for people.

    Args:
        error: that stopped a run.
        folder: of the run: what writes by itself (torch, safetensors) does not always say that its disk is full.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and (told := disk_fault(error)):
        return told
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Blocked):
        return text
    return f"{type(error).__name__}: {text}" + (f" ({DISK_FAULTS[errno.ENOSPC]})" if _is_full(folder) else "")


def _is_full(folder: Path) -> bool:
    with suppress(OSError):
        disk = os.statvfs(folder)
        return disk.f_bavail * disk.f_frsize < FULL
    return False


def settle(root_dirs: Sequence[RunDir]) -> None:
    """Record, of runs whose task has ended without a word or only knew of a signal, what Slurm says of it.

    Args:
        root_dirs: runs that are not done; those that a process holds, or whose task lives, stay as they are.
    """
    open_ends = {}
    for directory in root_dirs:
        progress, failure = directory.progress(), directory.failure()
        told = progress or (failure if failure and failure.get("kind") == "stopped" else None)
        if told is not None and told.get("task"):
            open_ends[directory.id] = (directory, told)
    tasks = sorted({told["task"] for _, told in open_ends.values()})
    if not tasks or not queue.is_there():
        return
    try:
        living = queue.live_tasks({task.partition("_")[0]: None for task in tasks})
        ends = queue.ends_of([task for task in tasks if task not in living])
    except queue.SlurmError:
        return
    for directory, told in open_ends.values():
        task = told["task"]
        if task in living:
            continue
        end = ends.get(task)
        kind, what = (end.kind, end.told) if end else ("lost", GONE)
        with directory.lock(ended=task) as mine:
            if mine and told in (directory.progress(), directory.failure()):  # nothing has happened since
                step = told.get("step") or 0
                directory.fail(str(told["stage"]), what, kind, step=step, task=task, log=str(directory.log))
