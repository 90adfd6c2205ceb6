"""What results take on disk, and what is free there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNIT = 512  # bytes that st_blocks counts in, whatever the file system's blocks are


def taken(*paths: Path) -> int:
    """Bytes that files, and folders with all below, take on disk. A file with several names counts once, links are not
    followed, what vanishes while one looks counts nothing."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for path in paths:
        for stat in _stats(path):
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_blocks * UNIT
    return total


def _stats(path: Path) -> Iterator[os.stat_result]:
    try:
        yield path.lstat()
        if path.is_dir() and not path.is_symlink():
            with os.scandir(path) as entries:
                below = [Path(entry.path) for entry in entries]
        else:
            below = []
    except OSError:
        return
    for each in below:
        yield from _stats(each)


def block_bytes(folder: Path) -> int:
    """The bytes in which the file system of a folder, that need not be there yet, deals out room."""
    return os.statvfs(_there(folder)).f_frsize


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to the file system of a folder, that need not be there yet."""
    found = os.statvfs(_there(folder))
    return found.f_bavail * found.f_frsize


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
