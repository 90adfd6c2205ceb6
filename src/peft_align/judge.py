"""Judge the texts of a sweep that are generated; generates none. Later, elsewhere, again with another judge.

usage: python -m peft_align.judge [+grid=NAME] [key=value ...] [--config-dir DIR]

  What a judge answered is kept by its content: it is never asked the same question twice.

examples:
  python -m peft_align.judge +grid=main evaluation=paper judge=gpt4
  python -m peft_align.judge +grid=main evaluation=paper judge=endpoint judge.base_url=https://HOST/v1
  python -m peft_align.judge +grid=main evaluation=paper judge=local_lm judge.hub_id=FOLDER root=/scratch/me/outputs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_align.cli import ask, run_verb
from peft_align.errors import Fault, InputError
from peft_align.grid.planner import Item
from peft_align.work import carry_out


def verb(argv: list[str]) -> int:
    asked = ask(argv)
    if not any(scoring.judges for run in asked.sweep.runs for scoring in run.scorings):
        hint = "e.g. evaluation=paper judge=gpt4"
        raise InputError([Fault("judge", "none of the benchmarks asked for has a judge", hint)])

    def headline(items: Sequence[Item]) -> str:
        waiting = sum(len(item.unjudged) > len(item.to_judge) for item in items)
        ready = sum(bool(item.to_judge) for item in items)
        return f"{asked.sweep.name}: {ready} runs to judge, {waiting} without their texts yet"

    return carry_out(asked, ("judge",), lambda item: bool(item.to_judge), headline)


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
