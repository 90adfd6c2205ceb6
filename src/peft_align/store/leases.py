"""Leases: who works on a folder that several machines share, where there is no server to ask.

    FOLDER/lock                a flock, where the file system has them: the kernel lets go of it when its holder dies
    FOLDER/lease/000007        the seventh lease: who holds it; its time of change is moved on while the holder lives
    FOLDER/lease/000007.free   the seventh holder is done

A lease is taken by making the file of the next number, which one process alone can do on any file system (a hard link,
as on NFS open's O_EXCL may not be kept). The highest number holds; who finds a higher one than its own was taken for
dead and must not write any more (`check`). A holder on this machine is dead if the kernel let go of its flock. One on
another machine is dead if its lease did not change for SILENCE seconds as this process counts them: no two clocks are
compared, so neither a wrong clock nor one that jumps makes a living holder dead or a dead one live.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT = 15.0  # seconds between signs of life
SILENCE = 120.0  # seconds without one after which a holder on another machine is taken for dead; NFS shows times late
LOOKS = 10  # at a flock, over a second: someone may just be looking whether it is held
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # of flock: another has it; any other error: there is no flock


class Lost(RuntimeError):
    """Another process took the lease over: this one was taken for dead, and must not write any more."""


@dataclass
class Lease:
    """A lease that this process holds."""

    folder: Path
    number: int
    lost: bool = False

    @property
    def path(self) -> Path:
        return self.folder / "lease" / f"{self.number:06d}"

    def check(self) -> None:
        """Raise Lost if another process has taken over."""
        self.lost = self.lost or max(_numbers(self.folder), default=0) > self.number
        if self.lost:
            raise Lost(f"{self.folder.name} is another process's now: this one gave no sign of life for too long")


Task = tuple[str, int]  # its name, and how often it was started again
_held: dict[str, Lease] = {}  # by folder
_watched: dict[str, tuple[tuple[int, int], float]] = {}  # folder -> lease as it was seen, and since when
_beating = threading.Lock()
_beats: list[threading.Thread] = []
os.register_at_fork(after_in_child=_held.clear)  # a child gives no signs of life for its parent


def machine() -> str:
    """Names the running kernel: equal for processes that see each other's flocks, in containers too."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.uname().nodename} {uuid.getnode()}"


@contextmanager
def hold(folder: Path, task: Task | None = None, ended: str | None = None) -> Iterator[Lease | None]:
    """Hold a folder against all other processes; yields None if another one has it.

    Args:
        folder: made if it is not there.
        task: of a scheduler that this process is part of. A holder from before the task was started again is dead.
        ended: a task that the scheduler knows to be over, and its holders with it.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        locked = _flock(file.fileno())
        lease = _taken(folder, task, ended, flock=locked) if locked is not False else None
        if lease is None:
            yield None
            return
        _held[str(folder.absolute())] = lease
        _beat()
        try:
            yield lease
        finally:
            del _held[str(folder.absolute())]
            if not lease.lost:
                with suppress(OSError):  # on a full disk; here the flock says it, elsewhere the silence
                    lease.path.with_suffix(".free").touch()


def check(folder: Path) -> None:
    """Raise Lost if this process held the folder and another one has it now. Nothing happens if it never did."""
    lease = _held.get(str(folder.absolute()))
    if lease is not None:
        lease.check()


def is_held(folder: Path, *, by_clock: bool = False) -> bool:
    """Whether a living process has the folder, as `hold` would find; nothing is written.

    Args:
        folder: that may be held.
        by_clock: take a holder on another machine for dead if this machine's clock says that its last sign of life is
            older than SILENCE. Enough to tell people at once, where `hold` has to see the silence itself.
    """
    try:
        with (folder / "lock").open("r") as file:
            locked = _flock(file.fileno(), shared=True, looks=1)
    except OSError:
        return False
    holder = _holder(folder, max(_numbers(folder), default=0)) if locked is not False else None
    if holder is None:
        return locked is False
    if by_clock and holder["machine"] != machine():
        return time.time() - float(holder["beat"]) / 1e9 < SILENCE
    return not _is_dead(folder, holder, None, None, flock=locked)


def _flock(descriptor: int, *, shared: bool = False, looks: int = LOOKS) -> bool | None:
    """True if we have it now, False if another has it, None where the file system has none."""
    for look in range(looks):
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in BUSY:
                return None
        if look + 1 < looks:
            time.sleep(0.1)
    return False


def _taken(folder: Path, task: Task | None, ended: str | None, *, flock: bool | None) -> Lease | None:
    """The next lease, if the last holder is done or dead and no other process is faster."""
    before = _numbers(folder)
    last = max(before, default=0)
    holder = _holder(folder, last)
    if holder is not None and not _is_dead(folder, holder, task, ended, flock=flock):
        return None
    lease = Lease(folder, last + 1)  # than that which was just looked at: of a later one we know nothing
    lease.path.parent.mkdir(exist_ok=True)
    fresh = lease.path.with_name(f".{uuid.uuid4().hex}.tmp")
    who = {"machine": machine(), "host": os.uname().nodename, "pid": os.getpid(), "born": _born(os.getpid())}
    who |= {"task": task[0], "start": task[1]} if task else {}
    try:
        fresh.write_text(json.dumps(who) + "\n", encoding="utf-8")
        os.link(fresh, lease.path)
    except FileExistsError:
        return None
    finally:
        fresh.unlink(missing_ok=True)
    if max(_numbers(folder)) > lease.number:  # what we saw is long past
        lease.path.unlink(missing_ok=True)
        return None
    _watched.pop(str(folder), None)
    for number in before:
        for old in (lease.path.with_name(f"{number:06d}"), lease.path.with_name(f"{number:06d}.free")):
            old.unlink(missing_ok=True)
    return lease


def _numbers(folder: Path) -> list[int]:
    """Of the leases that there are."""
    try:
        names = os.listdir(folder / "lease")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [int(name) for name in names if name.isdigit()]


def _holder(folder: Path, number: int) -> dict[str, Any] | None:
    """Who has this lease and is not done: the file's content, `number`, and `beat`, the last sign of life."""
    path = folder / "lease" / f"{number:06d}"
    if path.with_suffix(".free").exists():
        return None
    told: Any = {}
    try:
        with path.open(encoding="utf-8") as file:  # NFS looks at the server when a file is opened
            beat = os.fstat(file.fileno()).st_mtime_ns
            with suppress(ValueError):
                told = json.load(file)
    except FileNotFoundError:
        return None
    known = told if isinstance(told, dict) else {}  # a damaged one is some other machine's
    return {"machine": "", "pid": 0, "born": "", "task": None, "start": 0, **known, "number": number, "beat": beat}


def _is_dead(folder: Path, holder: dict[str, Any], task: Task | None, ended: str | None, *, flock: bool | None) -> bool:
    again = task is not None and holder["task"] == task[0] and int(holder["start"] or 0) < task[1]
    if again or (ended is not None and holder["task"] == ended):
        return True
    if holder["machine"] == machine():
        return bool(flock) or _born(holder["pid"]) != holder["born"]
    return _is_silent(folder, holder)


def _is_silent(folder: Path, holder: dict[str, Any]) -> bool:
    """Whether a lease has not changed while this process saw it, for SILENCE seconds."""
    seen, now = (holder["number"], holder["beat"]), time.monotonic()
    known = _watched.get(str(folder))
    if known is None or known[0] != seen:
        _watched[str(folder)] = seen, now
        return False
    return now - known[1] >= SILENCE


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks: its id may be another's later. Empty if there is no such."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _beat() -> None:
    """Have a thread give the signs of life of all that this process holds."""
    with _beating:
        if not any(thread.is_alive() for thread in _beats):
            _beats[:] = [threading.Thread(target=_give_signs, name="leases", daemon=True)]
            _beats[0].start()


def _give_signs() -> None:
    while True:
        time.sleep(BEAT)
        for lease in list(_held.values()):
            with suppress(OSError, Lost):  # who writes finds out
                lease.check()
                os.utime(lease.path)
