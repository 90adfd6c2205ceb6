"""Score the checkpoints of a sweep that exist, and its baselines; trains nothing.

usage: python -m peft_align.evaluate [+grid=NAME] [adapter=...] [key=value ...] [--config-dir DIR]

  adapter=A,B: folders or hub repositories of adapters that were not trained here. A model that was not: give its
  repository or folder, model=... model.hub_id=...; it is scored as a baseline.

examples:
  python -m peft_align.evaluate model=mistral_7b adapter=me/my-adapter peft=lora evaluation=paper judge=gpt4
  python -m peft_align.evaluate +grid=quickstart evaluation.heldout=16
  python -m peft_align.evaluate +grid=main evaluation.benchmarks=[mmlu,arc_easy] evaluation.limit=100
"""

from __future__ import annotations

import sys

from peft_align.cli import FAILED, ask, run_verb
from peft_align.grid.needs import check_inputs
from peft_align.report import write_report
from peft_align.store.sweeps import write_manifest


def verb(argv: list[str]) -> int:
    asked = ask(argv)
    items = asked.plan()
    ready = [item for item in items if item.to_make is None and (item.missing or item.unjudged)]
    untrained = sum(item.to_make is not None for item in items)
    check_inputs(ready, ("evaluate", "judge"))
    write_manifest(asked.folder, asked.line.words, asked.line.config_dirs, [run.id for run in asked.sweep.runs])
    print(f"{asked.sweep.name}: {len(ready)} runs to evaluate, {untrained} not made yet", flush=True)
    states = []
    if ready:
        from peft_align.launch.local import LocalLauncher

        states = LocalLauncher(asked.sweep, asked.planner, asked.folder, stages=("evaluate", "judge")).run(ready)
    print(write_report(asked, asked.plan()), end="")
    return FAILED if any(state.state != "done" for state in states) else 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
