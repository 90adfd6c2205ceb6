"""Everything in this process, one run after the other: what a debugger wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_align.config.launchers import Debug
from peft_align.grid.order import order
from peft_align.grid.planner import Item, Planner
from peft_align.grid.runs import Sweep
from peft_align.launch.job import Worker
from peft_align.launch.watch import State, observe


def run_here(
    sweep: Sweep, planner: Planner, folder: Path, items: Sequence[Item], stages: tuple[str, ...]
) -> list[State]:
    """Do the runs, judging last, and return their states at the end."""
    assert isinstance(sweep.config.launcher, Debug)
    if sweep.config.launcher.threads:
        import torch

        torch.set_num_threads(sweep.config.launcher.threads)
    runs = [item.run for item in order(items)]
    for together in (tuple(s for s in stages if s != "judge"), tuple(s for s in stages if s == "judge")):
        if together:
            Worker(planner.root, folder.name, together).work(runs)
    return [observe(planner, planner.item(run)) for run in runs]
