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
from collections.abc import Sequence

from peft_align.cli import ask, run_verb
from peft_align.grid.planner import Item
from peft_align.work import carry_out


def verb(argv: list[str]) -> int:
    asked = ask(argv)

    def ready(item: Item) -> bool:
        return item.to_make is None and bool(item.missing or item.unjudged)

    def headline(items: Sequence[Item]) -> str:
        untrained = sum(item.to_make is not None for item in items)
        return f"{asked.sweep.name}: {sum(map(ready, items))} runs to evaluate, {untrained} not made yet"

    return carry_out(asked, ("evaluate", "judge"), ready, headline)


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
