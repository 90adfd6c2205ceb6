"""Show what the runs of a sweep are doing, from the disk alone.

usage: python -m peft_align.status [+grid=NAME] [key=value ...] [--json] [--config-dir DIR]

  Without a grid or overrides: the sweep that was started last under the root.

examples:
  python -m peft_align.status
  python -m peft_align.status +grid=main method=dpo
  python -m peft_align.status +grid=main --json
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import asdict

from rich.console import Console

from peft_align.cli import ask, run_verb
from peft_align.launch.watch import STATES, line, observe, summary


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--json"], latest=True)
    states = [observe(asked.planner, item) for item in asked.plan()]
    counts = Counter(state.state for state in states)
    if "--json" in asked.line.flags:
        content = {"sweep": asked.sweep.name, "time": time.time(), "counts": {s: counts[s] for s in STATES}}
        print(json.dumps(content | {"runs": [asdict(state) for state in states]}, indent=1))
        return 0
    console = Console(soft_wrap=True)
    console.print(f"{asked.sweep.name} ({asked.folder}): {summary(counts)}", markup=False)
    for state in states:
        if state.state != "done":
            console.print(line(state), markup=False, highlight=False)
    return 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
