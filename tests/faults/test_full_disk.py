"""A disk that takes nothing more: said in words, nothing half-written is taken for whole, the same command goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from audit import Fault
from disturbed import Disturbed, told_plainly

Disturb = Callable[..., Disturbed]


class Disk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    def mount(self, options: str) -> None:
        again = "remount," if os.path.ismount(self.place) else ""
        words = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(self.place)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Where the sweep's root will be."""
    made = Disk(tmp_path / "outputs")
    yield made
    if os.path.ismount(made.place):
        subprocess.run(["umount", str(made.place)], check=True)


@pytest.mark.slow
def test_a_full_disk_cut(disturb: Disturb) -> None:
    sweep = disturb("ENOSPC (cut)")
    ended = sweep.command(Fault(match=r"open .*/attempt/checkpoints/", do="ENOSPC"))
    sweep.count += 1
    told_plainly(ended, errno.ENOSPC)
    assert ended.code == 1
    sweep.end()


@pytest.mark.acceptance
def test_a_disk_that_is_full_and_grows(disturb: Disturb, disk: Disk) -> None:
    sweep, size = disturb("tmpfs of 100 KiB and a little more each time"), 100
    while True:
        disk.mount(f"size={size}k")
        ended = sweep.command(None, "sweep", "disk.check=false")  # or it would not start
        told_plainly(ended, errno.ENOSPC)
        if ended.code == 0:
            break
        sweep.count += 1
        size += 150
        assert size < 20_000
    disk.mount(f"size={size + 4000}k")  # a report is written beside the one that it replaces
    sweep.end(f"complete with {size} KiB")


@pytest.mark.acceptance
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("who", ["worker", "sweep"])
def test_a_change_of_each_kind_that_is_refused(disturb: Disturb, fault: str, who: str) -> None:
    sweep = disturb(f"{fault} at each kind of change of the {who}")
    for ended in sweep.at_each_kind(fault, (who,)):
        told_plainly(ended, getattr(errno, fault))
    sweep.end()


@pytest.mark.acceptance
def test_a_disk_that_is_full_from_a_change_on(disturb: Disturb) -> None:
    sweep = disturb("ENOSPC from a change on")
    for more in (0, 5, 20, 40, 60, 100, 150, 200, 300):
        log = sweep.folder / "changes"
        at = (len(log.read_text().splitlines()) if log.is_file() else 0) + more
        ended = sweep.command(Fault(at=at, do="ENOSPC", stays=True))
        sweep.count += 1
        told_plainly(ended, errno.ENOSPC)
    sweep.end()


@pytest.mark.acceptance
def test_a_read_only_folder(disturb: Disturb, disk: Disk) -> None:
    sweep = disturb("read-only tmpfs, EROFS from a change on")
    disk.mount("size=64m")
    for at in (0, 30, 100):  # nothing there yet; in the middle
        ended = sweep.command(Fault(at=at, do="EROFS", stays=True))
        sweep.count += 1
        told_plainly(ended, errno.EROFS)
        assert ended.code == 2
    disk.mount("ro")
    ended = sweep.command()
    sweep.count += 1
    told_plainly(ended, errno.EROFS)
    assert ended.code == 2
    assert "read-only" in ended.told
    assert sweep.command(None, "plan").code == 0
    disk.mount("rw,size=64m")
    sweep.end()
