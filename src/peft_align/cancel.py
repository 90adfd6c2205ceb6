"""End the Slurm jobs of a sweep, or of the runs that the words name, and nothing else. What is done stays.

usage: python -m peft_align.cancel [+grid=NAME] [key=value ...] [--config-dir DIR]

  Without a grid or overrides: the sweep that was started last under the root. Running tasks save their state first.

examples:
  python -m peft_align.cancel
  python -m peft_align.cancel +grid=main
  python -m peft_align.cancel +grid=main method=dpo model=llama_7b,vicuna_7b
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_align.cli import Asked, ask, run_verb
from peft_align.errors import Fault, InputError
from peft_align.launch import queue
from peft_align.store.submissions import Submission, submissions, unreadable
from peft_align.terminal import say


def verb(argv: list[str]) -> int:
    asked = ask(argv, latest=True)
    for told in unreadable(asked.root):
        say(f"warning: {told}; its jobs are not known here: see squeue, and scancel", file=sys.stderr)
    known = [each for each in submissions(asked.root) if each.names]
    if not any(_own(asked, known, None)[0]):
        what = f"no jobs of {asked.sweep.name} were submitted under {asked.root}"
        raise InputError([Fault("command line", what, "give the words and the root of the sweep that was submitted")])
    queue.need_slurm()
    try:
        living = queue.live_tasks({job: name for each in known for job, name in each.names.items()})
        own, wanted = _own(asked, known, {task.job for task in living.values()})
        doomed: dict[str, list[str]] = {}
        shared = 0
        for submission in own:
            for task, _, runs in submission.tasks():
                if task in living and wanted >= set(runs):
                    doomed[task] = runs
                elif task in living and wanted & set(runs):
                    shared += 1
        whole = [each for each in own if wanted >= {run for _, _, runs in each.tasks() for run in runs}]
        reports = [r for each in whole if (r := str(each.content["report"])) in living]
        queue.cancel([*doomed, *reports])
    except queue.SlurmError as error:
        raise InputError([Fault("cancel", f"Slurm refuses: {error}")]) from None
    named = {run for runs in doomed.values() for run in runs}
    say(f"{asked.sweep.name}: {len(doomed)} tasks of {len(named)} runs cancelled")
    if shared:
        say(f"{shared} tasks do other runs too and go on (launcher.runs_per_task)")
    return 0


def _own(asked: Asked, known: Sequence[Submission], living: set[str] | None) -> tuple[Sequence[Submission], set[str]]:
    """The submissions of this very sweep and its runs; or those of which the words name a part, and that part.

    A part has no baselines and no parents: other runs of the sweep need them too.

    Args:
        asked: the command line.
        known: what was submitted.
        living: jobs; what is asked for may have been submitted by itself once, and be part of what lives. None: all.
    """
    runs = {run.id for run in asked.sweep.runs}
    exact = [each for each in known if each.content["sweep"] == asked.folder.name]
    named = [each for each in known if each.content["name"] == asked.sweep.name and each not in exact]
    if exact and (living is None or not named or any(living & set(each.names) for each in exact)):
        return exact, runs
    part = {run.id for run in asked.sweep.runs if run.kind != "baseline" and not run.is_parent_only}
    return [each for each in named if runs <= set(each.content["runs"])], part


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
