"""Takes things out of a root so that a kill in the middle leaves no half of them: out of sight first, then gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peft_align.store.runs import RunDir
from peft_align.store.usage import taken

REMOVED = ".removed"  # the end of the name that a folder has while it is deleted


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go.

    Attributes:
        path: of it.
        bytes: that it takes on disk.
        run: the id of the run that it is of, which no process may hold when it goes.
    """

    path: Path
    bytes: int
    run: str | None = None


def leftover(path: Path, run: str | None = None) -> Leftover:
    return Leftover(path, taken(path), run)


def remove(root: Path, found: Leftover) -> bool:
    """Delete what was found; False if a process holds its run now, or it cannot be deleted.

    A folder gets a name first under which nothing is looked for. What a kill leaves of it there is found by `removed`.

    Args:
        root: of the results, resolved. What does not lie in it is the caller's to have chosen.
        found: to be deleted.
    """
    if found.path.is_symlink():
        return False
    if found.run is None:
        return _delete(found.path)
    if not RunDir(root, found.run).path.is_dir():
        return False
    with RunDir(root, found.run).lock() as mine:
        return mine and _delete(found.path)


def _delete(path: Path) -> bool:
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        hidden = path
        if not path.name.endswith(REMOVED):
            hidden = path.with_name(f".{path.name}{REMOVED}")
            if hidden.is_dir():
                shutil.rmtree(hidden)
            path.replace(hidden)
        shutil.rmtree(hidden)
    except OSError:
        return False
    return True


def below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, links left out; nothing if it is not there, or is a link itself."""
    if folder.is_symlink():
        return
    with suppress(OSError), os.scandir(folder) as entries:
        yield from sorted((entry for entry in entries if not entry.is_symlink()), key=lambda entry: entry.name)


def folders_of(folder: Path) -> list[Path]:
    """The folders in a folder that are no links, without those that are being deleted."""
    return [Path(entry.path) for entry in below(folder) if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
