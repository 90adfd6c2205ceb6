"""Train one run in this process (and the SFT run that it starts from, if it has one and that is missing).

usage: python -m peft_align.train key=value ... [--cfg] [--config-dir DIR]

examples:
  python -m peft_align.train model=tiny dataset=everyday method=sft train.max_steps=4 train.batch_size=4
  python -m peft_align.train model=mistral_7b dataset=beavertails method=dpo peft=qlora seed=1
  python -m peft_align.train +grid=quickstart method=dpo peft=lora --cfg
"""

from __future__ import annotations

import os
import sys

from peft_align.cli import FAILED, ask, resolved, run_verb
from peft_align.errors import Fault, InputError
from peft_align.grid.needs import check_inputs
from peft_align.grid.order import ancestors, order
from peft_align.terminal import say


def verb(argv: list[str]) -> int:
    return make_one(argv, "train")


def make_one(argv: list[str], kind: str) -> int:
    """Make the one run of a kind that the command line asks for, and what it starts from, in this process."""
    asked = ask(argv, ["--cfg"])
    if "--cfg" in asked.line.flags:
        say(resolved(asked.sweep), end="")
        return 0
    items = [item for item in asked.plan() if item.run.kind != "baseline"]
    wanted = [item for item in items if item.run.kind == kind and not item.run.is_parent_only]
    if len(wanted) != 1:
        what = f"{len(wanted)} runs of kind {kind} are asked for; this verb makes one"
        raise InputError([Fault("command line", what, "narrow it, or use peft_align.sweep")])
    (target,) = wanted
    items = [item for item in items if item is target or item.run.id in ancestors(target, items)]
    check_inputs(items, ("train", "merge"))
    from peft_align.launch.job import Worker
    from peft_align.launch.local import visible_gpus

    gpus = visible_gpus()
    if len(gpus) > 1:  # one run, one device: with several, the trainer would multiply the batch
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    worker = Worker(asked.root, asked.sweep.name, ("train", "merge"))
    fine = worker.work([item.run for item in order(items)])
    say(f"{'done' if fine else 'failed'}: {asked.root / 'runs' / target.run.id}")
    return 0 if fine else FAILED


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
