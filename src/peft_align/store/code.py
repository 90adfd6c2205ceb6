"""A frozen copy of the code and the configuration: what queued jobs run, whatever is edited after."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from peft_align.store.records import sync_tree

LEFT_OUT = ("__pycache__",)


@functools.cache
def code_digest() -> str:
    """sha256 of the package's files that this process runs (with what is not loaded yet), as 16 hex digits."""
    return _digest([("peft_align", package())])


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
    parts = [("src/peft_align", package()), ("conf", conf)]
    parts += [(f"config-{i}", Path(own)) for i, own in enumerate(config_dirs)]
    place = folder / "code" / _digest(parts)
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        for name, source in parts:
            shutil.copytree(source, fresh / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        fresh.chmod(0o755)
        sync_tree(fresh)
        with suppress(OSError):  # someone else was faster
            fresh.replace(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


def _digest(parts: Sequence[tuple[str, Path]]) -> str:
    found = hashlib.sha256()
    for name, folder in parts:
        for path in _files(folder):
            found.update(f"{name}/{path.relative_to(folder).as_posix()}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not set(LEFT_OUT) & set(path.relative_to(folder).parts):
            yield path
