"""A file of finished pieces of work, a JSON line each: a kill loses none of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_align.store.records import sync


class Journal:
    """Entries in the order in which they were appended, each on the disk when `append` returns.

    The first line says what the entries belong to. A file of something else is begun anew, and what comes after a line
    that a kill left incomplete, or that was changed since, is cut off. One process at a time writes to a journal.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        lines, whole = _whole_lines(path)
        if lines and lines[0] == json.loads(json.dumps({"head": head})):
            self.entries = lines[1:]
            if whole < path.stat().st_size:
                os.truncate(path, whole)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._write([{"head": head}])
        sync(path.parent)

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add entries at the end."""
        added = list(entries)
        self._write(added)
        self.entries += added

    def _write(self, lines: list[dict[str, Any]]) -> None:
        content = "".join(json.dumps({**line, "check": _check(line)}) + "\n" for line in lines).encode()
        with self.path.open("ab") as file:
            before = file.tell()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # a full disk: no half line stays for others to stumble over
                with suppress(OSError):
                    os.truncate(self.path, before)
                raise

    def remove(self) -> None:
        """Delete it: its entries are in a product now."""
        self.path.unlink(missing_ok=True)


def read_entries(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a journal whose entries stand each for itself; nothing if it is not about `head`.

    Another process may be writing it. A damaged line is passed over; one without a check, as was written once, is not.
    """
    try:
        lines = [e for line in path.read_bytes().split(b"\n")[:-1] if (e := _entry(line, checked=False)) is not None]
    except FileNotFoundError:
        return []
    return lines[1:] if lines and lines[0] == json.loads(json.dumps({"head": head})) else []


def _check(entry: dict[str, Any]) -> str:
    """What a line of a journal holds of itself, so that a changed byte is found."""
    return hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:16]


def _entry(line: bytes, *, checked: bool) -> dict[str, Any] | None:
    """The entry of a line, or None if it is not what was written.

    Args:
        line: of the file.
        checked: whether it must hold its check.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    check = entry.pop("check", None)
    return entry if check == _check(entry) or (check is None and not checked) else None


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and the bytes that they take."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    found: list[dict[str, Any]] = []
    size = 0
    for line in content.split(b"\n")[:-1]:  # what comes after the last newline is not whole
        entry = _entry(line, checked=True)
        if entry is None:
            break
        found.append(entry)
        size += len(line) + 1
    return found, size
