"""What lies under a root that no result depends on, or that nobody asks for any more. Nothing is removed here.

Records, adapters, samples, answers of judges and selections are never found, unless they belong to runs or evaluations
that are asked for by name (UNASKED). What a living process holds is left out, and so is whatever a link leads to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.errors import InputError
from peft_align.grid.expand import build_sweep
from peft_align.grid.external import with_adapters
from peft_align.grid.planner import Planner
from peft_align.launch import queue
from peft_align.store.records import cache_dir, complete, read_json
from peft_align.store.removal import REMOVED, Leftover, below, folders_of, leftover
from peft_align.store.runs import RunDir
from peft_align.store.submissions import Submission, submissions

OURS = ("runs", "sweeps", "reference", "tokenized", "judges")  # folders of a root
RECENT = 3600  # seconds in which what was written or used may still be in use
WHAT = {
    "states": "training states and attempts in runs that are done",
    "temporary": "temporary files that kills left",
    "caches": "reference values and token ids, used least recently, beyond disk.cache_gb",
    "code": "frozen code of Slurm jobs that have ended",
    "logs": "logs of workers, and their job files, of runs that have been done for days=N",
    "evaluations": "evaluations and judgements that no sweep under the root asks for any more",
    "runs": "runs that no sweep under the root names, with all that they hold",
    "models": "models converted or built on this machine, in its cache folder",
}
BY_ITSELF = ("states", "temporary", "caches", "code")  # what is found where nothing is named


@dataclass
class Leftovers:
    """Looks through one root.

    Attributes:
        root: resolved.
        cache_bytes: what may stay of the caches.
        days: age of logs.
        notes: what was left out, and why.
    """

    root: Path
    cache_bytes: float
    days: float
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        links = [place for place in OURS if (self.root / place).is_symlink()]
        self.notes += [f"{place} is a link, which is not followed" for place in links]

    def find(self, what: str) -> list[Leftover]:
        """The leftovers of one kind of WHAT."""
        finders: Mapping[str, Callable[[], Iterator[Leftover]]] = {
            "states": self._states,
            "temporary": self._temporary,
            "caches": self._caches,
            "code": self._code,
            "logs": self._logs,
            "evaluations": self._evaluations,
            "runs": self._runs,
            "models": self._models,
        }
        return [found for found in finders[what]() if found.run is None or not self._held(found.run)]

    @cached_property
    def runs(self) -> list[RunDir]:
        return [RunDir(self.root, folder.name) for folder in folders_of(self.root / "runs")]

    def _held(self, run: str) -> bool:
        """Whether a living process works on the run; said once."""
        if not RunDir(self.root, run).is_locked():
            return False
        note = f"runs/{run} is left alone: a process works on it"
        self.notes += [note] if note not in self.notes else []
        return True

    def _states(self) -> Iterator[Leftover]:
        for run in self.runs:
            places = [run.state, run.state.with_name("state.new"), run.attempt]
            there = [place for place in places if place.is_dir() and not place.is_symlink()]
            if there and not (run.attempt / "train.json").is_file() and is_done(run):  # that one is to be put in place
                yield from (leftover(place, run.id) for place in there)

    def _temporary(self) -> Iterator[Leftover]:
        for place in OURS:
            for path in _walk(self.root / place):
                inside = path.relative_to(self.root / place).parts
                yield leftover(path, inside[0] if place == "runs" and len(inside) > 1 else None)

    def _caches(self) -> Iterator[Leftover]:
        entries = [Path(entry.path) for entry in below(self.root / "reference") if entry.is_dir(follow_symlinks=False)]
        entries += [Path(entry.path) for entry in below(self.root / "tokenized") if entry.name.endswith(".npz")]
        sizes = [leftover(path) for path in entries if not path.name.endswith(REMOVED)]
        total = sum(each.bytes for each in sizes)
        for each in sorted(sizes, key=lambda found: found.path.stat().st_mtime):
            if total <= self.cache_bytes or _is_recent(each.path):
                return
            total -= each.bytes
            yield each

    def _code(self) -> Iterator[Leftover]:
        frozen = [place for sweep in folders_of(self.root / "sweeps") for place in folders_of(sweep / "code")]
        if not frozen:
            return
        known = submissions(self.root)
        try:
            living = self._living(known)
        except queue.SlurmError as error:
            self.notes.append(f"frozen code is left alone: {error}")
            return
        needed = {Path(each.content["folder"]).resolve() for each in known if _may_run(each, living)}
        ended = {Path(each.content["folder"]).resolve() for each in known} - needed
        for place in frozen:  # one that no submission has may be about to get one
            if place.resolve() in ended or (place.resolve() not in needed and not _is_recent(place)):
                yield leftover(place)

    def _living(self, known: Sequence[Submission]) -> set[str]:
        """The jobs that Slurm has not ended. Raises SlurmError where it cannot be asked."""
        jobs = {job: name for each in known for job, name in each.names.items()}
        if jobs and not queue.is_there():
            raise queue.SlurmError("whether its jobs have ended is not known: Slurm is not on this machine")
        return {task.job for task in queue.live_tasks(jobs, {each.content["user"] for each in known}).values()}

    def _logs(self) -> Iterator[Leftover]:
        before = time.time() - self.days * 86400
        done = {run.id for run in self.runs if is_done(run)}
        for run in self.runs:
            if run.id in done and run.log.is_file() and run.log.stat().st_mtime < before:
                yield leftover(run.log, run.id)
        for sweep in folders_of(self.root / "sweeps"):
            for entry in below(sweep / "jobs"):
                job = Path(entry.path)
                if job.suffix != ".json" or entry.stat(follow_symlinks=False).st_mtime >= before:
                    continue
                told = (read_json(job) or {}).get("runs") or []
                names = {run["id"] for run in told if isinstance(run, dict)}
                if names <= done and not any(self._held(name) for name in names):
                    yield from (leftover(path) for path in (job, job.with_suffix(".log")) if path.is_file())

    @cached_property
    def manifests(self) -> list[dict[str, Any]]:
        """What was asked for by the sweeps under the root."""
        read = (read_json(folder / "sweep.json") for folder in folders_of(self.root / "sweeps"))
        return [manifest for manifest in read if manifest]

    def _evaluations(self) -> Iterator[Leftover]:
        asked: dict[str, set[str]] = {}
        opaque: set[str] = set()  # runs of which it is not known
        for manifest in self.manifests:
            try:
                found = self._asked(manifest)
            except InputError as error:
                words = " ".join(manifest["command"])
                self.notes.append(
                    f"evaluations of a sweep are left alone, it cannot be asked for any more: {words}: {error}"
                )
                opaque |= set(manifest["runs"])
                continue
            for name, names in found.items():
                asked.setdefault(name, set()).update(names or ())
                opaque |= {name} if names is None else set()
        for run in self.runs:
            if run.id in opaque or run.id not in asked:  # of the second, see `runs`
                continue
            for evaluation in folders_of(run.path / "evaluations"):
                if evaluation.name not in asked[run.id]:
                    yield leftover(evaluation, run.id)
                    continue
                for judgement in folders_of(evaluation / "judgements"):
                    if f"{evaluation.name}/{judgement.name}" not in asked[run.id]:
                        yield leftover(judgement, run.id)

    def _asked(self, manifest: Mapping[str, Any]) -> dict[str, set[str] | None]:
        """Run -> names of the evaluations, and of judgements below them, that a sweep asks for; None: not known now."""
        dirs = [f"--config-dir={folder}" for folder in manifest["config_dirs"]]
        words = [word for word in manifest["command"] if not word.lstrip("+").startswith("root=")]
        line = parse([*words, *dirs], own=["adapter", "cell"])
        sweep = build_sweep(ConfigSpace(line.config_dirs, line.hydra), line)
        if "adapter" in line.own:
            sweep = with_adapters(sweep, list(map(str, line.own["adapter"])))
        found: dict[str, set[str] | None] = {}
        for item in Planner(self.root, sweep.config.hub.mirror).plan(sweep.runs):
            names = {request.name for request in item.requests}
            names |= {f"{judgement.request.name}/{judgement.name}" for judgement in item.judgements}
            found[item.run.id] = None if item.to_make else names
        return found

    def _runs(self) -> Iterator[Leftover]:
        named = {run for manifest in self.manifests for run in manifest["runs"]}
        parents = {run.id: (read_json(run.path / "run.json") or {}).get("parents") or [] for run in self.runs}
        fresh = set(named)
        while fresh:  # what they start from is theirs too
            fresh = {parent for run in fresh for parent in parents.get(run, ())} - named
            named |= fresh
        for run in self.runs:
            if run.id not in named and not _is_recent(run.path):
                yield leftover(run.path, run.id)

    def _models(self) -> Iterator[Leftover]:
        for entry in below(cache_dir() / "models"):
            if entry.is_dir(follow_symlinks=False):
                yield leftover(Path(entry.path))


def _may_run(submission: Submission, living: set[str]) -> bool:
    """Whether a job of a submission lives, or may still come to: it is submitted by hand, or just now."""
    content = submission.content
    open_ends = any(not array["job"] for array in content["arrays"]) and not content.get("refused")
    return bool(content.get("dry_run") or living & set(submission.names) or open_ends)


def is_done(run: RunDir) -> bool:
    """Whether a run was made, or evaluated, and what its records name is there."""
    record = run.train_record()
    if record is not None:
        folders = {int(step): entry["files"] for step, entry in record["checkpoints"].items()}
        wrong = [complete(run.checkpoint(step), files) for step, files in folders.items()]
        wrong += [complete(run.adapter, folders[max(folders)]), complete(run.path, record["metrics"])]
        return not any(wrong)
    made = run.merge_record() is not None
    return (made or run.id.startswith(("baseline-", "external-"))) and run.failure() is None and run.progress() is None


def _walk(folder: Path) -> Iterator[Path]:
    """Temporary files that are an hour old, and folders that were being deleted, below a folder."""
    for entry in below(folder):
        path, hidden = Path(entry.path), entry.name.startswith(".")
        unfinished = entry.name.endswith(".tmp") or path.parent.name == "code"  # a copy of the code that is not whole
        if hidden and (entry.name.endswith(REMOVED) or (unfinished and not _is_recent(path))):
            yield path
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(path)


def _is_recent(path: Path) -> bool:
    """Whether it was written or used in the last hour."""
    try:
        return time.time() - os.lstat(path).st_mtime < RECENT
    except OSError:
        return True
