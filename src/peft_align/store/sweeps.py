"""A sweep's folder: its manifest, its tables, and what its workers were given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_align.config.identity import short_hash, slug
from peft_align.errors import Fault, InputError
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
    found = read_json(manifests[-1])
    told = "no JSON object" if found is None else wrong(found, MANIFEST)
    if told is not None:
        hint = "name the sweep, e.g. +grid=NAME; the same command writes it anew"
        raise InputError([Fault(str(manifests[-1]), f"is damaged: {told}", hint)])
    return found
