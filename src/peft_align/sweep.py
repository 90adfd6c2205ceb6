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

exit code: 0 all done, 1 a run failed, 2 bad input (nothing was started), 130 interrupted
"""

from __future__ import annotations

import sys

from peft_align.cli import ask, resolved, run_verb
from peft_align.grid.runs import STAGES
from peft_align.store.runs import RunDir
from peft_align.work import carry_out


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--cfg"])
    if "--cfg" in asked.line.flags:
        print(resolved(asked.sweep), end="")
        return 0
    for run in asked.sweep.runs:  # what a killed process left complete is put in its place first
        directory = RunDir(asked.root, run.id)
        if (directory.attempt / "train.json").is_file():
            with directory.lock() as mine:
                if mine:
                    directory.commit_attempt()
    items = asked.plan()
    todo = sum(not item.done for item in items)
    headline = f"{asked.sweep.name}: {len(items)} runs, {len(items) - todo} done, {todo} to do ({asked.folder})"
    return carry_out(asked, asked.plan, STAGES, headline)


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
