"""Whether a worker grows: its resident memory after each of many runs, trained and evaluated one after the other.

    python benchmarks/worker_memory.py

The tiny model, SFT and DPO runs in turn, by launch/job.py's own Worker in a process of its own. What is loaded and
built once comes with the first runs of each method; what a later run leaves behind is growth. The table goes into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import measured, same_environment, tell, write_down

SETTLED = 10  # runs after which everything that is shared has been loaded


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Resident memory of a worker after each of many runs.")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--engine", default="packed", choices=("packed", "trl"))
    parser.add_argument("--traced", action="store_true", help="say which lines hold more memory at the end than before")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # be the worker
    return parser.parse_args()


def main() -> int:
    """Measure, print, write down."""
    given = arguments()
    same_environment()
    if given.worker:
        tell(work(given))
        return 0
    (found,) = measured("--worker")
    sizes = [round(each / 1e6, 1) for each in found]
    at = [i for i in (1, SETTLED, *range(20, given.runs, 10), given.runs) if i <= given.runs]
    head = ["after run", *map(str, dict.fromkeys(at))]
    rows = [head, ["---"] * len(head), ["resident, MB", *(f"{sizes[i - 1]:.0f}" for i in dict.fromkeys(at))]]
    grown = sizes[-1] - sizes[min(SETTLED, given.runs) - 1]
    each = grown / max(1, given.runs - SETTLED)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"From run {SETTLED} to run {given.runs}: {grown:+.0f} MB, {each * 1000:+.0f} kB a run."]
    settings = {"runs": given.runs, "steps": given.steps, "engine": given.engine}
    name = "worker_memory" if given.engine == "packed" else f"worker_memory_{given.engine}"
    write_down(name, {"settings": settings, "resident_mb": sizes}, "\n".join(lines))
    return 0


def work(given: argparse.Namespace) -> list[int]:
    """The resident memory after each run, in bytes."""
    import psutil

    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.grid.expand import build_sweep
    from peft_align.grid.runs import Run
    from peft_align.launch.job import Worker

    found: list[int] = []
    process = psutil.Process()

    class Watched(Worker):
        def do(self, run: Run, member: Any = None) -> bool | None:
            done = super().do(run, member)
            found.append(process.memory_info().rss)
            print(f"run {len(found)}: {found[-1] / 1e6:.0f} MB", flush=True)
            if given.traced:
                traced(len(found))
            return done

    words = [
        "model=tiny", "dataset=everyday", "method=sft,dpo", "peft=lora", f"seed=range({(given.runs + 1) // 2})",
        f"train.engine={given.engine}", f"train.max_steps={given.steps}", "train.batch_size=4", "train.max_length=200",
        "evaluation.benchmarks=[preference,everyday_mc]", "evaluation.heldout=8", "evaluation.limit=8",
    ]  # fmt: skip
    runs = [run for run in build_sweep(ConfigSpace(), parse(words)).runs if run.kind == "train"]
    runs = sorted(runs, key=lambda run: run.config.seed)[: given.runs]  # both methods among the first
    with tempfile.TemporaryDirectory() as name:
        assert Watched(Path(name), "sweep").work(runs)
    return found


def traced(run: int) -> None:
    """Print what was allocated between the tenth run and the last and not freed, line by line."""
    import tracemalloc

    if run == SETTLED:
        tracemalloc.start(12)
    elif run > SETTLED and run % 10 == 0:
        snapshot = tracemalloc.take_snapshot()
        for entry in snapshot.statistics("lineno")[:25]:
            print(f"  {entry}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
