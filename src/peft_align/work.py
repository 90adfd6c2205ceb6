"""What sweep, evaluate and judge share: having what is missing done by the launcher asked for, then the table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_align.cli import FAILED, Asked
from peft_align.config.launchers import Debug, Slurm
from peft_align.errors import InputError
from peft_align.grid.disk import check_room
from peft_align.grid.needs import check_inputs
from peft_align.grid.order import order, remade
from peft_align.grid.planner import Item
from peft_align.launch.watch import ENDED_BADLY, State, tail
from peft_align.report import write_report
from peft_align.store.runs import RunDir
from peft_align.store.sweeps import write_manifest
from peft_align.terminal import one_line, say

SHOWN = 5  # failed runs whose log's end is shown


def carry_out(
    asked: Asked, stages: tuple[str, ...], wanted: Callable[[Item], bool], headline: Callable[[Sequence[Item]], str]
) -> int:
    """Do what is missing, show the table, and return the exit code; jobs that were submitted go on by themselves.

    Args:
        asked: the command line.
        stages: what is done.
        wanted: of which runs.
        headline: what is printed of the plan when the inputs are found to be there.

    Raises:
        InputError: something that is needed is not there; nothing was started.
    """
    from peft_align.reporting.findings import load_questions  # imports numpy

    load_questions(asked.space)  # the report would be refused for their faults when all is done
    launcher = asked.sweep.config.launcher
    everything = asked.plan()
    if isinstance(launcher, Slurm):
        from peft_align.launch.outcome import settle

        settle([RunDir(asked.root, item.run.id) for item in everything if wanted(item) and not item.done])
        everything = asked.plan()
    planned = [item for item in everything if wanted(item)]
    again = remade(planned)
    todo = [item for item in planned if not item.done or item.run.id in again]
    try:
        check_inputs(todo, stages)
        check_room(asked.root, todo, asked.sweep.config.disk)
    except InputError as error:
        if not (isinstance(launcher, Slurm) and launcher.dry_run):
            raise
        say(f"before these jobs can run:\n{error.render()}", file=sys.stderr)
    write_manifest(asked.folder, asked.line.words, asked.line.config_dirs, [run.id for run in asked.sweep.runs])
    say(headline(everything), flush=True)
    states: Sequence[State] = []
    if todo and isinstance(launcher, Slurm):
        from peft_align.launch.follow import follow

        if not _submitted(asked, launcher, todo, stages) or not launcher.follow:
            return 0
        states = follow(asked.planner, planned, asked.folder)
    elif todo and isinstance(launcher, Debug):
        from peft_align.launch.debug import run_here

        states = run_here(asked.sweep, asked.planner, asked.folder, todo, stages)
    elif todo:
        from peft_align.launch.local import LocalLauncher

        states = LocalLauncher(asked.sweep, asked.planner, asked.folder, stages).run(planned)
    # who judges alone leaves what has no texts yet to others
    failed = [s for s in states if s.state != "done" and (stages != ("judge",) or s.state in ENDED_BADLY)]
    for state in failed[:SHOWN]:
        say(f"\n{state.state.upper()} {state.run_id}\n  {one_line(state.detail)}")
        say(tail(Path((RunDir(asked.root, state.run_id).failure() or {}).get("log", ""))))
    say()
    say(write_report(asked, asked.plan() if todo else everything), end="")
    if failed:
        say(f"\n{len(failed)} of {len(states)} runs are not done; the same command tries them again.")
    return FAILED if failed else 0


def _submitted(asked: Asked, launcher: Slurm, todo: Sequence[Item], stages: tuple[str, ...]) -> bool:
    """Submit, and say what; False if the scripts were only written."""
    from peft_align.launch.slurm import SlurmLauncher, given_up, summary

    left = given_up(asked.root, todo, launcher.attempts)
    for run_id, why in left.items():
        say(f"left alone after {launcher.attempts} attempts without getting further: {run_id}: {why}")
    unmade = {item.run.id for item in todo if item.to_make}
    for item in order(todo):
        behind = next((parent for parent in item.run.parents if parent in left and parent in unmade), None)
        if behind is not None and item.to_make:
            left[item.run.id] = f"starts from {behind}"
            say(f"left alone with its parent: {item.run.id}")
    if left:
        say(f"  launcher.attempts={launcher.attempts + 1} tries them again")
    slurm = SlurmLauncher(asked.sweep, asked.planner, asked.folder, asked.line.words, asked.line.config_dirs, stages)
    submission = slurm.submit([item for item in todo if item.run.id not in left])
    if submission is None:
        say("nothing to submit: living jobs are going to do what is left" if len(left) < len(todo) else "")
        return True
    say(f"{summary(submission)}\nscripts: {submission.folder}")
    if not launcher.dry_run and not launcher.follow:
        say("submitted. See `python -m peft_align.status`; the same command later submits what is missing then.")
    return not launcher.dry_run
