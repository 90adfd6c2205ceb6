"""Runs of one cell with different seeds, in one forward pass (`train.pack_runs`) against one after the other.

    python benchmarks/pack_runs.py --model tiny --dataset everyday
    python benchmarks/pack_runs.py --model smollm2_135m --dataset hh_rlhf --steps 3 --rounds 1

Both sides in processes of their own, in turn, each training the same steps of the same runs. CPU time is given too:
on a machine that others use it says more. The table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import ROOT, in_turn, measured, same_environment, tell, write_down

Measured = dict[str, list[float]]  # batch -> seconds and CPU seconds of a step


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Runs packed into one forward pass against one after the other.")
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="everyday")
    parser.add_argument("--peft", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--methods", nargs="+", default=["sft", "dpo"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="samples of an optimizer step")
    parser.add_argument("--length", type=int, default=512, help="train.max_length")
    parser.add_argument("--runs", type=int, default=5, help="seeds")
    parser.add_argument(
        "--steps", type=int, default=20, help="optimizer steps of each run, after two that are not timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser.parse_args()


def main() -> int:
    """Measure, print, write down."""
    given = arguments()
    same_environment()
    if given.side:
        tell(steps_of_each_batch(given))
        return 0

    def measure(side: str, at: int) -> Measured:
        (told,) = measured("--side", side)
        return dict(told)

    found = {
        method: in_turn([f"{method} alone", f"{method} packed"], given.rounds, measure) for method in given.methods
    }
    head = ["method", "batch", "one after the other", "packed", "packed is faster by", "in CPU time"]
    rows = [
        [method, str(batch), *compared([[each[str(batch)] for each in rounds] for rounds in found[method].values()])]
        for method in given.methods
        for batch in given.batches
    ]
    lines = [
        f"{given.runs} seeds, {given.dataset}, {given.model}, {given.peft}, {given.dtype}, seconds for a step of all:",
        "",
        *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)),
    ]
    name = "_".join(["pack_runs", given.model, given.dataset, given.peft, given.dtype])
    write_down(name, {"settings": vars(given), "seconds": found}, "\n".join(lines))
    return 0


def compared(sides: list[list[list[float]]]) -> list[str]:
    """Medians and ranges of the seconds of both sides, the ratio of the medians, and that of CPU time."""
    seconds, cpu = ([[each[i] for each in side] for side in sides] for i in (0, 1))
    shown = [f"{statistics.median(side):.3f} ({min(side):.3f} to {max(side):.3f})" for side in seconds]
    ratios = [statistics.median(alone) / statistics.median(packed) for alone, packed in (seconds, cpu)]
    return [*shown, *(f"{ratio:.2f}" for ratio in ratios)]


def steps_of_each_batch(given: argparse.Namespace) -> Measured:
    """One step of all runs, alone or packed, as `given.side` says: METHOD SIDE."""
    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.grid.expand import build_sweep
    from peft_align.models.loading import load_base
    from peft_align.store.runs import RunDir
    from peft_align.training.pack_runs import Pack
    from peft_align.training.run import train

    method, side = given.side.split()
    times: dict[int, list[tuple[float, float]]] = {}

    def log(metrics: Any, step: int) -> None:
        times.setdefault(step, []).append((time.perf_counter(), time.process_time()))

    def between(last: int) -> list[float]:
        """Seconds and CPU seconds of a step, from the second to the end; of a pack, for all its runs."""
        return [
            (end - begin) / given.steps for begin, end in zip(times[2][last], times[given.steps + 2][last], strict=True)
        ]

    found: Measured = {}
    for batch in given.batches:
        words = [
            f"method={method}", f"model={given.model}", f"dataset={given.dataset}", f"peft={given.peft}",
            f"hub.mirror={given.mirror}", f"peft.compute_dtype={given.dtype}", "train.optimizer=adamw_torch",
            f"train.batch_size={batch}", f"train.max_steps={given.steps + 2}", f"train.max_length={given.length}",
            "train.micro_batch_tokens=2048", "train.gradient_checkpointing=false", "train.state_every=100000",
            "seed=" + ",".join(map(str, range(given.runs))),
        ]  # fmt: skip
        runs = [run for run in build_sweep(ConfigSpace(), parse(words)).runs if run.kind == "train"]
        base = load_base(runs[0].config)
        with tempfile.TemporaryDirectory() as name:
            spent = []
            if side == "alone":
                for run in runs:
                    times.clear()
                    train(run, RunDir(Path(name), run.id), base, log)
                    spent.append(between(0))
            else:
                times.clear()
                pack = Pack()
                for run in runs:
                    pack.add(run.id, partial(_train, run, RunDir(Path(name), run.id), base, log))
                pack.train()
                spent.append(between(-1))
        found[str(batch)] = [sum(each) for each in zip(*spent, strict=True)]
    return found


def _train(run: Any, directory: Any, base: Any, log: Any, member: Any) -> Any:
    from peft_align.training.run import train

    return train(run, directory, member.base(lambda: base), log, member=member)


if __name__ == "__main__":
    raise SystemExit(main())
