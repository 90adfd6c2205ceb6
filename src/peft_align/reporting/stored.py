"""results.parquet read back: the rows with the types that they had, and what the file says of its sweep.

A file from elsewhere is checked whole before anything is computed from it, and all that is wrong is told at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_align.errors import Fault, InputError
from peft_align.reporting.frame import FORMAT, KEY, SHAPE, Frame, from_plain, in_table, united
from peft_align.reporting.table import FIRST, LAST, TYPES, Row, columns, judge_name
from peft_align.store.shapes import wrong

NEEDED = ("run_id", "kind", "step", "benchmark", "metric")  # columns of which every row has a value
KINDS = ("train", "merge", "baseline", "external")
SHOWN = 3  # rows that a fault names
MAGIC = b"PAR1"
HINT = "give a results.parquet that report wrote"


def read_tables(paths: Sequence[Path]) -> tuple[Frame, list[Row]]:
    """The rows of one or several tables as one, a row that several have once, and what their sweeps were.

    Raises:
        InputError: with every fault of every file.
    """
    faults: list[Fault] = []
    read = [found for path in dict.fromkeys(paths) if (found := _read(path, faults)) is not None]
    if faults:
        raise InputError(faults)
    frame = united([frame for frame, _ in read])
    known: dict[str, list[str]] = {}  # what judges of one name are, over all files
    rows: dict[tuple[Any, ...], Row] = {}
    for own, table in read:
        names = {name: _one_name(name, identity, known) for name, identity in own.judges.items()}
        for row in table:
            row = dict.fromkeys(columns(frame)) | row | {"judge": names.get(row["judge"], row["judge"])}
            rows.setdefault(identity_of(row), row)
    judges = {judge_name(label, i): each for label, own_ in known.items() for i, each in enumerate(own_)}
    order = {run.id: i for i, run in enumerate(frame.runs)}
    whole = [_with_axes(frame, row) for row in rows.values()]
    return dataclasses.replace(frame, judges=judges), sorted(whole, key=lambda row: order[row["run_id"]])


def identity_of(row: Row) -> tuple[Any, ...]:
    """What two rows that are the same measurement have in common."""
    return tuple(row[key] for key in ("run_id", "base", "step", "benchmark", "judge", "metric", "n"))


def _one_name(name: str, identity: str, known: dict[str, list[str]]) -> str:
    """The name of a judge among those of all files."""
    own = known.setdefault(name.partition(" #")[0], [])
    if identity not in own:
        own.append(identity)
    return judge_name(name.partition(" #")[0], own.index(identity))


def _with_axes(frame: Frame, row: Row) -> Row:
    """The row with its run's values of the axes that another file varies."""
    lacking = [key for key in columns(frame)[len(FIRST) : -len(LAST)] if row[key] is None]
    if row["kind"] != "train" or not lacking:
        return row
    run = next(run for run in frame.runs if run.id == row["run_id"])
    return row | {key: in_table(run.value(key)) for key in lacking if key != "merge"}


def _read(path: Path, faults: list[Fault]) -> tuple[Frame, list[Row]] | None:
    """One file; None if faults were added."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        faults.append(Fault(f"--from {path}", what, HINT))
        return None
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC:
        what = "is no Parquet file"
        if path.suffix == ".csv" or begin == b"run_":
            what = "is a CSV: it has no types, and does not say what the sweep was"
        faults.append(Fault(f"--from {path}", what, "give the results.parquet that lies beside results.csv"))
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        faults.append(Fault(f"--from {path}", f"is damaged: {str(error).splitlines()[0]}", HINT))
        return None
    plain = _said(path, found.schema.metadata or {}, faults)
    if plain is None:
        return None
    frame = from_plain(plain)
    before = len(faults)
    _check_columns(path, found.schema, columns(frame), faults)
    if len(faults) > before:
        return None
    rows = [_restored(row, plain["restored"]) for row in found.select(columns(frame)).to_pylist()]
    _check_rows(path, frame, rows, faults)
    return None if len(faults) > before else (frame, rows)


def _said(path: Path, metadata: Mapping[bytes, bytes], faults: list[Fault]) -> dict[str, Any] | None:
    """What the file says of its sweep; None if it does not, and a fault was added."""
    if KEY not in metadata:
        what = "does not say what sweep it is of: report did not write it, or another program wrote it again"
        faults.append(Fault(f"--from {path}", what, HINT))
        return None
    try:
        plain = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        plain = None
    told = "no JSON" if plain is None else wrong(plain, SHAPE)
    if told is None and plain["format"] != FORMAT:
        told = f"its format is {plain['format']}, this version reads {FORMAT}"
    if told is not None:
        what = f"what it says of its sweep cannot be read: {told}"
        faults.append(Fault(f"--from {path}", what, "write it again with report, where the runs are"))
        return None
    assert isinstance(plain, dict)
    return plain


def _check_columns(path: Path, schema: Any, names: Sequence[str], faults: list[Fault]) -> None:
    lacking = [name for name in names if name not in schema.names]
    if lacking:
        faults.append(Fault(f"--from {path}", f"lacks columns: {', '.join(lacking)}", HINT))
    for name in names:
        if schema.names.count(name) > 1:
            faults.append(Fault(f"--from {path}: {name}", "is there twice", HINT))
        elif name in schema.names:
            found = {"double": "float64"}.get(str(schema.field(name).type), str(schema.field(name).type))
            fixed = TYPES.get(name, "string")
            allowed = [fixed] if name in (*FIRST, *LAST) else ["float64", "string"]
            if found not in allowed:
                faults.append(Fault(f"--from {path}: {name}", f"is {found}, not {' or '.join(allowed)}", HINT))


def _check_rows(path: Path, frame: Frame, rows: Sequence[Row], faults: list[Fault]) -> None:
    """Values that no table of report has. A value itself may be no number: what diverged is counted, and left out."""
    ids = {run.id for run in frame.runs}

    def is_empty(row: Row, name: str) -> bool:
        return row[name] is None

    def is_infinite(row: Row, name: str) -> bool:
        """An error that is no number, of a value that is one."""
        values = row[name], row["value"]
        return None not in values and math.isfinite(values[1]) and not math.isfinite(values[0])

    def is_unknown(row: Row, name: str, known: Iterable[str]) -> bool:
        return row[name] is not None and row[name] not in known

    wrongs: dict[tuple[str, str], Callable[[Row], bool]] = {}
    wrongs |= {(name, "is empty"): partial(is_empty, name=name) for name in NEEDED}
    wrongs |= {(name, "is not finite"): partial(is_infinite, name=name) for name in ("stderr", "bound")}
    wrongs["kind", f"is none of {', '.join(KINDS)}"] = partial(is_unknown, name="kind", known=KINDS)
    wrongs["run_id", "is no run of the sweep that the file is of"] = partial(is_unknown, name="run_id", known=ids)
    for (name, what), of in wrongs.items():
        at = [i for i, row in enumerate(rows) if of(row)]
        if at:
            told = ", ".join(map(str, at[:SHOWN])) + (", ..." if len(at) > SHOWN else "")
            faults.append(Fault(f"--from {path}: {name}", f"{what} in {len(at)} rows, counted from 0: {told}", HINT))


def _restored(row: Row, restored: Mapping[str, Mapping[str, Any]]) -> Row:
    """The row with the values of its axes in the form that they had."""
    return row | {key: own[str(row[key])] for key, own in restored.items() if str(row.get(key)) in own}
