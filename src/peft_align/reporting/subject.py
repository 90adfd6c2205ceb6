"""What a report is of: a table, what is known of the runs behind it, and where it is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft_align.config.compose import ConfigSpace
from peft_align.errors import Fault, InputError
from peft_align.grid.planner import Item
from peft_align.grid.runs import Sweep
from peft_align.reporting.coverage import Coverage, coverage, of_table
from peft_align.reporting.frame import Frame, frame_of
from peft_align.reporting.published import as_table
from peft_align.reporting.stored import identity_of, read_tables
from peft_align.reporting.table import Row, judges_of, rows
from peft_align.reporting.told import Told, told_of

RECORDS = ("train.json", "merge.json", "failed.json")  # of a run, whose change changes the report


@dataclass(frozen=True)
class Place:
    """A root, and the state of the runs under it; a run that several roots have stands in each."""

    root: Path
    items: list[Item]


@dataclass(frozen=True)
class Subject:
    """What a report is of.

    Attributes:
        space: the options, whose comparisons and claims are asked.
        folder: where the report goes.
        places: where the runs lie; nowhere, of a table alone.
        items: the state of each run, once; none, of a table alone.
        told: what was read of them, by id; of a run under several roots, that of one.
        sweep: where one alone is reported on in its own folder.
    """

    space: ConfigSpace
    frame: Frame
    table: list[Row]
    covered: Coverage
    folder: Path
    places: tuple[Place, ...] = ()
    items: tuple[Item, ...] = ()
    told: Mapping[str, Told] = field(default_factory=dict)
    sweep: Sweep | None = None

    @property
    def root(self) -> Path:
        """Where what has no root of its own is looked for: the first."""
        return self.places[0].root if self.places else self.folder


def of_sweep(space: ConfigSpace, sweep: Sweep, places: Sequence[Place], folder: Path) -> Subject:
    """A sweep of which runs lie under one root or several; of what two have, the first is taken."""
    identities: dict[str, list[object]] = {}
    found: set[tuple[object, ...]] = set()
    table: list[Row] = []
    told: dict[str, Told] = {}
    for i, place in enumerate(places):
        known = told_of(place.items, place.root)
        told |= {item.run.id: known[item.run.id] for item in place.items if item.done or item.run.id not in told}
        own = rows(sweep, place.items, place.root, known, identities)
        table += [row for row in own if identity_of(row) not in found] if i else own
        found |= {identity_of(row) for row in own} if len(places) > 1 else set()
    if len(places) > 1:
        order = {run.id: i for i, run in enumerate(sweep.runs)}
        table.sort(key=lambda row: order[row["run_id"]])
    frame = frame_of(sweep, judges_of(identities))
    items = together(places)
    return Subject(space, frame, table, coverage(sweep, items), folder, tuple(places), tuple(items), told)


def together(places: Sequence[Place]) -> list[Item]:
    """The state of each run over all roots: what is there in one of them is not missing."""
    found: dict[str, Item] = {}
    for item in (item for place in places for item in place.items):
        known = found.get(item.run.id)
        if known is None:
            found[item.run.id] = item
            continue
        first, other = sorted((known, item), key=lambda each: each.to_make is not None)
        requests = {(request.benchmark, request.step) for request, _ in other.missing}
        judged = {(j.request.benchmark, j.request.step, j.option) for j, _ in other.unjudged}
        missing = [each for each in first.missing if (each[0].benchmark, each[0].step) in requests]
        unjudged = [each for each in first.unjudged
                    if (each[0].request.benchmark, each[0].request.step, each[0].option) in judged]  # fmt: skip
        found[item.run.id] = replace(first, missing=missing, unjudged=unjudged)
    return list(found.values())


def of_tables(space: ConfigSpace, paths: Sequence[Path], folder: Path | None) -> Subject:
    """Tables alone, without what they were made from. Raises InputError."""
    if not paths:
        raise InputError([Fault("--from", "names no table", "give results.parquet of a sweep's folder")])
    frame, table = read_tables(paths)
    folder = folder or paths[0].with_name(f"{paths[0].stem}_report")
    return Subject(space, frame, table, of_table(frame, table), folder)


def of_published(space: ConfigSpace, folder: Path) -> Subject:
    """The study's published numbers, as if they were a sweep's table. Raises InputError."""
    frame, table = as_table(space)
    return Subject(space, frame, table, of_table(frame, table), folder)


def is_free(folder: Path) -> None:
    """Raise InputError where a report would overwrite that of a sweep, or there is no folder."""
    told = None
    if (folder / "sweep.json").exists():
        told = "is the folder of a sweep, whose own report lies there"
    elif folder.exists() and not folder.is_dir():
        told = "is not a folder"
    if told:
        raise InputError([Fault(f"--to {folder}", told, "give another folder, or one to be made")])


def elsewhere(subject: Subject, folder: Path | None) -> Subject:
    """The same with another folder, if one is given."""
    return subject if folder is None else replace(subject, folder=folder, sweep=None)


def state_of(places: Sequence[tuple[Path, Sequence[str]]], files: Sequence[Path] = ()) -> str:
    """A digest that changes when a record of one of these runs, or one of the files, does; nothing is opened.

    What changes while a run works (its progress, log, states) has no part in it.
    """
    found = hashlib.sha256()
    for root, ids in places:
        for run_id in ids:
            for path in _records(root / "runs" / run_id):
                found.update(_stamp(path))
    for file in files:
        found.update(_stamp(str(file)))
    return found.hexdigest()


def _records(run: Path) -> Iterator[str]:
    yield from (f"{run}/{name}" for name in RECORDS)
    for evaluation in _folders(f"{run}/evaluations"):
        yield f"{evaluation}/record.json"
        yield from (f"{judgement}/record.json" for judgement in _folders(f"{evaluation}/judgements"))


def _folders(path: str) -> list[str]:
    try:
        return sorted(f"{path}/{name}" for name in os.listdir(path))
    except OSError:
        return []


def _stamp(path: str) -> bytes:
    try:
        stat = os.stat(path)
    except OSError:
        return b"-"
    return f"{path} {stat.st_mtime_ns} {stat.st_size} {stat.st_ino}\n".encode("utf-8", "surrogateescape")
