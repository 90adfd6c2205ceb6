"""Optimizer steps of both engines on the same batches: what dpo_vs_trl.py and sft_vs_trl.py run."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import ROOT, in_turn, median_range, product_rate, same_environment, write_down

MICRO_BATCHES = (1, 4, 16)


def arguments(method: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"{method.upper()} steps of the engine packed against TRL's trainer, on the same batches.",
        epilog=f"python benchmarks/{method}_vs_trl.py --dataset hh_rlhf --rounds 5",
    )
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--dataset", default="hh_rlhf")
    parser.add_argument("--peft", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--rounds", type=int, default=5, help="batches, each trained on by every variant")
    parser.add_argument("--tokens", type=int, default=4096, help="train.micro_batch_tokens of the engine packed")
    return parser.parse_args()


def main(method: str) -> int:
    """Measure, print, write down."""
    given = arguments(method)
    same_environment()
    import torch
    from transformers import TrainerCallback, set_seed

    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.grid.expand import build_sweep
    from peft_align.models.adapters import new_adapter, take_off
    from peft_align.models.loading import DTYPES, load_base
    from peft_align.store.references import References
    from peft_align.training.run import METHODS, shared_arguments, training_rows

    words = [
        f"method={method}", f"model={given.model}", f"dataset={given.dataset}", f"peft={given.peft}",
        f"hub.mirror={given.mirror}", f"peft.compute_dtype={given.dtype}", "peft.dropout=0",
        "train.optimizer=adamw_torch", f"train.batch_size={given.batch}", f"train.micro_batch_tokens={given.tokens}",
    ]  # fmt: skip

    def config_of(steps: int, micro_batch: int = 1) -> Any:
        more = [f"train.max_steps={steps}", f"train.micro_batch_size={micro_batch}"]
        (run,) = (run for run in build_sweep(ConfigSpace(), parse(words + more)).runs if run.kind == "train")
        return run.config

    base = load_base(config_of(1))
    rows, _ = training_rows(config_of(given.rounds), base)
    linear = (m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    weights = sum(m.weight.numel() for m in linear) if given.peft == "lora" else None
    head = base.model.get_output_embeddings().weight.numel()

    class Clock(TrainerCallback):  # type: ignore[misc]
        gradient = seconds = begun = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begun

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.gradient = float(logs.get("grad_norm", self.gradient))

    def measure(variant: str, at: int) -> dict[str, float]:
        engine, _, micro = variant.partition(" ")
        config = config_of(1, int(micro or 1))
        batch, clock, found = rows[at * given.batch : (at + 1) * given.batch], Clock(), {}
        set_seed(0)
        model = new_adapter(base, config.peft)
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainer = METHODS[engine, method](
                    model, base.tokenizer, batch, config, shared_arguments(config, Path(folder)), [clock]
                )
                if engine == "packed":
                    started = time.perf_counter()
                    trainer.prepare(References(Path(folder), {}), lambda done: None)
                    found["reference"] = time.perf_counter() - started
                    found["slots"] = sum(map(len, trainer.samples))
                    found["scored"] = sum(len(words) for s in trainer.samples for words in s.responses)
                trainer.train()
        finally:
            take_off(base, model)
        return found | {"seconds": clock.seconds, "gradient": clock.gradient}

    stock = [f"trl {size}" for size in MICRO_BATCHES if size <= given.batch]
    found = in_turn(["packed", *stock], given.rounds, measure)
    lines = [
        f"{method.upper()}, {given.dataset}, {given.model}, {given.peft}, {given.dtype}, batches of {given.batch}:",
        *["", *table(found, filled=method == "dpo")],
        *["", gradients(found)],
    ]
    if weights:
        ours = found["packed"]
        work = statistics.mean(4 * (weights * each["slots"] + head * each["scored"]) for each in ours)
        rate = work / statistics.median(each["seconds"] for each in ours)
        lines += [
            "",
            f"Products with frozen weights: {work / 1e9:.0f} GFLOP a step, {rate / 1e9:.0f} GFLOP/s over all of it; "
            f"square products alone reach {product_rate(DTYPES[given.dtype]) / 1e9:.0f} GFLOP/s on this machine.",
        ]
    name = "_".join([f"{method}_vs_trl", given.model, given.dataset, given.peft, given.dtype])
    write_down(name, {"settings": vars(given), "rounds": found}, "\n".join(lines))
    return 0


def table(found: dict[str, list[dict[str, float]]], *, filled: bool) -> list[str]:
    """Seconds and ratios; with `filled` also those of steps that compute their reference values themselves."""
    cached = [each["seconds"] for each in found["packed"]]
    whole = [each["seconds"] + each["reference"] for each in found["packed"]]
    head = ["engine", "seconds a step: median (range)", "packed is faster by"]
    rows = [["packed", median_range(cached), ""]]
    if filled:
        head.append("packed, without reference values, is faster by")
        rows[0].append("")
        rows.append(["packed, without reference values", median_range(whole), "", ""])
    for name in found:
        if name != "packed":
            seconds = [each["seconds"] for each in found[name]]
            sides = (cached, whole) if filled else (cached,)
            ratios = [f"{statistics.median(seconds) / statistics.median(side):.2f}" for side in sides]
            rows.append([f"TRL, micro-batch {name.split()[1]}", median_range(seconds), *ratios])
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def gradients(found: dict[str, list[dict[str, float]]]) -> str:
    """How far the norms of the gradients are apart."""
    norms = {name: [each["gradient"] for each in found[name]] for name in found}
    stock = [name for name in norms if name != "packed"]
    ours = max(difference(norms["packed"], norms[name]) for name in stock)
    own = difference(norms[stock[0]], norms[stock[-1]])
    return (
        f"The norm of the gradient differs from TRL's by at most {ours:.1e} of it; "
        f"TRL's own with micro-batches of 1 and of {stock[-1].split()[1]} by {own:.1e}."
    )


def difference(some: list[float], others: list[float]) -> float:
    """The greatest relative difference."""
    return max(abs(a - b) / abs(a) for a, b in zip(some, others, strict=True))
