"""Do everything that is missing of a sweep: train, evaluate each checkpoint, report. The same command finishes it.

usage: python -m peft_align.sweep [+grid=NAME] [key=value ...] [--config-dir DIR] [--cfg]

  A comma list or range() makes an axis; against a grid, it narrows or replaces the axis of that name.

examples:
  python -m peft_align.sweep +grid=quickstart
  python -m peft_align.sweep +grid=main model=mistral_7b method=dpo seed=0,1
  python -m peft_align.sweep dataset=hh_rlhf method=sft,dpo model=tiny peft.r=8,16 train.max_steps=4 hub.mirror=DIR

flags:
  --cfg             print the fully resolved config of the first run, and stop
  --config-dir DIR  take options from your own folder too (may be repeated)
  cell=N            do run N of the sweep only (from 0), and what it starts from: for slurm/array.sbatch

exit code: 0 all done, 1 a run failed, 2 bad input (nothing was started), 130 interrupted
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_align.cli import FAILED, Asked, ask, resolved, run_verb
from peft_align.errors import Fault, InputError
from peft_align.grid.needs import check_inputs
from peft_align.grid.order import ancestors, order
from peft_align.grid.planner import Item
from peft_align.grid.runs import STAGES
from peft_align.launch.watch import line, observe
from peft_align.store.records import write_json
from peft_align.store.runs import RunDir
from peft_align.terminal import say
from peft_align.work import carry_out


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--cfg"], own=["cell"])
    if "--cfg" in asked.line.flags:
        say(resolved(asked.sweep), end="")
        return 0
    for run in asked.sweep.runs:  # what a killed process left complete is put in its place, the rest goes
        directory = RunDir(asked.root, run.id)
        signs = ("attempt/train.json", "progress.json", "failed.json")
        if any((directory.path / sign).is_file() for sign in signs):
            with directory.lock() as mine:
                if mine:
                    directory.commit_attempt()
                if mine and asked.planner.item(run).done:
                    directory.remove_leftovers(is_trained=True)
                    directory.clear_state()
    if "cell" in asked.line.own:
        return do_cell(asked, asked.line.own["cell"])

    def headline(items: Sequence[Item]) -> str:
        todo = sum(not item.done for item in items)
        return f"{asked.sweep.name}: {len(items)} runs, {len(items) - todo} done, {todo} to do ({asked.folder})"

    return carry_out(asked, STAGES, lambda item: True, headline)


def do_cell(asked: Asked, given: Sequence[object]) -> int:
    """Do one run of the sweep, by its number, as a worker does."""
    runs = [run for run in asked.sweep.runs if not run.is_parent_only]
    number = given[0] if len(given) == 1 else None
    if not isinstance(number, int) or not 0 <= number < len(runs):
        hint = f"one number from 0 to {len(runs) - 1}"
        raise InputError([Fault(f"cell={','.join(map(str, given))}", "is no run of this sweep", hint)])
    items = asked.plan()
    (target,) = (item for item in items if item.run is runs[number])
    wanted = [item for item in order(items) if item is target or item.run.id in ancestors(target, items)]
    check_inputs([item for item in wanted if not item.done])
    from peft_align.launch import job
    from peft_align.launch.job_file import content

    path = asked.folder / "jobs" / f"cell-{number}.json"
    write_json(path, content(asked.root, asked.folder, [item.run for item in wanted], STAGES))
    code = job.main([str(path)])
    state = observe(asked.planner, asked.planner.item(target.run))
    say(line(state))
    return FAILED if code else 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
