"""Small runs made in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.grid.expand import build_sweep
from peft_align.grid.runs import Run
from peft_align.models.loading import Base, load_base
from peft_align.store.runs import RunDir
from peft_align.training.run import train

FP32 = ("peft.compute_dtype=fp32", "peft.dropout=0", "train.optimizer=adamw_torch")


def runs_of(*words: str) -> list[Run]:
    """The training runs that a command line asks for."""
    return [run for run in build_sweep(ConfigSpace(), parse(words)).runs if run.kind == "train"]


def run_of(*words: str) -> Run:
    """The one training run that a command line asks for."""
    (run,) = runs_of(*words)
    return run


def trained(run: Run, root: Path, base: Base | None = None) -> dict[str, Any]:
    """Train a run and return its record."""
    return train(run, RunDir(root, run.id), base or load_base(run.config), lambda metrics, step: None)
