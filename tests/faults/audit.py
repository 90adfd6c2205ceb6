"""Sees every change of the file system that this process asks for, and breaks one of them.

An audit hook of Python: it is told before each open, rename, remove, mkdir, ... Nothing of the package knows of it.
What C code writes by itself (safetensors, torch) it does not see; what Python does around that, it does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WIDTH = 768  # bytes of a line of the log, so that its size counts the lines
CHANGES = {  # event -> which argument is the path, which the folder's descriptor
    "open": (0, None),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.mkdir": (0, 2),
    "os.rmdir": (0, 1),
    "os.link": (1, 3),
    "os.truncate": (0, None),
    "os.chmod": (0, 2),
    "os.utime": (0, 3),
}
FREES = ("os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate")  # what a full disk lets happen
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Fault:
    """What is to happen, and when.

    Attributes:
        watch: folders whose changes count.
        log: one line a change, of all processes of a sweep.
        at: the number of the change that is broken (from 0); None: none by number.
        match: or a change whose "event path" this expression finds.
        nth: which of those (from 0).
        each_kind: or the first change of each kind (event and place, whatever the run): a file of the kinds that had
            theirs, so that a command which is started again and again breaks at one after the other.
        who: kinds of process it may happen in: "sweep", "worker"; none: in all.
        do: "kill" this process, "kill_parent" the sweep above a worker, "kill_all" both, "half" a write and then kill,
            or the name of an errno.
        stays: an errno stays for all changes after that.
        clock: seconds that time.time() is off, from each of these changes on: {"0": -3600, "40": 31536000}.
    """

    watch: list[str] = field(default_factory=list)
    log: str = ""
    at: int | None = None
    match: str = ""
    nth: int = 0
    each_kind: str = ""
    who: tuple[str, ...] = ()
    do: str = "kill"
    stays: bool = False
    clock: dict[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """What has sitecustomize.py install it."""
        return {"PEFT_ALIGN_TEST_FAULT": json.dumps(asdict(self)), "PYTHONPATH": self.python_path()}

    @staticmethod
    def python_path() -> str:
        here = Path(__file__).parent
        return os.pathsep.join([str(here / "site"), str(here), os.environ.get("PYTHONPATH", "")])


class Hook:
    """The hook of one process; armed once, before the first change."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.busy = False
        self.broken = False  # an errno that stays has begun
        self.role = ""

    def arm(self, fault: Fault) -> None:
        self.open_log(fault)
        self.expression = re.compile(fault.match) if fault.match else None
        if fault.clock:
            self.shift_clock(fault.clock)
        self.fault = fault

    def open_log(self, fault: Fault) -> None:
        """Anew in a fork: a lock is of the file as it was opened."""
        self.descriptor = os.open(fault.log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def shift_clock(self, clock: dict[str, float]) -> None:
        real = time.time
        times = sorted((int(at), offset) for at, offset in clock.items())

        def shifted() -> float:
            seen = os.fstat(self.descriptor).st_size // WIDTH
            return real() + ([0.0, *(offset for at, offset in times if at <= seen)][-1])

        time.time = shifted

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        fault = self.fault
        if fault is None or self.busy or event not in CHANGES:
            return
        self.busy = True
        try:
            path = changed(event, args)
            if path is None or not any(path.startswith(folder) for folder in fault.watch):
                return
            if self.due(fault, event, path):
                self.strike(fault, event, path)
        finally:
            self.busy = False

    def due(self, fault: Fault, event: str, path: str) -> bool:
        """Log the change, and say whether it is the one to break."""
        line = f"{os.getpid()} {event} {path}"
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        try:
            number = os.fstat(self.descriptor).st_size // WIDTH
            hits = 0
            if self.expression and self.expression.search(f"{event} {path}"):
                earlier = os.pread(self.descriptor, number * WIDTH, 0).decode().splitlines()
                hits = 1 + sum(bool(self.expression.search(each.partition(" ")[2].rstrip())) for each in earlier)
            os.write(self.descriptor, f"{line:<{WIDTH - 1}.{WIDTH - 1}}\n".encode())
        finally:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        if (fault.who and self.role not in fault.who) or (fault.do == "ENOSPC" and event in FREES):
            return False
        if fault.each_kind:
            return is_first(Path(fault.each_kind), kind_of(event, path, fault.watch))
        if fault.stays and fault.at is not None and number >= fault.at:
            return True
        return number == fault.at or hits == fault.nth + 1

    def strike(self, fault: Fault, event: str, path: str) -> None:
        if fault.do == "half":
            if event == "open" and not path.endswith("lock"):
                half_written(path)
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.do in ("kill_parent", "kill_all") and self.role == "worker":
            os.kill(os.getppid(), signal.SIGKILL)
            if fault.do == "kill_parent":
                return
        if fault.do.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, fault.do)
        raise OSError(number, os.strerror(number), path)


def changed(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that an event changes; None if it only reads."""
    if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
        return None
    which, folder = CHANGES[event]
    path = args[which]
    if isinstance(path, int) or path is None:
        return None
    path = os.fsdecode(path)
    if not os.path.isabs(path):
        at = args[folder] if folder is not None and len(args) > folder else -1
        path = os.path.join(
            os.readlink(f"/proc/self/fd/{at}") if isinstance(at, int) and at >= 0 else os.getcwd(), path
        )
    path = os.path.normpath(path)
    if (event == "os.mkdir" and os.path.isdir(path)) or (event == "os.remove" and not os.path.lexists(path)):
        return None  # asked for, to be sure of it
    return path


def kind_of(event: str, path: str, folders: Sequence[str]) -> str:
    """What a change is, whatever the run, the step, the time."""
    place = next(path.removeprefix(folder) for folder in folders if path.startswith(folder))
    place = re.sub(r"^/runs/[^/]+", "/runs/RUN", place)
    place = re.sub(r"\.[a-z0-9_]{8}(\.tmp|/|$)", r".X\1", place)
    place = re.sub(r"reference/([0-9a-f]{16})/(\.?)[0-9a-f]{2}\.", r"reference/H/\2B.", place)
    return f"{event} {re.sub(r'[0-9]+', 'N', re.sub(r'[0-9a-f]{8,}', 'H', place))}"


def is_first(file: Path, kind: str) -> bool:
    """Whether no process has come to this kind of change yet; then it is noted."""
    with file.open("a+") as known:
        fcntl.flock(known, fcntl.LOCK_EX)
        known.seek(0)
        if kind in known.read().splitlines():
            return False
        known.write(kind + "\n")
        return True


def half_written(path: str) -> None:
    """Leave what a kill in the middle of a write may leave: a part of a line at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, b'{"half": "wri')
    os.close(descriptor)


def changes_in(log: Path) -> list[tuple[int, str, str]]:
    """Process, event and path of each change of a log, in order."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [(int(pid), event, path) for pid, event, path in (line.rstrip().split(" ", 2) for line in lines)]


hook = Hook()


def install() -> Hook:
    """Have this process hooked; nothing happens before `arm`."""
    sys.addaudithook(hook)
    return hook
