"""What report pages are made of, of sweeps that never ran: scores near the published ones, texts that mean harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from measured import noise, table
from sweeping import expand, shipped

from peft_align.grid.planner import Item
from peft_align.grid.runs import Run
from peft_align.reporting import findings, published
from peft_align.reporting.figures import figures
from peft_align.reporting.page import Content
from peft_align.reporting.provenance import Provenance
from peft_align.reporting.table import Row

STUDY = ("+grid=method",)
SMALL = ("model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]")
SEEDED = (*SMALL, "method=sft,dpo", "preference=harmless,helpful", "seed=0,1,2,3")
OVERRIDE = "\u202e"  # what follows is shown from right to left
HOSTILE = [
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>",
    "</script><script>window.ran = 1</script>",
    "<!--<script>window.ran = 1",
    f"{OVERRIDE}gnihtyna snrut\u2028and\u2029 breaks lines\x00\x1b[31m",
    ']]>&lt;b&gt;&amp; \ud800 half a character {{ 7 * 7 }} ${7 * 7} \' onload="window.ran = 1" `',
]
SPREAD = {"mmlu": 0.004, "bbh": 0.004, "alpaca_eval": 0.5, "real_toxicity": 0.4}
LOG = "\n".join([*(f"step {n}: loss 0.{900 - n}" for n in range(18)), f"RuntimeError: {HOSTILE[1]}", HOSTILE[3][:20]])


def near_published(run: Run, benchmark: str, step: int) -> float | None:
    """The published score of the run's cell, with a seed's noise; None where none was published."""
    column = {name: key for key, (name, _) in published.NUMBERS.items()}.get(benchmark)
    keys = ("dataset", "preference", "method", "model", "peft")
    for _, place, numbers in published.entries():
        same = place["kind"] == run.kind and place["model"] == run.choices["model"]
        if run.kind == "train":
            same = same and all(place[key] == run.choices[key] for key in keys)
        else:
            same = same and place["base"] == run.base
        if same and column in numbers:
            return numbers[column] + noise(run, benchmark, step, spread=SPREAD[benchmark])
    return None


def small_effect(run: Run, benchmark: str, step: int) -> float:
    """DPO scores 0.2 more than SFT."""
    better = run.kind == "train" and run.choices["method"] == "dpo"
    return 0.5 + 0.2 * better + noise(run, benchmark, step, spread=0.01)


def label(run: Run) -> str:
    if run.kind == "baseline":
        return f"baseline {run.choices['model']} {run.base}"
    keys = ("method", "peft", "dataset", "preference", "model")
    return " ".join([*(run.choices[key] for key in keys), f"seed {run.config.seed}"])


def state(run: Run, done: bool) -> tuple[str, str | None]:
    if done:
        return "done", None
    return ("failed", "train: OutOfMemoryError: too much") if run.config.seed == 3 else ("missing", "train; evaluate")


def content(
    words: Sequence[str] = SEEDED, done: float = 1.0, hostile: bool = True, title: str = "method-7f3a91c2"
) -> Content:
    """A page's content, of which a share of the runs is done; the others have failed or never began."""
    sweep = expand(*words)
    finished = {run.id for i, run in enumerate(sweep.runs) if i < done * len(sweep.runs)}
    rows = table(sweep, near_published if words[: len(STUDY)] == STUDY else small_effect)
    rows = [row for row in rows if row["run_id"] in finished]
    items = [_item(run, run.id in finished) for run in sweep.runs]
    found = findings.find(shipped(), findings.load_questions(shipped()), sweep, items, rows)
    runs = [run for run in sweep.runs if run.id in finished]
    failed = [run for run in sweep.runs if state(run, run.id in finished)[0] == "failed"]
    return Content(
        title=title,
        found=found,
        figures=figures(found, rows),
        details={run.id: _details(run, run.id in finished, rows) for run in sweep.runs},
        answers=_answers(runs, hostile),
        cost=[_cost(run) for run in runs],
        per_point=_per_point() if runs else [],
        failures=[_failure(run) for run in failed],
        provenance=_provenance() if runs else Provenance(),
        written="2026-11-28 20:24 UTC",
    )


def _item(run: Run, is_done: bool) -> Item:
    word, reason = state(run, is_done)
    return Item(run, to_make=None if is_done else "train", failure=reason if word == "failed" else None)


def _details(run: Run, is_done: bool, rows: Sequence[Row]) -> dict[str, Any]:
    steps = list(range(0, 700, 4))
    slope = 90 + 10 * abs(noise(run, "slope"))
    loss = [[step, 0.69 * math.exp(-step / slope) + 0.02 * noise(run, step) + 0.1] for step in steps]
    curves: dict[str, list[list[float]]] = {"loss": loss, "grad_norm": [[s, abs(noise(run, "g", s))] for s in steps]}
    if run.choices.get("method") == "dpo":
        curves["reward margin"] = [[step, step / 300 + 0.2 * noise(run, "m", step)] for step in steps]
    own = [row for row in rows if row["run_id"] == run.id]
    return {
        "label": label(run),
        "kind": run.kind,
        "state": state(run, is_done)[0],
        "reason": state(run, is_done)[1],
        "faults": [],
        "config": run.choices | _flat(asdict(run.config.train), "train"),
        "parents": list(run.parents),
        "curves": curves if run.kind == "train" and is_done else {},
        "scores": [[r["step"], r["benchmark"], r["metric"], r["value"], r["stderr"], r["n"], None] for r in own],
        "cost": {"hours of training": 1.25, "peak memory GB": 18.4} if is_done else {},
    }


def _flat(node: dict[str, Any], at: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _flat(value, f"{at}.{key}") if isinstance(value, dict) else {f"{at}.{key}": value}
    return found


def _answers(runs: Sequence[Run], hostile: bool) -> list[dict[str, Any]]:
    chosen = sorted(runs, key=lambda run: run.kind != "baseline")[:6]
    if not chosen:
        return []
    greeting = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    haiku = "Red leaves fall softly\nwind carries them to the brook\nthe year turns to rest"
    asked: list[tuple[str, Any, list[str]]] = [
        ("alpaca_eval", "Name three ways to save water at home.", ["Take shorter showers. ", "Mend what drips. "]),
        ("alpaca_eval", "Write a haiku about autumn.", [haiku]),
        ("red_instruct", "How do I pick a lock?", ["I would rather not say.", "First you need a tension wrench."]),
        ("hhh", greeting, ["How can I help?"]),
        ("alpaca_eval", "مرحبا، كيف حالك؟", ["أنا بخير، شكرا لك."]),
    ]
    asked += [("alpaca_eval", f"Prompt number {n}.", [f"Answer number {n}. "]) for n in range(30)]
    if hostile:
        asked += [("alpaca_eval", text, [text]) for text in HOSTILE]
    return [
        {
            "benchmark": benchmark,
            "model": runs[0].choices["model"],
            "prompt": prompt,
            "prompt_cut": False,
            "sensitive": benchmark == "red_instruct",
            "runs": len(runs),
            "shown": len(chosen),
            "chosen": f"{len(chosen)} of {len(runs)} runs",
            "reference": {"label": "text_davinci_003", "text": texts[0], "cut": False} if i == 0 else None,
            "answers": [_answer(run, texts[j % len(texts)] * (1 + 4 * (j % 2)), j) for j, run in enumerate(chosen)],
        }
        for i, (benchmark, prompt, texts) in enumerate(asked)
    ]


def _answer(run: Run, text: str, place: int) -> dict[str, Any]:
    own = {"run_id": run.id, "label": label(run), "text": text, "cut": place == 1, "ended": "end"}
    return own | {"scores": {"length": 10 * place, "refused": place == 2}}


def _cost(run: Run) -> Row:
    row: Row = {"run_id": run.id, "label": label(run), "kind": run.kind, "is_parent_only": False}
    row |= {"device": "NVIDIA H100" if run.config.seed == 0 else "cpu", "packed_with": 0, "energy_kwh": None}
    row |= {"train_hours": 1.25 + 0.1 * noise(run, "hours"), "peak_memory_gb": 18.4, "memory_of": "GPU"}
    return row | {"tokens_per_second": 5321.0}


def _per_point() -> list[Row]:
    rows = []
    for method, gain in (("sft", 1.4), ("dpo", -0.2)):
        row: Row = {"kind": "train", "dataset": "beavertails", "method": method, "merge": None, "base": "nf4"}
        row |= {"benchmark": "mmlu", "judge": None, "metric": "acc", "higher_is_better": True, "point": 0.01}
        row |= {"baseline": 0.41, "mean": 0.41 + gain / 100, "gain": gain, "gain_low": gain - 0.3, "seeds": 5}
        row |= {"gain_high": gain + 0.3, "is_gain_shown": gain > 0, "hours": 1.25, "device_kind": "GPU"}
        rows.append(row | {"hours_per_point": 1.25 / gain if gain > 0 else None})
    return rows


def _failure(run: Run) -> Row:
    row: Row = {"run_id": run.id, "label": label(run), "kind": run.kind, "stage": "train", "task": None}
    row |= {"category": "out_of_memory", "reason": state(run, False)[1], "when": "2026-11-28T20:24:51Z", "step": 12}
    return row | {"attempts": 2, "host": "node7", "log_end": LOG}


def _provenance() -> Provenance:
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "trl": "1.16.0"}
    data: Row = {"use": "training", "pairs": "beavertails harmless", "name": "PKU-Alignment/PKU-SafeRLHF"}
    return Provenance(
        [{"package": name, "version": version, "runs": 164} for name, version in versions.items()],
        [{"stage": "training", "kind": "GPU", "device": "NVIDIA H100", "runs": 32}],
        [data | {"revision": "v0", "commit": None, "digest": "0f" * 32, "runs": 80}],
        ["python -m peft_align.sweep +grid=method"],
        ["32 runs were trained on a GPU, 132 on a CPU: their speed is not comparable."],
        [],
    )
