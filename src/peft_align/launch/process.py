"""A worker as a process: how it is asked to stop, where what it prints goes, whose death it shares."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.errors import disk_fault
from peft_align.terminal import say

DISK = 64  # the exit code of code_of_disk is this and the errno
PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """The job was asked to stop."""

    @property
    def signal(self) -> signal.Signals:
        return signal.Signals(int(self.code or 0) - 128)

    @property
    def told(self) -> tuple[str, str]:
        """Reason and kind for the record. USR1 is Slurm's word before a time limit; TERM may mean anything."""
        if self.signal == signal.SIGUSR1:
            return "its time limit is near", "time_limit"
        return f"stopped by signal {self.signal.name}", "stopped"


@dataclass
class Asked:
    """Whether this process was asked to stop: at once, or, in training, after the step that is under way."""

    by: int = 0  # the signal
    waits: bool = False

    def __call__(self, signum: int, frame: Any = None) -> None:
        if self.by or not self.waits:
            raise Stopped(128 + signum)
        self.by = signum

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """While it lasts, the first signal is only noted."""
        before, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = before


asked_to_stop = Asked()


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Everything this process prints, of C code too, goes to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])


def code_of_disk(error: OSError) -> int:
    """The exit code of a worker whose disk takes nothing, not even the record of a failure; other errors are raised."""
    told = disk_fault(error)
    if told is None:
        raise error
    with suppress(OSError):
        say(told, file=sys.stderr)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter fails over what is unwritten
    return DISK + int(error.errno or 0)


def die_with_parent() -> None:
    """On Linux, have the kernel end this process when its parent is killed: no worker goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
