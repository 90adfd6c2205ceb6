"""How long a plan takes with the number of runs: from the command line to what is missing.

    python benchmarks/plan_scale.py

In one process for each size, the composition of the options included; for the smaller sizes also the whole command
`python -m peft_align.plan ... --json`. The table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

from side_by_side import in_turn, write_down

PER_SEED = 10  # methods × ranks


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Seconds from the command line to the plan, by the number of runs.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--command-up-to", type=int, default=10_000, help="largest size of which the command is timed")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # what a process of its own is to plan
    return parser.parse_args()


def words(runs: int) -> list[str]:
    """What asks for so many training runs."""
    return ["method=sft,dpo", "peft.r=8,16,32,64,128", f"seed=range(0,{runs // PER_SEED})", "dataset=beavertails"]


def main() -> int:
    """Measure, print, write down."""
    given = arguments()
    if given.size:
        print(plan(given.size))
        return 0

    def measure(variant: str, at: int) -> float:
        kind, _, size = variant.partition(" ")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, "--size", size]
            if kind == "command":
                command = [sys.executable, "-m", "peft_align.plan", *words(int(size)), f"root={folder}", "--json"]
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{variant} ended with {done.returncode}")
        return seconds if kind == "command" else float(done.stdout)

    commands = [f"command {size}" for size in given.sizes if size <= given.command_up_to]
    found = in_turn([*(f"plan {size}" for size in given.sizes), *commands], given.rounds, measure)
    median = {variant: statistics.median(seconds) for variant, seconds in found.items()}
    rows = [["runs", "seconds to the plan", "microseconds a run", "seconds of the whole command"], ["---"] * 4]
    for size in given.sizes:
        seconds, whole = median[f"plan {size}"], median.get(f"command {size}")
        shown = [f"{size:,}", f"{seconds:.2f}", f"{seconds / size * 1e6:.0f}", "" if whole is None else f"{whole:.2f}"]
        rows.append(shown)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    write_down("plan_scale", {"seconds": found}, table)
    return 0


def plan(runs: int) -> float:
    """Seconds from the words to what is missing, in this process, after the imports."""
    from pathlib import Path

    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.grid.expand import build_sweep
    from peft_align.grid.planner import Planner

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        items = Planner(Path(folder), None).plan(build_sweep(ConfigSpace(), parse(words(runs))).runs)
        seconds = time.perf_counter() - started
    made = {item.run.id for item in items if item.run.kind == "train" and not item.done}
    assert len(made) == runs, len(made)
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
