"""Records: small JSON files that are either whole or absent, and the digests of what they speak of."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft_align.errors import Fault, InputError, WorkError

SEAL = b',\n "seal": "%s"\n}\n'  # the end of a record
SEAL_LINE = "# sha256 of the lines above, to be deleted by who edits them: "


def cache_dir() -> Path:
    """Where converted models and digests are kept: $PEFT_ALIGN_CACHE, or peft_align in the user's cache folder.

    Raises:
        InputError: others could have put something there.
    """
    own = os.environ.get("PEFT_ALIGN_CACHE")
    place = Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "peft_align").expanduser()
    try:
        is_foreign = _is_foreign(place)
    except OSError:  # there is none yet
        return place
    if is_foreign:
        what = "can be written by everybody, or was made by another user in a folder that can be"
        raise InputError([Fault(f"the cache {place}", what, "set PEFT_ALIGN_CACHE to a folder of your own")])
    return place


def _is_foreign(folder: Path) -> bool:
    """Whether what lies there may be anybody's: a colleague's folder is trusted, one that somebody left in /tmp not."""
    there, parent = folder.stat(), folder.resolve().parent.stat()
    by_another = there.st_uid not in (os.getuid(), 0) and bool(parent.st_mode & stat.S_IWOTH)
    return by_another or bool(there.st_mode & stat.S_IWOTH)


def umask() -> int:
    """The permissions that new files are not given: the user's umask, and never that everybody may write."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask | stat.S_IWOTH


def keep_others_from_writing() -> None:
    """Have no file or folder of this process, and of those that it starts, be writable for everybody."""
    os.umask(umask())


def remove_tree(path: Path) -> None:
    """Delete a folder, if there is one; a link to a folder goes, and what it leads to stays. Raises OSError."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced to disk (if durable) and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())  # mkstemp's are for the user alone
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with this process; False if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def sync(path: Path) -> None:
    """Have the file's (or folder's) content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for every file and folder below, and the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def write_json(path: Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a record atomically; its last entry is the sha256 of the others, so that a changed byte is found."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_bytes(_sealed(json.dumps(content, indent=1, ensure_ascii=False, default=str).encode()))


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any] | None:
    """The record, or None if it is absent or not what was written.

    Args:
        path: of the record.
        sealed: one without a seal is none; else it is taken as it is, for earlier versions wrote none.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # by the ten thousand: no buffer for each
            content = json.loads(_unsealed(file.readall(), required=sealed))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def sealed_text(text: str) -> str:
    """The text of a file that people may edit, with a last line by which a damaged byte is found."""
    return f"{text}{SEAL_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _sealed(text: bytes) -> bytes:
    """An object's JSON with one entry more: the digest of what stands before it."""
    if text == b"{}":
        return text + b"\n"
    return text.removesuffix(b"\n}") + SEAL % hashlib.sha256(text).hexdigest().encode()


def _unsealed(text: bytes, *, required: bool) -> bytes:
    """The JSON that was sealed. Raises ValueError if it is another one, or was not where it is required."""
    body, found, rest = text.rpartition(SEAL.partition(b"%")[0])
    if not found and required:
        raise ValueError("it has no seal")
    if not found:
        return text
    body += b"\n}"
    if found + rest != SEAL % hashlib.sha256(body).hexdigest().encode():
        raise ValueError("its content is not the one that was sealed")
    return body


def json_number(value: float) -> float | str:
    """A number as JSON has it; for what JSON has none, a word: nan, inf, -inf."""
    return value if math.isfinite(value) else str(value)


class Digests:
    """sha256 of files, remembered by path, size and time of change, so that 14 GB are read once."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_dir() / "digests.json"
        self._known: dict[str, list[Any]] | None = None
        self._fresh: dict[str, list[Any]] = {}

    def of(self, path: Path) -> str:
        """The file's sha256 in hexadecimal. Raises OSError."""
        path = path.resolve()
        stat = path.stat()
        if self._known is None:
            self._known = read_json(self.path) or {}
        known = self._known.get(str(path))
        if isinstance(known, list) and len(known) == 3 and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        digest = sha256(path)
        self._known[str(path)] = self._fresh[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
        return digest

    def save(self) -> None:
        """Add what was computed to the file; another process's entries are kept."""
        if self._fresh:
            with suppress(OSError):  # a cache: without it, digests are computed again
                write_json(self.path, {**(read_json(self.path) or {}), **self._fresh})
            self._fresh = {}


def link_tree(source: Path, target: Path) -> None:
    """A second copy of a folder that takes no room where the file system has hard links."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copyfile(a, b)

    shutil.copytree(source, target, copy_function=link)
    sync_tree(target)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of several files' names and contents, as `inventory` gives them."""
    lines = [f"{name} {files[name]['sha256']}" for name in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def inventory(folder: Path, names: Iterator[str] | list[str], digests: Digests) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the named files of a folder."""
    found = {}
    for name in sorted(names):
        path = folder / name
        found[name] = {"size": path.stat().st_size, "sha256": digests.of(path)}
    digests.save()
    return found


class Damaged(WorkError):
    """A product on disk is not what its record says."""


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the contents of a product before it is used. Raises Damaged with the file's name."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        known = entry.get("sha256")  # of metrics, earlier records have the size alone
        if path.stat().st_size != entry["size"] or (known is not None and sha256(path) != known):
            raise Damaged(f"{path} is damaged: its content is not the one recorded")


def notice_of(record: Path) -> Path:
    """Where it is said why a record was set aside: train.json -> train.damaged.json."""
    return record.with_name(f"{record.stem}.damaged.json")


def set_aside(record: Path, what: str) -> None:
    """Have what a record speaks of made again by the next command, which is told why; the caller holds the run's lock.

    The record as it was stays in the notice, until it is written again.
    """
    content = {"damage": what, "found": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "record": read_json(record)}
    write_json(notice_of(record), content)
    record.unlink(missing_ok=True)


def forget_damage(record: Path) -> None:
    """It was written again."""
    notice_of(record).unlink(missing_ok=True)


def complete(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """None if every file is there in its size, else what is wrong. Contents are checked when they are read."""
    place = str(folder)
    for name, entry in files.items():
        try:
            size = os.stat(f"{place}/{name}").st_size  # by the ten thousand: no Path for each
        except OSError:
            return f"{folder.name}/{name} is missing"
        if size != entry["size"]:
            return f"{folder.name}/{name} has {size} bytes, not {entry['size']}"
    return None
