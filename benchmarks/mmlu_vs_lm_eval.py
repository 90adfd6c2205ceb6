"""MMLU, 5-shot: requests scored with shared prefixes against lm-eval's own HFLM, on the same requests.

    python benchmarks/mmlu_vs_lm_eval.py
    python benchmarks/mmlu_vs_lm_eval.py --all --dtype fp32

Each variant in a process of its own, in turn. What is timed is the scoring alone: the model is loaded and the requests
are built before, by the code of a sweep for both. The table goes into docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from side_by_side import ROOT, in_turn, measured, median_range, same_environment, tell, write_down

# The first of each of lm-eval's groups of subjects, and the longest prompts (european history).
SUBJECTS = (
    *("anatomy", "astronomy", "college_physics", "econometrics", "formal_logic", "high_school_european_history"),
    *("human_aging", "marketing", "moral_scenarios", "professional_law"),
)
BATCH_SIZES = (1, 4, 8, 16)
OURS = "shared prefixes"
CHOICES = 4  # of each question


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="MMLU, 5-shot: requests scored with shared prefixes against lm-eval's own HFLM.",
        epilog="python benchmarks/mmlu_vs_lm_eval.py --all --dtype fp32",
    )
    parser.add_argument("--mirror", default=str(ROOT.parent / "shared" / "mirror"), help="hub mirror with the data")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--subjects", type=int, default=len(SUBJECTS), help="how many of the ten")
    parser.add_argument("--limit", type=int, default=20, help="questions of a subject")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCH_SIZES), help="lm-eval's batch sizes")
    parser.add_argument(
        "--all", action="store_true", help="all 57 subjects, one round, lm-eval's first batch size only"
    )
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser.parse_args()


def main() -> int:
    """Measure, compare, print, write down."""
    given = arguments()
    same_environment()
    if given.variant:
        score(given)
        return 0

    def measure(variant: str, at: int) -> dict[str, Any]:
        (found[variant],) = measured("--variant", variant)
        return {"seconds": found[variant]["seconds"]}

    found: dict[str, dict[str, Any]] = {}
    batches, rounds = (given.batches[:1], 1) if given.all else (given.batches, given.rounds)
    times = in_turn([OURS, *(f"lm-eval, batches of {size}" for size in batches)], rounds, measure)
    seconds = {variant: [each["seconds"] for each in some] for variant, some in times.items()}
    answers = {variant: each["answers"] for variant, each in found.items()}
    questions = len(answers[OURS]) // CHOICES
    best = min((v for v in seconds if v != OURS), key=lambda v: statistics.median(seconds[v]))
    lines = [f"MMLU, 5-shot, {questions} questions, {given.model}, {given.dtype}:", "", *table(seconds, best), ""]
    lines += [f"{agreement(answers[OURS], answers[best])} ({best})."]
    if len(batches) > 1:
        other = next(v for v in seconds if v not in (OURS, best))
        lines += [f"lm-eval with itself ({other}): {agreement(answers[other], answers[best])}."]
    name = "_".join(["mmlu_vs_lm_eval", given.model, given.dtype, *(["all"] if given.all else [])])
    write_down(name, {"settings": vars(given), "seconds": seconds, "answers": answers}, "\n".join(lines))
    return 0


def score(given: argparse.Namespace) -> None:
    """Score all requests by one variant; print seconds and answers as a line of JSON behind MARK."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from peft_align.config.benchmarks import LmEval
    from peft_align.config.command_line import parse
    from peft_align.config.compose import ConfigSpace
    from peft_align.evaluation.harness import counting_model
    from peft_align.evaluation.lm_eval_tasks import Tasks
    from peft_align.grid.expand import build_sweep
    from peft_align.models.loading import load_base

    tasks = ["mmlu"] if given.all else [f"mmlu_{subject}" for subject in SUBJECTS[: given.subjects]]
    words = [
        f"model={given.model}", "dataset=everyday", "peft=lora", f"peft.base_precision={given.dtype}",
        f"peft.compute_dtype={given.dtype}", f"hub.mirror={given.mirror}", f"evaluation.limit={given.limit}",
        f"evaluation.benchmarks=[{','.join(tasks)}]",
        *(f"benchmark.{task}.num_fewshot=5" for task in tasks),
    ]  # fmt: skip
    (run,) = (run for run in build_sweep(ConfigSpace(), parse(words)).runs if run.kind == "baseline")
    (scoring,) = run.scorings
    base, kept = load_base(run.config), Tasks()
    requests = []
    for _, benchmark in scoring.benchmarks:
        assert isinstance(benchmark, LmEval)
        for task in kept.get(benchmark, scoring, given.mirror).tasks["tasks"].values():
            task.build_all_requests(limit=given.limit)
            requests += task.instances
    if given.variant == OURS:
        model = counting_model(base.model, base, 1, scoring.evaluation.batch_tokens, lambda done: None)
    else:
        size = int(given.variant.rpartition(" ")[2])
        model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, backend="causal", batch_size=size)
    model.loglikelihood(requests[:CHOICES])  # the first forward pass takes longer
    base.shared.encoded.clear()
    started = time.perf_counter()
    answers = model.loglikelihood(requests)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    tell({"seconds": time.perf_counter() - started, "answers": [a for a, _ in answers]})


def table(seconds: dict[str, list[float]], best: str) -> list[str]:
    """Seconds of each variant, and by how much ours is faster than it."""
    ours = statistics.median(seconds[OURS])
    rows = [["scored by", "seconds: median (range)", "shared prefixes are faster by"], ["---"] * 3]
    for variant, some in seconds.items():
        ratio = (
            "" if variant == OURS else f"{statistics.median(some) / ours:.2f}{' (the best)' if variant == best else ''}"
        )
        rows.append([variant, median_range(some), ratio])
    return [f"| {' | '.join(row)} |" for row in rows]


def agreement(some: list[float], others: list[float]) -> str:
    """How far log-probabilities are apart, and how many questions are answered alike."""
    apart = max(abs(a - b) for a, b in zip(some, others, strict=True))
    chosen = [
        [max(range(CHOICES), key=lambda i: each[at + i]) for at in range(0, len(each), CHOICES)]
        for each in (some, others)
    ]
    same = sum(a == b for a, b in zip(*chosen, strict=True))
    return f"Log-probabilities differ by at most {apart:.1e}; {same} of {len(chosen[0])} answers are the same"


if __name__ == "__main__":
    raise SystemExit(main())
