"""Where the time of an optimizer step goes, and how far it is from the rate of this machine's matrix products.

    python benchmarks/step_profile.py --method dpo --dataset hh_rlhf

One process; the second step of a run is profiled (the first one warms up). Products with frozen weights are counted in
multiplications and held against square products alone, measured before and after in the same process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import ROOT, product_rate, same_environment, training_of, write_down

# What torch's profiler calls the autograd functions of models/, forward and backward.
PARTS = {
    "linear layers with LoRA": ("_LoRA", "_LoRABackward"),
    "attention": ("_OnCPU", "_OnCPUBackward"),
    "norms": ("_RMSNorm", "_RMSNormBackward"),
    "head and its log-probabilities": ("_TokenLogProbs", "_TokenLogProbsBackward"),
    "optimizer": ("Optimizer.step#AdamW.step",),
}
REST = "the rest: SiLU, rotary positions, residual sums, embedding, clipping, Python"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--method", default="dpo", choices=("sft", "dpo"))
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--dataset", default="hh_rlhf")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--batch", type=int, default=16, help="samples of an optimizer step")
    parser.add_argument("--tokens", type=int, default=2048, help="train.micro_batch_tokens")
    return parser.parse_args()


def main() -> int:
    """Profile a step, print, write down."""
    given = arguments()
    same_environment()
    before = product_rate(given.dtype)
    seconds, parts, work = profiled(given)
    rate = max(before, product_rate(given.dtype))
    shown = {**parts, REST: seconds - sum(parts.values())}
    lines = [
        f"{given.method.upper()}, {given.dataset}, {given.model}, lora, {given.dtype}, a batch of {given.batch}, "
        f"{seconds:.1f} s under the profiler:",
        *["", "| part | seconds | share |", "| --- | --- | --- |"],
        *[f"| {name} | {spent:.2f} | {spent / seconds:.0%} |" for name, spent in shown.items()],
        "",
        f"Products with frozen weights, head included: {work / 1e9:.0f} GFLOP, {work / rate:.1f} s at the "
        f"{rate / 1e9:.0f} GFLOP/s of square products alone on this machine, {work / rate / seconds:.0%} of the step.",
    ]
    result = {"settings": vars(given), "seconds": seconds, "parts": shown, "flop": work, "product_rate": rate}
    write_down("_".join(["step_profile", given.method, given.dataset, given.dtype]), result, "\n".join(lines))
    return 0


def profiled(given: argparse.Namespace) -> tuple[float, dict[str, float], int]:
    """Seconds of the second step, those of each part, and the operations of its products with frozen weights."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from peft_align.store.references import References
    from peft_align.training.run import METHODS, shared_arguments

    words = [
        f"method={given.method}", f"model={given.model}", f"dataset={given.dataset}", "peft=lora",
        f"hub.mirror={given.mirror}", f"peft.compute_dtype={given.dtype}", "peft.dropout=0",
        "train.optimizer=adamw_torch", f"train.batch_size={given.batch}", f"train.micro_batch_tokens={given.tokens}",
        "train.max_steps=2", "train.engine=packed", "train.gradient_checkpointing=false",
    ]  # fmt: skip
    made = training_of(words)
    profiler = profile(activities=[ProfilerActivity.CPU])
    took = [0.0, 0.0]

    class SecondStep(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                profiler.start()
            took[state.global_step] = -time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            took[state.global_step - 1] += time.perf_counter()
            if state.global_step == 2:
                profiler.stop()

    make: Callable[..., Any] = METHODS["packed", given.method]
    with tempfile.TemporaryDirectory() as folder:
        arguments = shared_arguments(made.run.config, Path(folder))
        trainer = make(made.model, made.base.tokenizer, made.rows, made.run.config, arguments, [SecondStep()])
        trainer.choose({})  # how rows attend
        trainer.prepare(References(Path(folder), {}), lambda done: None)
        trainer.train()
    totals = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    parts = {part: sum(totals.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    samples = trainer.samples[given.batch :]
    scored = sum(len(words) for sample in samples for words in sample.responses)
    return took[1], parts, 4 * (made.weights * sum(map(len, samples)) + made.head * scored)


if __name__ == "__main__":
    raise SystemExit(main())
