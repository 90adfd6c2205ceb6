"""Show what the runs of a sweep are doing: from the disk, and of queued jobs from Slurm, on any login node.

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
from pathlib import Path

from peft_align.cli import ask, run_verb
from peft_align.grid.cost import human_time, measured, seconds_left
from peft_align.launch.follow import Unanswered, cluster_states
from peft_align.launch.watch import STATES, line, summary, tail
from peft_align.store.runs import RunDir
from peft_align.store.submissions import unreadable
from peft_align.terminal import plain_console, say

SHOWN_LOGS = 3  # failed runs whose log's end is shown


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--json"], latest=True)
    items = asked.plan()
    for told in unreadable(asked.root):
        say(f"warning: {told}; its jobs are not known here", file=sys.stderr)
    try:
        states, _ = cluster_states(asked.planner, items)
    except Unanswered as error:
        say(error, file=sys.stderr)
        states = error.states
    counts = Counter(state.state for state in states)
    seconds = seconds_left(items, measured(asked.root, items))
    if "--json" in asked.line.flags:
        content = {"sweep": asked.sweep.name, "time": time.time(), "counts": {s: counts[s] for s in STATES}}
        content |= {"training_seconds_left": seconds}
        say(json.dumps(content | {"runs": [asdict(state) for state in states]}, indent=1))
        return 0
    console = plain_console(soft_wrap=True)
    console.print(f"{asked.sweep.name} ({asked.folder}): {summary(counts)}", markup=False)
    for state in states:
        if state.state != "done":
            console.print(line(state), markup=False, highlight=False)
    for state in [state for state in states if state.state == "failed"][:SHOWN_LOGS]:
        log = (RunDir(asked.root, state.run_id).failure() or {}).get("log")
        if log:
            console.print(tail(Path(log)), markup=False, highlight=False)
    if seconds and counts["done"] < len(states):
        console.print(f"left: {human_time(seconds)} of training on one device", highlight=False)
    return 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
