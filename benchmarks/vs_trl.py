"""Optimizer steps of both engines on the same batches: what dpo_vs_trl.py and sft_vs_trl.py run."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import (
    ROOT,
    in_turn,
    measured,
    median_range,
    product_rate,
    same_environment,
    tell,
    training_of,
    write_down,
)

MICRO_BATCHES = (1, 4, 16)
Measured = dict[str, float]


def arguments(method: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"{method.upper()} steps of the engine packed against TRL's trainer, on the same batches.",
        epilog=f"python benchmarks/{method}_vs_trl.py --dataset hh_rlhf --rounds 2",
    )
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--dataset", default="hh_rlhf")
    parser.add_argument("--peft", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="steps that each process trains, on the same batches")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant")
    parser.add_argument("--tokens", type=int, default=2048, help="train.micro_batch_tokens of the engine packed")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser.parse_args()


def main(method: str) -> int:
    """Measure, print, write down."""
    given = arguments(method)
    same_environment()
    if given.variant:
        train_steps(method, given)
        return 0

    def measure(variant: str, at: int) -> list[Measured]:
        """The steps of a fresh process; fewer than asked for if it was killed for memory."""
        return measured("--variant", variant, may_be_killed=True)

    stock = [f"trl {size}" for size in MICRO_BATCHES if size <= given.batch]
    found = in_turn(["packed", *stock], given.rounds, measure)
    lines = [
        f"{method.upper()}, {given.dataset}, {given.model}, {given.peft}, {given.dtype}, batches of {given.batch}:",
        *["", *table(found, filled=method == "dpo")],
        *["", gradients(found)],
    ]
    ours = [step for each in found["packed"] for step in each]
    if given.peft == "lora":
        work = statistics.mean(step["work"] for step in ours)
        rate = work / statistics.median(step["seconds"] for step in ours)
        lines += [
            "",
            f"Products with frozen weights: {work / 1e9:.0f} GFLOP a step, {rate / 1e9:.0f} GFLOP/s over all of it; "
            f"square products alone reach {product_rate(given.dtype) / 1e9:.0f} GFLOP/s on this machine.",
        ]
    name = "_".join([f"{method}_vs_trl", given.model, given.dataset, given.peft, given.dtype])
    write_down(name, {"settings": vars(given), "rounds": found}, "\n".join(lines))
    return 0


def train_steps(method: str, given: argparse.Namespace) -> None:
    """Train the first steps of a run by one variant, and print each as a line of JSON behind MARK."""
    import torch
    from transformers import TrainerCallback

    from peft_align.store.references import References
    from peft_align.training.run import METHODS, shared_arguments

    engine, _, micro_batch = given.variant.partition(" ")
    words = [
        f"method={method}", f"model={given.model}", f"dataset={given.dataset}", f"peft={given.peft}",
        f"hub.mirror={given.mirror}", f"peft.compute_dtype={given.dtype}", "peft.dropout=0",
        "train.optimizer=adamw_torch", f"train.batch_size={given.batch}", f"train.micro_batch_tokens={given.tokens}",
        f"train.max_steps={given.steps}", f"train.micro_batch_size={micro_batch or 1}", f"train.engine={engine}",
        "train.gradient_checkpointing=false",
    ]  # fmt: skip
    made = training_of(words)
    config = made.run.config
    references, works = [0.0] * given.steps, [0] * given.steps

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds = begun = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begun

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                at = state.global_step - 1
                step = {"seconds": self.seconds, "reference": references[at], "work": works[at]}
                step |= {"loss": float(logs["loss"]), "gradient": float(logs["grad_norm"])}
                tell(step)

    with tempfile.TemporaryDirectory() as folder:
        trainer = METHODS[engine, method](
            made.model, made.base.tokenizer, made.rows, config, shared_arguments(config, Path(folder)), [Clock()]
        )
        if engine == "packed":
            trainer.choose({})  # how rows attend
            samples = trainer.samples
            for at in range(given.steps):  # step by step, as if nothing were there
                trainer.samples = samples[at * given.batch : (at + 1) * given.batch]
                started = time.perf_counter()
                trainer.prepare(References(Path(folder), {}), lambda done: None)
                references[at] = time.perf_counter() - started
                scored = sum(len(words) for sample in trainer.samples for words in sample.responses)
                works[at] = 4 * (made.weights * sum(map(len, trainer.samples)) + made.head * scored)
            trainer.samples = samples
            trainer.prepare(References(Path(folder), {}), lambda done: None)
        trainer.train()


def common(some: list[list[Measured]], others: list[list[Measured]]) -> list[tuple[Measured, Measured]]:
    """The steps that both made, round by round."""
    return [pair for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=False)]


def table(found: dict[str, list[list[Measured]]], *, filled: bool) -> list[str]:
    """Seconds and ratios of medians; with `filled` also of steps that compute their reference values themselves."""
    head = ["engine", "seconds a step: median (range)", "packed is faster by"]
    if filled:
        head.append("packed, without reference values, is faster by")
    rows = []
    for name, rounds in found.items():
        steps = [step for each in rounds for step in each]
        seconds = median_range([step["seconds"] for step in steps])
        if name == "packed":
            rows.append(["packed", seconds, *[""] * (1 + filled)])
            if filled:
                whole = median_range([step["seconds"] + step["reference"] for step in steps])
                rows.append(["packed, without reference values", whole, "", ""])
            continue
        pairs = common(rounds, found["packed"])
        theirs = statistics.median(their["seconds"] for their, _ in pairs)
        sides = [[our["seconds"] for _, our in pairs], [our["seconds"] + our["reference"] for _, our in pairs]]
        ratios = [f"{theirs / statistics.median(side):.2f}" for side in sides[: 1 + filled]]
        rows.append([f"TRL, micro-batch {name.split()[1]}", seconds, *ratios])
        if len(steps) < len([step for each in found["packed"] for step in each]):
            rows[-1][0] += f" ({len(steps)} steps: then killed for memory)"
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def gradients(found: dict[str, list[list[Measured]]]) -> str:
    """How far the norms of the gradients are apart, which see the reference values from the second step on."""
    stock = [name for name in found if name != "packed"]
    ours = max(difference(found["packed"], found[name]) for name in stock)
    own = max(difference(found[stock[0]], found[name]) for name in stock)
    return (
        f"The norm of the gradient differs from TRL's by at most {ours:.1e} of it, "
        f"TRL's own between micro-batches by {own:.1e}."
    )


def difference(some: list[list[Measured]], others: list[list[Measured]]) -> float:
    """The greatest relative difference of the gradients' norms."""
    return max(abs(a["gradient"] - b["gradient"]) / abs(a["gradient"]) for a, b in common(some, others))
