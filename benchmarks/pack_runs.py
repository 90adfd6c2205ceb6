"""Runs of one cell with different seeds, in one forward pass (`train.pack_runs`) against one after the other.

    python benchmarks/pack_runs.py --model tiny --dataset everyday
    python benchmarks/pack_runs.py --model smollm2_135m --dataset hh_rlhf --steps 3 --rounds 1

Both sides in processes of their own, in turn, each training the same steps of the same runs; what is compared is the
time between the first optimizer step of all and the last. The table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import ROOT, in_turn, same_environment, write_down

MARK = "measured: "


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
        print(MARK + json.dumps(seconds_a_step(given)), flush=True)
        return 0

    def measure(side: str, at: int) -> float:
        command = [sys.executable, *sys.argv, "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        return next(float(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK))

    cells = [f"{method} {batch}" for method in given.methods for batch in given.batches]
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        sides = in_turn([f"{cell} alone", f"{cell} packed"], given.rounds, measure)
        found[cell] = {side.rpartition(" ")[2]: values for side, values in sides.items()}
    lines = [
        f"{given.runs} seeds, {given.dataset}, {given.model}, {given.peft}, {given.dtype}, seconds for a step of all:",
        "",
        "| method | batch | one after the other | packed | packed is faster by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for cell, sides in found.items():
        ratio = statistics.median(sides["alone"]) / statistics.median(sides["packed"])
        shown = [
            f"{statistics.median(sides[side]):.3f} ({min(sides[side]):.3f} to {max(sides[side]):.3f})"
            for side in ("alone", "packed")
        ]
        lines.append(f"| {' | '.join([*cell.split(), *shown, f'{ratio:.2f}'])} |")
    name = "_".join(["pack_runs", given.model, given.dataset, given.peft, given.dtype])
    write_down(name, {"settings": vars(given), "seconds": found}, "\n".join(lines))
    return 0


def seconds_a_step(given: argparse.Namespace) -> float:
    """The time of one step of all runs, alone or packed, as `given.side` says: METHOD BATCH SIDE."""
    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.grid.expand import build_sweep
    from peft_align.models.loading import load_base
    from peft_align.store.runs import RunDir
    from peft_align.training.pack_runs import Member, Pack
    from peft_align.training.run import train

    method, batch, side = given.side.split()
    words = [
        f"method={method}", f"model={given.model}", f"dataset={given.dataset}", f"peft={given.peft}",
        f"hub.mirror={given.mirror}", f"peft.compute_dtype={given.dtype}", "train.optimizer=adamw_torch",
        f"train.batch_size={batch}", f"train.max_steps={given.steps + 2}", f"train.max_length={given.length}",
        "train.micro_batch_tokens=2048", "train.gradient_checkpointing=false", "train.state_every=100000",
        "seed=" + ",".join(map(str, range(given.runs))),
    ]  # fmt: skip
    runs = [run for run in build_sweep(ConfigSpace(), parse(words)).runs if run.kind == "train"]
    base = load_base(runs[0].config)
    times: dict[int, list[float]] = {}

    def log(metrics: Any, step: int) -> None:
        times.setdefault(step, []).append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name:
        if side == "alone":
            spent = 0.0
            for run in runs:
                times.clear()
                train(run, RunDir(Path(name), run.id), base, log)
                spent += times[given.steps + 2][0] - times[2][0]
            return spent / given.steps

        def work(run: Any, member: Member) -> Any:
            return train(run, RunDir(Path(name), run.id), member.base(lambda: base), log, member=member)

        pack = Pack()
        for run in runs:
            pack.add(run.id, partial(work, run))
        pack.train()
        return (times[given.steps + 2][-1] - times[2][-1]) / given.steps


if __name__ == "__main__":
    raise SystemExit(main())
