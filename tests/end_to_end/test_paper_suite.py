"""The study's five benchmarks over a sweep on a real model and real data (`make acceptance-evaluation`)."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, Reply, Request

FIGURES = {
    "mmlu": "acc",
    "bbh": "exact_match",
    "alpaca_eval": "win_rate",
    "real_toxicity": "score",
    "red_instruct": "safety",
}


def judge(request: Request) -> Reply:
    """An answer that follows from the question alone, in the form that its prompt asks for."""
    side = hashlib.sha256(request.question.encode()).digest()[0] & 1
    if "[[A]]" in request.question:
        return Reply(f"[[{'AB'[side]}]]")
    first, second = ("model_1", "model_2") if side else ("model_2", "model_1")
    return Reply(f"[{{'model': '{first}', 'rank': 1}}, {{'model': '{second}', 'rank': 2}}]")


@pytest.mark.acceptance
def test_a_sweep_of_four_runs_ends_with_all_five_of_the_study(
    shared: Path, mirror: Path, smollm2: Path, verb: Any, tmp_path: Path
) -> None:
    prompt = shared / "peers/alpaca_eval/evaluators/alpaca_eval_gpt4/alpaca_eval.txt"
    with JudgeServer(judge) as server:
        words = (
            "model=smollm2_135m", "dataset=hh_rlhf", "method=sft,dpo", "preference=harmless,helpful", "peft=lora",
            f"hub.mirror={mirror}", "train.max_steps=2", "train.batch_size=4", "train.max_length=256",
            "evaluation=paper_small", "judge=endpoint", f"judge.base_url={server.url}",
            "benchmark.real_toxicity.judge=profanity", f"benchmark.alpaca_eval.prompt_file={prompt}",
            f"benchmark.red_instruct.folder={shared / 'peers/red_instruct'}",
        )  # fmt: skip
        done = verb("sweep", *words, timeout=5400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        print(done.stdout[-4000:])
        asked = len(server.requests)
        assert asked > 0
        again = verb("sweep", *words, check=True)
        assert "5 runs, 5 done, 0 to do" in again.stdout
        assert len(server.requests) == asked
    (path,) = (tmp_path / "outputs/sweeps").glob("*/results.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {row["run_id"] for row in rows}
    assert len(runs) == 5
    for benchmark, metric in FIGURES.items():
        found = [row for row in rows if (row["benchmark"], row["metric"]) == (benchmark, metric)]
        assert {row["run_id"] for row in found} == runs, benchmark
        assert all(row["value"] for row in found)
    assert {row["kind"] for row in rows} == {"train", "baseline"}
    judges = {row["benchmark"]: row["judge"] for row in rows if row["judge"]}
    judged_by = {"alpaca_eval": "endpoint/default", "red_instruct": "endpoint/default", "real_toxicity": "profanity"}
    assert judges == judged_by
