"""Held-out preference metrics on the tiny model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand

from peft_align.evaluation.scores import mean_metric
from peft_align.evaluation.suite import Suite
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.models.loading import load_base
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir
from peft_align.training.run import train

WORDS = (
    "model=tiny", "dataset=everyday", "method=dpo", "peft=lora", "peft.compute_dtype=fp32", "train.max_steps=2",
    "train.batch_size=2", "train.learning_rate=1e-2", "train.max_length=300", "evaluation.benchmarks=[preference]",
    "evaluation.heldout=6",
)  # fmt: skip


def evaluated(run: Run, root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record and the samples of the run's one evaluation, done if it is missing."""
    directory, planner = RunDir(root, run.id), Planner(root, None)
    base = load_base(run.config)
    if planner.item(run).to_make:
        train(run, directory, base, lambda metrics, step: None)
    Suite().evaluate(run, directory, base, [request for request, _ in planner.item(run).missing])
    item = planner.item(run)
    assert item.done
    folder = directory.evaluation(item.requests[0].name)
    with gzip.open(folder / "samples.jsonl.gz", "rt", encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    return read_json(folder / "record.json") or {}, samples


def value(record: dict[str, Any], name: str) -> float:
    return next(float(m["value"]) for m in record["metrics"] if m["name"] == name)


def test_metrics_follow_from_the_log_probabilities_of_run_and_baseline(tmp_path: Path) -> None:
    run, baseline = expand(*WORDS).runs
    record, samples = evaluated(run, tmp_path)
    base_record, base_samples = evaluated(baseline, tmp_path)
    assert [s["id"] for s in samples] == [s["id"] for s in base_samples]
    assert len(samples) == 6
    margins = [
        (s["chosen_logp"] - b["chosen_logp"]) - (s["rejected_logp"] - b["rejected_logp"])
        for s, b in zip(samples, base_samples, strict=True)
    ]
    assert value(record, "reward_margin") == pytest.approx(sum(margins) / 6, abs=1e-4)
    assert value(record, "reward_accuracy") == sum(m > 0 for m in margins) / 6
    assert value(record, "accuracy") == sum(s["chosen_logp"] > s["rejected_logp"] for s in samples) / 6
    losses = [-s["chosen_logp"] / s["chosen_tokens"] for s in samples]
    assert value(record, "response_loss") == pytest.approx(sum(losses) / 6)
    assert {m["name"] for m in base_record["metrics"]} == {"accuracy", "response_loss"}  # no reward against itself
    assert (record["dataset"], record["preference"], record["step"]) == ("everyday", "harmless", 2)
    assert base_record["step"] == 0


def test_standard_error_is_that_of_the_mean() -> None:
    metric = mean_metric("m", [1.0, 2.0, 4.0], True)
    assert metric.value == pytest.approx(7 / 3)
    assert metric.stderr == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert mean_metric("m", [1.0], True).stderr is None


def test_another_number_of_held_out_pairs_is_another_evaluation(tmp_path: Path) -> None:
    run = expand(*WORDS).runs[0]
    evaluated(run, tmp_path)
    more = expand(*WORDS[:-1], "evaluation.heldout=7").runs[0]
    assert more.id == run.id
    assert [request.benchmark for request, _ in Planner(tmp_path, None).item(more).missing] == ["preference"]


def test_damaged_samples_are_evaluated_again(tmp_path: Path) -> None:
    run = expand(*WORDS).runs[0]
    evaluated(run, tmp_path)
    item = Planner(tmp_path, None).item(run)
    path = RunDir(tmp_path, run.id).evaluation(item.requests[0].name) / "samples.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-5])
    assert "samples.jsonl.gz has" in Planner(tmp_path, None).item(run).why
