"""One sweep that is disturbed again and again, then ended by the same command, and what came of it."""

from __future__ import annotations

import errno
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from audit import Fault, changes_in
from sweeps import WORDS, Ended, Server, Started, differences, finished, prepare, touched, trained_at_once

COLUMNS = ("lost", "wrong", "redone", "double", "stray")


@dataclass
class Outcome:
    """A row of the table: how often something happened, and what is not as it must be after it."""

    fault: str
    count: int
    found: list[str]
    note: str = ""

    def row(self) -> str:
        counts = [str(sum(each.startswith(f"{column}:") for each in self.found)) for column in COLUMNS]
        return f"| {' | '.join([self.fault, str(self.count), *counts, self.note])} |"


OUTCOMES: list[Outcome] = []  # of all tests of this process


def sum_up(name: str, since: int) -> None:
    """Have one row for the outcomes from this one on."""
    rows = OUTCOMES[since:]
    del OUTCOMES[since:]
    OUTCOMES.append(Outcome(name, sum(row.count for row in rows), [each for row in rows for each in row.found]))


def table() -> str:
    """The outcomes as Markdown."""
    head = ["fault", "count", *COLUMNS, "note"]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(' --- ' for _ in head)}|"]
    return "\n".join([*lines, *(outcome.row() for outcome in OUTCOMES)])


@dataclass
class Disturbed:
    """A folder with a sweep of its own.

    Attributes:
        name: of what happens to it.
        reference: the products of an undisturbed sweep.
    """

    name: str
    server: Server
    folder: Path
    reference: dict[str, object]
    words: tuple[str, ...] = WORDS
    count: int = 0
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (self.folder / "mine").is_dir():
            prepare(self.folder)

    @property
    def root(self) -> Path:
        return self.folder / "outputs"

    def command(self, fault: Fault | None = None, verb: str = "sweep", *more: str) -> Ended:
        """The command, with something that happens to it; what was finished before must be as it was."""
        kept = finished(self.root)
        ended = self.server.run(self.folder, verb, *self.words, *more, fault=fault)
        self.found += touched(self.root, kept)
        return ended

    def killed_after(self, seconds: float, who: str) -> None:
        """Start the command and kill the sweep, its workers or all of them after a time."""
        kept = finished(self.root)
        (self.folder / "told").unlink(missing_ok=True)
        started = self.server.start(self.folder, "sweep", *self.words)
        time.sleep(seconds)
        if who != "worker" or has_workers(started):
            started.kill(who)
            self.count += 1
        started.wait()
        self.found += touched(self.root, kept)

    def at_each_kind(self, do: str, who: tuple[str, ...] = ()) -> list[Ended]:
        """Break the first change of each kind, with as many commands as it takes; returns how they ended."""
        file, commands = self.folder / f"kinds-{do}-{'-'.join(who)}", []
        while True:
            before = kinds(file)
            fault = Fault(each_kind=str(file), do=do, who=who)
            commands.append(self.command(fault))
            self.count += len(kinds(file)) - len(before)
            if kinds(file) == before:
                assert commands[-1].code == 0, commands[-1].told[-3000:]
                return commands

    def end(self, note: str = "") -> None:
        """The same command once more: the sweep is complete, and equals an undisturbed one."""
        ended = self.command()
        self.found += differences(self.root, self.reference)
        self.found += trained_at_once(self.folder / "changes", self.root)
        OUTCOMES.append(Outcome(self.name, self.count, self.found, note))
        print(OUTCOMES[-1].row(), flush=True)  # a long run is looked into while it lasts
        assert ended.code == 0, ended.told[-3000:]
        assert self.count > 0
        assert self.found == []


def kinds(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def has_workers(started: Started, seconds: float = 20) -> bool:
    """Wait for a worker; False if the sweep ends without one."""
    deadline = time.monotonic() + seconds
    while not started.workers() and Path(f"/proc/{started.pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(started.workers())


def told_plainly(ended: Ended, number: int) -> None:
    """A command that a disk stopped says so in words, and how, without a traceback of its own."""
    assert ended.code in (0, 1, 2), (ended.code, ended.told[-3000:])
    lines = ended.told.splitlines()
    assert not any(line.startswith("Traceback") for line in lines), ended.told[-3000:]
    if ended.code:
        assert os.strerror(number) in ended.told or (number == errno.ENOSPC and "disk is full" in ended.told), (
            ended.told[-3000:]
        )


def changes_of(folder: Path) -> int:
    """How many changes a sweep made."""
    return len(changes_in(folder / "changes"))


def seed() -> int:
    """Of what is drawn: $FAULTS_SEED, or another one each time; it is printed, so that a failure can be had again."""
    chosen = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FAULTS_SEED={chosen}")
    return chosen
