"""Judge the texts of a sweep that are generated; generates none. Later, elsewhere, again with another judge.

usage: python -m peft_align.judge [+grid=NAME] [key=value ...] [--config-dir DIR]

  What a judge answered is kept by its content: it is never asked the same question twice.

examples:
  python -m peft_align.judge +grid=main evaluation=paper judge=gpt4
  python -m peft_align.judge +grid=main evaluation=paper judge=endpoint judge.base_url=http://HOST:8000/v1
  python -m peft_align.judge +grid=main evaluation=paper judge=local_lm judge.hub_id=FOLDER root=/scratch/me/outputs
"""

from __future__ import annotations

import sys

from peft_align.cli import FAILED, ask, run_verb
from peft_align.errors import Fault, InputError
from peft_align.grid.needs import check_inputs
from peft_align.report import write_report
from peft_align.store.sweeps import write_manifest


def verb(argv: list[str]) -> int:
    asked = ask(argv)
    if not any(scoring.judges for run in asked.sweep.runs for scoring in run.scorings):
        hint = "e.g. evaluation=paper judge=gpt4"
        raise InputError([Fault("judge", "none of the benchmarks asked for has a judge", hint)])
    items = asked.plan()
    ready = [item for item in items if item.to_judge]
    waiting = sum(len(item.unjudged) > len(item.to_judge) for item in items)
    check_inputs(ready, ("judge",))
    write_manifest(asked.folder, asked.line.words, asked.line.config_dirs, [run.id for run in asked.sweep.runs])
    print(f"{asked.sweep.name}: {len(ready)} runs to judge, {waiting} without their texts yet", flush=True)
    states = []
    if ready:
        from peft_align.launch.local import LocalLauncher

        states = LocalLauncher(asked.sweep, asked.planner, asked.folder, stages=("judge",)).run(ready)
    print(write_report(asked, asked.plan()), end="")
    return FAILED if any(state.state == "failed" for state in states) else 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
