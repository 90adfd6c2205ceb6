"""The file that tells a worker what to do: a job's, with its runs, or an array's, whose runs a cell list names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_align.grid.runs import Run
from peft_align.grid.serialize import run_to_plain
from peft_align.store.records import read_json


def content(
    root: Path,
    folder: Path,
    runs: Sequence[Run],
    stages: Sequence[str],
    judges: Sequence[str] | None = None,
    threads: int | None = None,
    attempts: int = 3,
) -> dict[str, Any]:
    """A job file: what a worker is told.

    Args:
        root: holds runs/.
        folder: the sweep's.
        runs: parents before children.
        stages: what is done of them.
        judges: options that judge; None: all.
        threads: set in torch; None: as it is.
        attempts: a run that stopped so often without getting further is not queued again.
    """
    return {
        "root": str(root.resolve()),
        "sweep": folder.name,
        "stages": list(stages),
        "judges": None if judges is None else list(judges),
        "threads": threads,
        "attempts": attempts,
        "runs": [run_to_plain(run) for run in runs],
    }


def of_array(folder: Path, job: dict[str, Any], index: str) -> list[dict[str, Any]]:
    """The runs of one line of an array's cell list."""
    lines = (folder / job["cells"]).read_text(encoding="utf-8").splitlines()
    known = read_json(folder / job["runs"]) or {}
    wanted = lines[int(index)].split() if index.isdigit() and int(index) < len(lines) else []
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        told = f"{job['runs']} has no {unknown[0]}" if unknown else f"{job['cells']} has no line {index}"
        raise SystemExit(f"{folder}: {told}")
    return [known[name] for name in wanted]
