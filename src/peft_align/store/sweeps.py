"""A sweep's folder: its manifest, its tables, and what its workers were given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_align.config.identity import short_hash, slug
from peft_align.errors import Fault, InputError, suggest
from peft_align.store.records import read_json, write_json
from peft_align.store.shapes import MANIFEST, wrong


def sweep_dir(root: Path, name: str, content: Sequence[str]) -> Path:
    """The folder of a sweep: its grid's name and the hash of what it holds, so that the same command finds it again."""
    return root / "sweeps" / f"{slug([name])}-{short_hash(' '.join(sorted(content)), 8)}"


def write_manifest(folder: Path, command: Sequence[str], config_dirs: Sequence[Path], run_ids: Sequence[str]) -> None:
    """Record what was asked for, unless it is the same as before."""
    content = {"command": list(command), "config_dirs": [str(d) for d in config_dirs], "runs": list(run_ids)}
    known = read_json(folder / "sweep.json") or {}
    if {k: known.get(k) for k in content} != content:
        write_json(folder / "sweep.json", {**content, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    (folder / "sweep.json").touch()


def latest_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of the sweep that was started last, or None. Raises InputError if it cannot be read."""
    manifests = sorted((root / "sweeps").glob("*/sweep.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        return None
    return read_manifest(manifests[-1].parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sweep's folder. Raises InputError if it cannot be read."""
    found = read_json(folder / "sweep.json")
    told = "no JSON object" if found is None else wrong(found, MANIFEST)
    if found is None or told is not None:
        hint = "name the sweep, e.g. +grid=NAME; the same command writes it anew"
        raise InputError([Fault(str(folder / "sweep.json"), f"is damaged: {told}", hint)])
    return found


def find_sweep(root: Path, name: str) -> Path:
    """The folder of a sweep by a path to it, its folder's name, its grid's name, or what only its name begins with.

    Raises:
        InputError: there is none, or several.
    """
    if (Path(name) / "sweep.json").is_file():
        return Path(name)
    folders = sorted(path.parent for path in (root / "sweeps").glob("*/sweep.json"))
    names = [folder.name for folder in folders]
    ways = (
        [folder for folder in folders if folder.name == name],
        [folder for folder in folders if folder.name.rpartition("-")[0] == name],
        [folder for folder in folders if name and folder.name.startswith(name)],
    )
    found = next(filter(None, ways), [])
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{len(found)} sweeps under {root} have that name: {', '.join(folder.name for folder in found)}"
        raise InputError([Fault(f"--sweeps {name}", what, "give the whole name of the folder of one of them")])
    raise InputError([Fault(f"--sweeps {name}", f"there is no such sweep under {root}", suggest(name, names))])
