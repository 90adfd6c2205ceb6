"""How long it takes to expand, check and identify runs.

    python benchmarks/expand.py

Prints one line of JSON for each size: the runs, the seconds from the command line to their ids, and microseconds a run.
"""

from __future__ import annotations

import json
import time

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.grid.expand import build_sweep

SIZES = (100, 1_000, 10_000)


def main() -> None:
    """Measure each size in this process, the composition of the options included."""
    for runs in SIZES:
        words = ["method=sft,dpo", "peft.r=8,16,32,64,128", f"seed=range(0,{runs // 10})", "dataset=beavertails"]
        started = time.perf_counter()
        sweep = build_sweep(ConfigSpace(), parse(words))
        seconds = time.perf_counter() - started
        expanded = len({run.id for run in sweep.runs if run.kind == "train"})
        assert expanded == runs, expanded
        print(json.dumps({"runs": runs, "seconds": round(seconds, 3), "us_per_run": round(seconds / runs * 1e6)}))


if __name__ == "__main__":
    main()
