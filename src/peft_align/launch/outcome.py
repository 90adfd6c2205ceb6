"""Why runs stopped: as a worker knows it, and where it could not say a word, as Slurm does."""

from __future__ import annotations

import os
from collections.abc import Sequence

from peft_align.errors import InputError
from peft_align.launch import queue
from peft_align.store.runs import RunDir, this_task

GONE = "its job is gone, and Slurm knows nothing of it any more"


class Blocked(RuntimeError):
    """A run cannot start because its parent is not done."""


def kind_of(error: Exception) -> str:
    """What the record calls it: one of store.runs.STOPS."""
    if isinstance(error, Blocked):
        return "blocked"
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported
    return "out_of_memory" if is_memory else "failed"


def note_end_of_earlier(directory: RunDir) -> None:
    """If this task was started before and queued again by Slurm, say why it stopped then; the caller holds the lock.

    Slurm queues again what was preempted, after TERM, and what lost its node, without a word.
    """
    progress, failure = directory.progress(), directory.failure()
    restarted = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    if progress is not None:  # nobody is at it: the lock is ours
        mine = restarted and progress.get("task") == this_task()
        kind, what = ("node_failure", "its node failed") if mine else ("lost", "its process was gone")
        directory.fail(str(progress.get("stage")), what, kind)
    elif failure is not None and failure.get("kind") == "stopped" and failure.get("task") == this_task() and restarted:
        directory.remember(
            {
                **failure,
                "kind": "preempted",
                "reason": "taken off its node and queued again: preempted, or by an administrator",
            }
        )


def reason(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, InputError):
        return str(error)
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Blocked) else f"{type(error).__name__}: {text}"


def settle(root_dirs: Sequence[RunDir]) -> None:
    """Record, of runs whose task has ended without a word or only knew of a signal, what Slurm says of it.

    Args:
        root_dirs: runs that are not done; those that a process holds, or whose task lives, stay as they are.
    """
    open_ends = {}
    for directory in root_dirs:
        progress, failure = directory.progress(), directory.failure()
        told = progress or (failure if failure and failure.get("kind") == "stopped" else None)
        if told is not None and told.get("task") and not directory.is_locked():
            open_ends[directory.id] = (directory, told)
    tasks = sorted({told["task"] for _, told in open_ends.values()})
    if not tasks or not queue.is_there():
        return
    try:
        living = queue.live_tasks({task.partition("_")[0] for task in tasks})
        ends = queue.ends_of([task for task in tasks if task not in living])
    except queue.SlurmError:
        return
    for directory, told in open_ends.values():
        task = told["task"]
        if task in living:
            continue
        end = ends.get(task)
        kind, what = (
            (end.kind, end.told) if end else ("lost", "its job is gone, and Slurm knows nothing of it any more")
        )
        with directory.lock() as mine:
            if mine:
                step = told.get("step") or 0
                directory.fail(str(told["stage"]), what, kind, step=step, task=task, log=str(directory.log))
