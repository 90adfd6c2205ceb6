"""Where a row of a dataset stands, its file and line; and what is wrong with files that cannot be read.

Only asked when something is wrong: rows are read by the library datasets, whose messages name neither. JSON, a row a
line, packed by gzip or not, as the datasets of the study are; other files are named without a line.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from peft_align.errors import Fault

GZIP = b"\x1f\x8b"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
NAMES: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


def place_of(paths: Sequence[str], row: int) -> str:
    """The file and line of a row, which are counted from 0 over all files of a split in their order."""
    left = row
    for path in paths:
        if not _is_json(path):
            break
        number = 0
        for number, line in enumerate(_lines(Path(path)), start=1):
            if line.strip():
                if left == 0:
                    return f"{path}, line {number}"
                left -= 1
    return f"row {row} (counted from 0)"


def find_fault(paths: Sequence[str], columns: Collection[str] = ()) -> Fault | None:
    """The first thing that is wrong with files; None if nothing is found.

    Args:
        paths: of the files of a split, in their order.
        columns: whose values must be of one type.
    """
    types: dict[str, tuple[str, str]] = {}  # of each column: what its first value is, and where that stands
    for path in paths:
        if _is_json(path) and (fault := _fault_of(Path(path), columns, types)) is not None:
            return fault
    return None


def _is_json(path: str) -> bool:
    return Path(path).name.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson"))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file. Raises OSError, EOFError, zlib.error."""
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        yield from cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw


def _fault_of(path: Path, columns: Collection[str], types: dict[str, tuple[str, str]]) -> Fault | None:
    if path.stat().st_size == 0:
        return Fault(str(path), "is empty", "fetch it again, or leave it out")
    number, rows = 0, 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            rows += bool(line.strip())
            if number == 1 and line.startswith(UTF_16):
                hint = f"convert it: iconv -f UTF-16 -t UTF-8 {path.name}"
                return Fault(str(path), "is UTF-16, and UTF-8 is expected", hint)
            if fault := _fault_in(line, f"{path}, line {number}", path, columns, types, alone=number == 1):
                return fault
            if number == 1 and line.strip() and not line.rstrip().endswith(b"}"):
                return None  # a JSON file that is no row a line
    except EOFError:
        return Fault(str(path), f"is cut off after line {number}", "fetch it again")
    except (OSError, zlib.error) as error:
        return Fault(str(path), f"is damaged after line {number}: {error}", "fetch it again")
    return None if rows else Fault(str(path), "has no row", "fetch it again, or leave it out")


def _fault_in(
    line: bytes, at: str, path: Path, columns: Collection[str], types: dict[str, tuple[str, str]], *, alone: bool
) -> Fault | None:
    """What is wrong with a line; `alone`: it may be the beginning of a JSON file that is no row a line."""
    try:
        text = line.decode("utf-8-sig" if alone else "utf-8")
    except UnicodeDecodeError as error:
        hint = f"convert the file, e.g. iconv -f LATIN1 -t UTF-8 {path.name}"
        return Fault(at, f"is not UTF-8 (byte {error.start})", hint)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except ValueError as error:
        if alone and _whole(path) is not None:
            return None
        told = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Fault(at, f"is not JSON: {told}", 'a row is one line: {"COLUMN": VALUE, ...}')
    except RecursionError:
        return Fault(at, "is not JSON that can be read: it is nested too deeply", "leave the row out")
    if not isinstance(row, dict):
        if alone and _whole(path) is not None:
            return None
        return Fault(at, f"is {_type(row)}, not a row", 'a row is one line: {"COLUMN": VALUE, ...}')
    for name in columns:
        if row.get(name) is not None:
            mine = _type(row[name])
            first, where = types.setdefault(name, (mine, at))
            if mine != first:
                hint = "give each row of a column one type, or leave the row out"
                return Fault(at, f"{name} is {mine}, and in {where} {first}", hint)
    return None


def _whole(path: Path) -> Any:
    """The file as one JSON value; None if it is none."""
    try:
        return json.loads(io.BytesIO(b"".join(_lines(path))).read())
    except (ValueError, RecursionError):
        return None


def _type(value: Any) -> str:
    return NAMES.get(type(value), "null")
