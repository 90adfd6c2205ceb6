"""Sixteen runs on real data with a real model; about twenty minutes (`make acceptance-real`)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.acceptance
def test_two_datasets_two_preferences_two_methods_and_both_precisions(
    mirror: Path, smollm2: Path, verb: Any, tmp_path: Path
) -> None:
    done = verb(
        "sweep", "dataset=hh_rlhf,beavertails", "preference=harmless,helpful", "method=sft,dpo", "peft=lora,qlora",
        "model=smollm2_135m", f"hub.mirror={mirror}", "train.max_steps=2", "train.batch_size=4",
        "evaluation.benchmarks=[mmlu,preference]", "evaluation.limit=1", "evaluation.heldout=16", timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "outputs/sweeps").glob("*/results.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["kind"] == "train"]
    assert len({row["run_id"] for row in trained}) == 16
    assert len(trained) == 16 * (1 + 4) + 8  # a DPO run has its loss besides
    assert len({row["run_id"] for row in rows} - {row["run_id"] for row in trained}) == 2
    assert {(row["n"], row["higher_is_better"]) for row in rows if row["benchmark"] == "mmlu"} == {("57", "true")}
    assert {row["n"] for row in rows if row["benchmark"] == "preference"} == {"16"}
