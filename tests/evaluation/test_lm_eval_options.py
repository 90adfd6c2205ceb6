"""The options of conf/benchmark/ that are lm-eval's tasks, on real data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from peft_align.store.records import read_json

# Option -> parts, and the metrics that its table shows.
OPTIONS = {
    "bbh": (27, {"exact_match"}),
    "truthfulqa": (1, {"acc"}),
    "gsm8k": (1, {"exact_match,strict-match", "exact_match,flexible-extract"}),
    "hhh_alignment": (4, {"acc"}),
}


@pytest.mark.slow
def test_each_option_scores_real_questions_from_the_mirror(verb: Any, tmp_path: Path, mirror: Path) -> None:
    verb(
        "sweep", "model=tiny", "dataset=everyday", "peft=lora", f"hub.mirror={mirror}", "evaluation.limit=1",
        f"evaluation.benchmarks=[{','.join(OPTIONS)}]", "train.max_steps=1", "train.batch_size=2",
        "train.max_length=128", check=True, timeout=900,
    )  # fmt: skip
    records = [read_json(path) for path in (tmp_path / "outputs/runs").glob("everyday-*/evaluations/*/record.json")]
    found = {record["benchmark"]: record for record in records if record}
    assert set(found) == set(OPTIONS)
    for name, (parts, metrics) in OPTIONS.items():
        record = found[name]
        assert {metric["name"] for metric in record["metrics"]} == metrics
        assert {metric["n"] for metric in record["metrics"]} == {parts}
        assert all(metric["higher_is_better"] for metric in record["metrics"])
        assert record["inputs"].keys() - {"model"}  # the data's digest is in the record


@pytest.mark.slow
def test_the_aligned_answer_of_hhh_is_the_labelled_one(verb: Any, tmp_path: Path, mirror: Path) -> None:
    verb(
        "sweep", "model=tiny", "dataset=everyday", "peft=lora", f"hub.mirror={mirror}", "evaluation.limit=5",
        "evaluation.benchmarks=[hhh_alignment]", "train.max_steps=1", "train.batch_size=2", "train.max_length=128",
        check=True, timeout=900,
    )  # fmt: skip
    (path,) = (tmp_path / "outputs/runs").glob("everyday-*/evaluations/*/samples.jsonl.gz")
    with gzip.open(path, "rt") as file:
        samples = [json.loads(line) for line in file]
    assert len(samples) == 20
    for sample in samples:
        labels = sample["doc"]["targets"]["labels"]
        likelihoods = [response[0] for response in sample["filtered_resps"]]
        assert len(likelihoods) == len(labels)
        assert sample["acc"] == float(labels[likelihoods.index(max(likelihoods))] == 1)
