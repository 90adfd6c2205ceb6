"""A frozen copy of the code and the configuration: what queued jobs run, whatever is edited after."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from peft_align.store.records import sync_tree, umask

CODE = "src/peft_align"
LEFT_OUT = ("__pycache__",)
OPTIONS = (".yaml", ".yml", ".csv")


@functools.cache
def code_digest() -> str:
    """sha256 of the package's files that this process runs (with what is not loaded yet), as 16 hex digits."""
    return _digest([(CODE, package())])


def package() -> Path:
    """The folder of this package."""
    return Path(str(files("peft_align")))


def freeze(folder: Path, conf: Path, config_dirs: Sequence[Path]) -> Path:
    """Copy the package, conf/ and the user's own option folders below `folder`, once for each content.

    Args:
        folder: of the sweep.
        conf: the shipped options.
        config_dirs: the user's.

    Returns:
        code/<digest>/, with src/peft_align/, conf/ and config-0/, config-1/, ...
    """
    parts = [(CODE, package()), ("conf", conf)]
    parts += [(f"config-{i}", Path(own)) for i, own in enumerate(config_dirs)]
    place = folder / "code" / _digest(parts)
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        for name, source in parts:
            (fresh / name).mkdir(parents=True)
            for path in _files(name, source):
                (fresh / name / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, fresh / name / path)
        fresh.chmod(0o777 & ~umask())
        sync_tree(fresh)
        try:
            fresh.replace(place)
        except OSError:
            if not place.is_dir():  # nobody else was faster
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


def _digest(parts: Sequence[tuple[str, Path]]) -> str:
    found = hashlib.sha256()
    for name, folder in parts:
        for path in _files(name, folder):
            found.update(f"{name}/{path.as_posix()}\0".encode())
            found.update(hashlib.sha256((folder / path).read_bytes()).digest())
    return found.hexdigest()[:16]


def _files(name: str, folder: Path) -> Iterator[Path]:
    """The files of a part, relative to its folder: of the code all, of options those that are read.

    A user's folder may hold anything: links to others, editors' locks, the sweeps themselves.
    """
    is_code, seen = name == CODE, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if each not in LEFT_OUT and not _is_root(Path(place, each)))
        for each in sorted(names):
            path = Path(place, each)
            if path.is_file() and (is_code or path.suffix in OPTIONS):
                yield path.relative_to(folder)


def _is_root(folder: Path) -> bool:
    """Whether it holds the results of sweeps, frozen options among them."""
    return (folder / "sweeps").is_dir() and (folder / "runs").is_dir()
