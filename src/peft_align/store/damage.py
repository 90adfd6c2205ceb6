"""Looks for damage in what runs have: each record, and the content of each file that it speaks of.

What is kept besides checks itself whenever it is read: training states, reference values, token ids, judges' answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.store.records import Damaged, read_json, set_aside, verify
from peft_align.store.runs import FORMAT, RunDir


@dataclass(frozen=True)
class Damage:
    """One record that is damaged, or whose products are.

    Attributes:
        run_id: of its run.
        what: is wrong.
        left: why it could not be set aside; empty if it was.
    """

    run_id: str
    what: str
    left: str = ""


def find_damage(directory: RunDir) -> list[Damage]:
    """Look at a run, and set aside the records of what is damaged, so that the next sweep makes that again.

    A run that a process works on is looked at by that process.
    """
    if not check_run(directory) or directory.is_locked():
        return []
    try:
        with directory.lock() as mine:
            found = check_run(directory) if mine else []  # it may just have been put in its place
            for path, what in found:
                set_aside(path, what)
    except OSError as error:
        why = f"cannot be set aside: {error.strerror}"
        return [Damage(directory.id, what, why) for _, what in check_run(directory)]
    return [Damage(directory.id, what) for _, what in found]


def check_run(directory: RunDir) -> list[tuple[Path, str]]:
    """The records of a run that are damaged, or whose products are, and what is wrong; every content is read."""
    return [(path, what) for path in records_of(directory) if (what := _damage(directory, path))]


def records_of(directory: RunDir) -> list[Path]:
    """The records of what a run has."""
    own = [path for name in ("train.json", "merge.json") if (path := directory.path / name).is_file()]
    return [*own, *sorted(directory.path.glob("evaluations/**/record.json"))]


def _damage(directory: RunDir, path: Path) -> str | None:
    record = read_json(path)
    if record is None:
        return f"{path} is damaged: its content is not the one recorded"
    if record.get("format") != FORMAT:
        return None  # taken for absent
    for folder, files in _products(directory, path, record):
        try:
            verify(folder, files)
        except Damaged as damage:
            return str(damage)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"
    return None


def _products(directory: RunDir, path: Path, record: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders and files that a record speaks of."""
    if path.name == "train.json":
        steps = record["checkpoints"]
        yield from ((directory.checkpoint(int(step)), entry["files"]) for step, entry in steps.items())
        yield directory.adapter, steps[max(steps, key=int)]["files"]
        yield directory.path, record["metrics"]
    elif path.name == "merge.json":
        yield from ((directory.merged(form), saved["files"]) for form, saved in record["saved"].items())
    else:
        yield path.parent, record["files"]
