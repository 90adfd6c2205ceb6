"""One directory a run, shared by all sweeps under one root.

runs/<id>/
    run.json                     what the run is; written when it starts
    train.json                   the record of training, written last
    adapter/                     the last checkpoint, in PEFT's format
    checkpoints/step-000100/     the adapter at each step asked for
    metrics.jsonl                one line a step
    attempt/                     a training in progress; committed as a whole when it is complete
    state/step-000050/           what it can go on from; the last ones of a training in progress
    merge.json, merged/<form>/   of a merge: its recipe, which is the product, and what was saved of it besides
    evaluations/<name>/          samples.jsonl.gz, and record.json written last
    progress.json, failed.json   what happens now; why it stopped
    lock, lease/                 who is at it (store/leases.py)
    history.jsonl                one line for each time that it stopped, or came to its end after that
    train.log                    what the job printed
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_align.secrecy import redacted
from peft_align.store.leases import Lost, check, hold, is_held
from peft_align.store.records import (
    Damaged,
    forget_damage,
    notice_of,
    read_json,
    remove_tree,
    set_aside,
    verify,
    write_json,
)
from peft_align.store.shapes import EVALUATION, JUDGEMENT, MERGE, TRAIN, sound, wrong

FORMAT = 1  # of the records; one of another format is taken for absent
PRODUCTS = ("adapter", "checkpoints", "metrics.jsonl")
UNFINISHED = "unfinished.jsonl"  # texts of an evaluation that is under way
# What a run's directory holds, by what is made there.
FILES = (
    *("run.json", "train.json", "merge.json", "metrics.jsonl", "progress.json", "failed.json", "history.jsonl"),
    *("train.log", "lock"),
)
FOLDERS = ("adapter", "checkpoints", "attempt", "state", "merged", "evaluations", "lease")
WORKER = "PEFT_ALIGN_WORKER_PID"  # of the worker that has this process train for it
# Why a run stopped. By itself: an error, too much memory, a kill, a time limit that it did not get further in.
COUNTED = ("failed", "out_of_memory", "killed", "time_limit")
# Or not: the cluster took its node or its place, someone stopped it, a parent is not done, nobody knows.
STOPS = (*COUNTED, "preempted", "node_failure", "requeued", "cancelled", "stopped", "blocked", "lost")


@dataclass(frozen=True)
class RunDir:
    """Paths and records of one run."""

    root: Path
    id: str

    @cached_property
    def path(self) -> Path:
        return self.root / "runs" / self.id

    @property
    def attempt(self) -> Path:
        return self.path / "attempt"

    @property
    def state(self) -> Path:
        """What a continuation needs while the run is not done: a folder for each state."""
        return self.path / "state"

    def states(self) -> list[Path]:
        """The training states, newest first; a folder without a record was never whole."""
        steps = [int(name) for folder in self.state.glob("step-*") if (name := folder.name[len("step-") :]).isdigit()]
        found = [self.state / step_name(step) for step in sorted(steps, reverse=True)]
        return [folder for folder in found if (folder / "record.json").is_file()]

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def merged(self, form: str) -> Path:
        return self.path / "merged" / form

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / step_name(step)

    @cached_property
    def _evaluations(self) -> Path:
        return self.path / "evaluations"

    def evaluation(self, name: str) -> Path:
        return self._evaluations / name

    def judgement(self, evaluation: str, name: str) -> Path:
        return self.evaluation(evaluation) / "judgements" / name

    def train_record(self) -> dict[str, Any] | None:
        return read_record(self.path / "train.json", TRAIN)

    def merge_record(self) -> dict[str, Any] | None:
        return read_record(self.path / "merge.json", MERGE)

    def evaluation_record(self, name: str) -> dict[str, Any] | None:
        return read_record(self._evaluations.joinpath(name, "record.json"), EVALUATION)

    def judgement_record(self, evaluation: str, name: str) -> dict[str, Any] | None:
        return read_record(self.judgement(evaluation, name) / "record.json", JUDGEMENT)

    def failure(self) -> dict[str, Any] | None:
        """Why it stopped; stage, kind and reason are always told."""
        told = read_json(self.path / "failed.json")
        unknown = {"stage": "unknown stage", "kind": "failed", "reason": "failed.json does not say why"}
        return None if told is None else unknown | sound(told)

    def progress(self) -> dict[str, Any] | None:
        """What is being done; stage and time are always told."""
        told = read_json(self.path / "progress.json")
        return None if told is None else {"stage": "unknown stage", "time": time.time()} | sound(told)

    def report_progress(self, **now: Any) -> None:
        """Say what is being done, for `status` and the live table. Lost in a crash, so it is not synced to disk.

        Raises:
            Lost: this process had the run, and another one took it over.
        """
        self.check()
        now |= {
            "time": time.time(),
            "pid": int(os.environ.get(WORKER) or os.getpid()),
            "host": os.uname().nodename,
            "task": this_task(),
        }
        write_json(self.path / "progress.json", now, durable=False)

    def end_progress(self) -> None:
        """Say that nothing is being done any more, unless another process took the run over."""
        with suppress(Lost):
            self.check()
            (self.path / "progress.json").unlink(missing_ok=True)

    def fail(self, stage: str, reason: str, kind: str = "failed", **more: Any) -> None:
        """Record why the run stopped.

        Args:
            stage: that stopped.
            reason: for people.
            kind: one of STOPS.
            more: of the record.
        """
        self.check()
        before = self.progress() or {}
        reason = redacted(reason)
        content = {"stage": stage, "kind": kind, "reason": reason, "time": time.time(), "step": before.get("step") or 0}
        content |= {"task": before.get("task") or this_task(), "reached": self.reached(), **more}
        self.remember(content)
        write_json(self.path / "failed.json", content)
        (self.path / "progress.json").unlink(missing_ok=True)

    def remember(self, content: dict[str, Any]) -> None:
        """Add a line to the history."""
        self.path.mkdir(parents=True, exist_ok=True)  # it may have stopped before it wrote anything
        with (self.path / "history.jsonl").open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":  # a crash cut the line before
                file.write(b"\n")
            file.write(json.dumps(content).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """How often it stopped, oldest first; a line that a crash cut is left out."""
        try:
            lines = (self.path / "history.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [sound(entry) for entry in found if isinstance(entry, dict)]

    def attempts(self) -> int:
        """How often it stopped by itself since it last got further; what the cluster did is not counted."""
        count, best = 0, [-1]
        for entry in self.history():
            if entry.get("kind") == "blocked":
                continue
            reached = list(entry.get("reached") or [0, 0, 0])
            if entry.get("kind") == "done" or reached > best:
                count, best = 0, reached
            count += entry.get("kind") in COUNTED
        return count

    def reached(self) -> list[int]:
        """How far it is, so that it would not begin there again: records, the saved step of training, texts, values."""
        records = [self.path / "train.json", self.path / "merge.json", *self.path.glob("evaluations/**/record.json")]
        states, progress = self.states(), self.progress() or {}
        step = int(states[0].name[len("step-") :]) if states else 0
        counted = ("evaluate", "judge", "reference")
        texts = int(progress.get("step") or 0) if progress.get("stage") in counted else 0
        return [sum(map(Path.is_file, records)), step, texts]

    def clear_state(self) -> None:
        """Forget an earlier failure and what was in progress."""
        for name in ("failed.json", "progress.json"):
            (self.path / name).unlink(missing_ok=True)

    def remove_leftovers(self, *, is_trained: bool) -> None:
        """Delete what killed processes left besides products; the caller holds the lock.

        Args:
            is_trained: no attempt is to be gone on with.
        """
        recorded = (p for p in self.path.glob(f"evaluations/*/{UNFINISHED}") if (p.parent / "record.json").is_file())
        for path in [*self.path.rglob(".*.tmp"), *recorded]:
            path.unlink(missing_ok=True)
        for folder in (self.attempt, self.state, self.state.with_name("state.new")) if is_trained else ():
            remove_tree(folder)

    def product(self, step: int | None = None) -> Path:
        """The folder of a checkpoint (None: the last one, adapter/), its content checked against the record.

        Raises:
            Damaged: there is no record, or a file is another one than was recorded.
        """
        record = self.train_record()
        if record is None:
            raise Damaged(f"{self.path} has no record of a finished training")
        folder = self.adapter if step is None else self.checkpoint(step)
        last = max(map(int, record["checkpoints"]))
        verify(folder, record["checkpoints"][str(last if step is None else step)]["files"])
        return folder

    def discard_record(self, why: str) -> None:
        """Have the run trained again by the next command, for its products are damaged; the caller holds its lock."""
        set_aside(self.path / "train.json", why)

    def commit_attempt(self) -> bool:
        """Put a complete attempt in the place of what was there; True if there was one.

        An attempt is complete when its own record is there. The record of the run is removed first and comes last, and
        every step can be repeated, so a kill anywhere in between is made good by the next call.
        """
        self.drop_links()
        record = self.attempt / "train.json"
        if read_record(record, TRAIN) is None:
            return False
        self.check()
        (self.path / "train.json").unlink(missing_ok=True)
        for name in PRODUCTS:
            fresh, place = self.attempt / name, self.path / name
            if not fresh.exists():
                continue  # moved by an earlier call
            if place.is_dir():
                remove_tree(place)
            fresh.replace(place)
        remove_tree(self.state)  # there is nothing to go on to
        record.replace(self.path / "train.json")
        forget_damage(self.path / "train.json")
        remove_tree(self.attempt)
        return True

    def drop_links(self) -> None:
        """Remove links in the place of what training writes and deletes: that would be done where they lead to."""
        for place in (self.attempt, self.state, self.state.with_name("state.new")):
            below = (Path(folder, name) for folder, *names in os.walk(place) for name in (*names[0], *names[1]))
            for path in [path for path in (place, *below) if path.is_symlink()]:
                path.unlink()

    @contextmanager
    def lock(self, ended: str | None = None) -> Iterator[bool]:
        """Hold the run against other processes; yields False if another one has it. See store/leases.py.

        Args:
            ended: a Slurm task that is known to be over, whose lease is taken over without waiting.
        """
        name = this_task()
        task = (name, int(os.environ.get("SLURM_RESTART_COUNT") or 0)) if name else None
        with hold(self.path, task, ended) as lease:
            yield lease is not None

    def is_locked(self, *, by_clock: bool = False) -> bool:
        """Whether a living process works on the run; `by_clock`: as far as the clock tells, see store/leases.py."""
        return is_held(self.path, by_clock=by_clock)

    def check(self) -> None:
        """Raise Lost if this process had the run, and another one took it over."""
        check(self.path)


def read_record(path: Path, shape: Any) -> dict[str, Any] | None:
    """A record that is whole, of this format and of its shape; None for any other, and where there is none."""
    record = read_json(path)
    whole = record is not None and record.get("format") == FORMAT and wrong(record, shape) is None
    return record if whole else None


def damage(path: Path, shape: Any) -> str | None:
    """Why a record is not used: it is damaged, or was set aside; None if it is used, or there never was one."""
    if not path.is_file():
        notice = read_json(notice_of(path))
        return str(notice.get("damage")) if notice else None
    record = read_json(path)
    if record is None:
        return f"its {path.name} is damaged: no JSON object"
    if record.get("format") != FORMAT:
        return f"its {path.name} is of format {str(record.get('format'))[:20]}, and this version reads {FORMAT}"
    told = wrong(record, shape)
    return None if told is None else f"its {path.name} is damaged: {told}"


def this_task() -> str | None:
    """The Slurm task that this process is, as squeue names it: JOB or ARRAY_INDEX."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")


def step_name(step: int) -> str:
    return f"step-{step:06d}"
