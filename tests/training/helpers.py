"""Small runs made in the test's own process."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.grid.expand import build_sweep
from peft_align.grid.runs import Run
from peft_align.models.loading import Base, load_base
from peft_align.store.runs import RunDir
from peft_align.training.run import Interrupted, train

FP32 = ("peft.compute_dtype=fp32", "peft.dropout=0", "train.optimizer=adamw_torch")


@functools.cache
def shipped() -> ConfigSpace:
    """The shipped conf/, composed once. Not the one of sweeping.py: programs of tests import this file alone."""
    return ConfigSpace()


def runs_of(*words: str) -> list[Run]:
    """The training runs that a command line asks for."""
    return [run for run in build_sweep(shipped(), parse(words)).runs if run.kind == "train"]


def run_of(*words: str) -> Run:
    """The one training run that a command line asks for."""
    (run,) = runs_of(*words)
    return run


def trained(run: Run, root: Path, base: Base | None = None) -> dict[str, Any]:
    """Train a run and return its record."""
    return train(run, RunDir(root, run.id), base or load_base(run.config), lambda metrics, step: None)


def interrupted(run: Run, root: Path, base: Base, steps: int) -> RunDir:
    """Train so many steps and stop."""
    directory = RunDir(root, run.id)
    directory.path.mkdir(parents=True, exist_ok=True)
    made: list[int] = []
    with pytest.raises(Interrupted):
        train(run, directory, base, lambda metrics, step: made.append(step), lambda: len(made) == steps)
    return directory


def left(root: Path, run: Run) -> dict[str, bytes]:
    """Every weight that a run leaves."""
    path = RunDir(root, run.id).path
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*.safetensors"))}


def steps_of_states(directory: RunDir) -> list[int]:
    """Of which steps there are states, newest first; each says so itself."""
    return [json.loads((folder / "record.json").read_text())["step"] for folder in directory.states()]


def trajectory(root: Path, run: Run) -> list[dict[str, Any]]:
    """The metrics of each step, without what the clock says."""
    lines = (RunDir(root, run.id).path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
