"""Where results come from: what is the same for all runs, what differs, and what never met a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_training, plan, trained
from written import CPU, GPU, evaluated, finish, made_on, texts, trained_in

from peft_align.reporting.provenance import NO_GPU, Provenance, provenance
from peft_align.store import records
from peft_align.store.sweeps import write_manifest

WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "evaluation.benchmarks=[real_toxicity]")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(records, "sync", lambda path: None)  # nothing is lost here that matters


def of(root: Path, *words: str, differently: Mapping[int, Mapping[str, Any]]) -> Provenance:
    """Of two training runs, whose records say something else."""
    sweep = expand(*WORDS, *words)
    one, other = trained(sweep)
    for i, run in enumerate((one, other)):
        finish_training(root, run, **(trained_in(8.0) | differently[i]))
    return provenance(plan(sweep, root), root)


def source(digest: str) -> dict[str, Any]:
    return {"data": {"name": "everyday", "commit": None, "digest": digest, "files": {}}}


def test_a_sweep_that_was_made_on_a_cpu_says_so(tmp_path: Path) -> None:
    found = provenance(finish(tmp_path, expand(*WORDS, "peft=lora", "seed=0,1")), tmp_path)
    assert found.sentences == [NO_GPU]
    assert found.devices == [
        {"stage": stage, "kind": "CPU", "device": "x86_64 CPU, 1 thread", "runs": runs}
        for stage, runs in (("evaluation", 3), ("judging", 3), ("training", 2))
    ]
    assert found.packages == [
        {"package": "python", "version": "3.11.7", "runs": 3},
        {"package": "torch", "version": "2.13.0", "runs": 3},
    ]
    assert found.code == [
        {"version": "0.1.0", "commit": "c" * 40, "dirty": False, "code": "d156dadfca4fb655", "runs": 3}
    ]
    assert found.judges == [{"benchmark": "real_toxicity", "judge": "toxicity_model/ToxicityModel", "runs": 3}]
    assert found.warnings == []


def test_what_was_never_made_on_a_gpu_is_named_where_others_were(tmp_path: Path) -> None:
    on_gpu, on_cpu = (trained_in(8.0, hardware) for hardware in (GPU, CPU))
    found = of(tmp_path, "peft=lora,qlora", differently={0: on_gpu, 1: on_cpu})
    assert found.sentences == [
        "1 run was trained on a GPU, 1 on a CPU: their speed is not comparable.",
        "Never made on a GPU: peft=qlora.",
    ]


def test_a_stage_without_a_gpu_is_named(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "peft=lora")
    finish_training(tmp_path, trained(sweep)[0], **trained_in(8.0, GPU))
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            evaluated(tmp_path, request, texts(item.run))
    found = provenance(plan(sweep, tmp_path), tmp_path)
    assert "No run of this sweep was evaluated on a GPU." in found.sentences
    assert NO_GPU not in found.sentences


def test_records_that_do_not_say_where_they_were_made_are_no_proof_of_a_cpu(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "peft=lora")
    finish_training(tmp_path, trained(sweep)[0])
    found = provenance(plan(sweep, tmp_path), tmp_path)
    assert found.sentences == ["1 run has records that do not say on what device they were made."]


def test_versions_and_code_that_differ_are_told_with_counts(tmp_path: Path) -> None:
    newer = made_on(CPU, packages={"torch": "2.14.0"}, git={"commit": "e" * 40, "dirty": True}, code="ffff")
    found = of(tmp_path, "peft=lora", "seed=0,1", differently={0: {}, 1: {"provenance": newer}})
    assert [(row["version"], row["runs"]) for row in found.packages if row["package"] == "torch"] == [
        ("2.13.0", 1),
        ("2.14.0", 1),
    ]
    assert found.warnings == [
        "1 run was made by code with changes that no commit has.",
        "Runs were made by several states of the code: see their versions and commits.",
        "Runs were made with several versions of torch.",
    ]


def test_data_that_differ_between_runs_are_warned_of(tmp_path: Path) -> None:
    differently = {0: {"inputs": source("a" * 64)}, 1: {"inputs": source("b" * 64)}}
    found = of(tmp_path, "peft=lora", "seed=0,1", differently=differently)
    assert [(row["use"], row["name"], row["digest"][:1], row["runs"]) for row in found.datasets] == [
        ("training", "everyday", "a", 1),
        ("training", "everyday", "b", 1),
    ]
    assert found.warnings == [
        "Runs read different data for training: everyday (everyday harmless) has several digests."
    ]


def test_other_pairs_of_a_dataset_have_other_digests_without_a_warning(tmp_path: Path) -> None:
    differently = {0: {"inputs": source("a" * 64)}, 1: {"inputs": source("b" * 64)}}
    found = of(tmp_path, "peft=lora", "preference=harmless,helpful", differently=differently)
    assert {row["pairs"] for row in found.datasets} == {"everyday harmless", "everyday helpful"}
    assert found.warnings == []


def test_weights_that_differ_are_warned_of_and_a_warning_of_a_record_is_told_once(tmp_path: Path) -> None:
    weights = [{"model": {"name": "m", "commit": "1" * 40, "digest": c * 64, "files": {}}} for c in "ab"]
    told = {"warning": "97 rows, where 100 are known"}
    differently = {i: {"inputs": weights[i], "data": told} for i in (0, 1)}
    found = of(tmp_path, "peft=lora", "seed=0,1", differently=differently)
    assert [(row["option"], row["commit"][0], row["digest"][0]) for row in found.models] == [
        ("tiny", "1", "a"),
        ("tiny", "1", "b"),
    ]
    assert found.warnings == ["Runs of the model tiny read different weights.", "97 rows, where 100 are known"]


def test_the_commands_are_those_of_sweeps_that_have_these_runs(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "peft=lora")
    ids = [run.id for run in sweep.runs]
    write_manifest(tmp_path / "sweeps/a", ["model=tiny", "benchmark.x.y=[a b]", "judge.url=https://u:p@h"], [], ids)
    write_manifest(tmp_path / "sweeps/b", ["+grid=other"], [], ["another-run"])
    (tmp_path / "sweeps/c").mkdir()
    (tmp_path / "sweeps/c/sweep.json").write_text("{")
    found = provenance(plan(sweep, tmp_path), tmp_path)
    assert found.commands == ["python -m peft_align.sweep model=tiny 'benchmark.x.y=[a b]' 'judge.url=https://***@h'"]


def test_a_sweep_of_which_nothing_is_there_has_empty_lists(tmp_path: Path) -> None:
    assert provenance(plan(expand(*WORDS, "peft=lora"), tmp_path), tmp_path) == Provenance()
