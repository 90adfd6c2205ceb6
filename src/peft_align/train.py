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
from peft_align.grid.planner import order
from peft_align.sweep import check_inputs


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--cfg"])
    if "--cfg" in asked.line.flags:
        print(resolved(asked.sweep), end="")
        return 0
    items = [item for item in asked.plan() if item.run.kind == "train"]
    wanted = [item for item in items if not item.run.is_parent_only]
    if len(wanted) != 1:
        what = f"{len(wanted)} runs are asked for; this verb trains one"
        raise InputError([Fault("command line", what, "narrow it, or use peft_align.sweep")])
    check_inputs(items)
    from peft_align.launch.job import Worker
    from peft_align.launch.local import visible_gpus

    gpus = visible_gpus()
    if len(gpus) > 1:  # one run, one device: with several, the trainer would multiply the batch
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
    worker = Worker(asked.root, asked.sweep.name, ("train",))
    fine = worker.work([item.run for item in order(items)])
    directory = asked.root / "runs" / wanted[0].run.id
    print(f"{'trained' if fine else 'failed'}: {directory}")
    return 0 if fine else FAILED


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
