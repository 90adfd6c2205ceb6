"""What is told of each run: of a finished one, of one in progress, of those that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_training, plan, trained
from written import CPU, evaluated, finish, texts, trained_in

from peft_align.cli import ask
from peft_align.grid.planner import Item
from peft_align.grid.runs import Sweep
from peft_align.report import write_report
from peft_align.reporting.answers import answers
from peft_align.reporting.details import details
from peft_align.reporting.failures import log_end
from peft_align.reporting.provenance import provenance
from peft_align.reporting.told import labels, told_of
from peft_align.store import records
from peft_align.store.runs import RunDir

WORDS = ["model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[real_toxicity]"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(records, "sync", lambda path: None)  # nothing is lost here that matters


def of(items: list[Item], root: Path) -> list[dict[str, Any]]:
    """The details of all runs, which must be JSON as browsers read it."""
    found = details(items, root)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == [item.run.id for item in items]
    return list(found.values())


def test_a_run_that_is_done_is_told_with_settings_curves_scores_and_cost(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "method=dpo", "seed=3")
    measured = [{"step": i, "loss": 1 / i, "grad_norm": 2.0, "rewards/margins": 0.1 * i} for i in (1, 2, 3, 4)]
    run, base = of(finish(tmp_path, sweep, lambda run: 0.25, measured=measured), tmp_path)
    assert (run["label"], run["kind"], run["state"], run["reason"]) == (
        "dpo lora everyday harmless seed 3", "train", "done", None)  # fmt: skip
    assert run["config"]["method"] == "dpo"
    assert run["config"]["method.beta"] == 0.1
    assert run["config"]["seed"] == 3
    assert not [key for key in run["config"] if key.startswith(("hub", "launcher", "evaluation"))]
    assert run["curves"]["loss"] == [[1, 1.0], [2, 0.5], [3, 1 / 3], [4, 0.25]]
    assert run["curves"]["reward margin"][-1] == [4, 0.4]
    assert run["scores"] == [
        [4, "real_toxicity", "response_words", 0.5, 0.1, 8, None],
        [4, "real_toxicity", "score", 0.25, 0.1, 8, "toxicity_model/ToxicityModel"],
    ]
    assert (run["cost"]["train_hours"], run["cost"]["device_kind"]) == (1.0, "CPU")
    assert run["faults"] == []
    assert (base["label"], base["curves"], base["parents"]) == ("baseline tiny bf16", {}, [])
    assert base["config"]["precision.base_precision"] == "bf16"
    assert base["scores"][0][0] == 0


def test_a_parent_is_named_by_the_run_that_started_from_it(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "method=dpo", "method.init=sft")
    parent, run, _ = of(plan(sweep, tmp_path), tmp_path)
    assert parent["is_parent_only"]
    assert run["parents"] == [sweep.runs[0].id]


def test_runs_that_one_name_would_fit_are_told_apart_by_their_axes(tmp_path: Path) -> None:
    found = of(plan(expand(*WORDS, "peft.r=4,8", "method=sft"), tmp_path), tmp_path)
    assert [each["label"] for each in found[:2]] == [f"sft lora everyday harmless seed 0 peft.r={r}" for r in (4, 8)]


def test_a_training_in_progress_shows_the_steps_that_it_has_made(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    directory = RunDir(tmp_path, trained(sweep)[0].id)
    directory.attempt.mkdir(parents=True)
    lines = b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 3, "l'
    (directory.attempt / "metrics.jsonl").write_bytes(lines)
    run, _ = of(plan(sweep, tmp_path), tmp_path)
    assert run["state"] == "missing"
    assert run["reason"] == "train; evaluate real_toxicity; judge real_toxicity by toxicity_model"
    assert run["curves"] == {"loss": [[1, 3.0], [2, 2.5]]}
    assert run["faults"] == []  # the last line is being written


def test_a_run_that_failed_says_why_without_secrets_and_control_characters(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    directory = RunDir(tmp_path, trained(sweep)[0].id)
    directory.fail("train", "RuntimeError: \x1b[31mno access, token=abcdefghij123", "failed")
    run, _ = of(plan(sweep, tmp_path), tmp_path)
    assert (run["state"], run["reason"]) == ("failed", "train: RuntimeError: \\x1b[31mno access, token=***")


def damaged(root: Path, sweep: Sweep) -> dict[str, str]:
    """Damage a file of each of six finished runs; what was done to each."""
    items = finish(root, sweep, measured=[{"step": i, "loss": 2.0} for i in (1, 2, 3, 4)])
    done = {}
    for run, how in zip(trained(sweep), ["lines", "gone", "record", "samples", "judged", "log"], strict=True):
        directory = RunDir(root, run.id)
        (request,) = next(item for item in items if item.run is run).requests
        evaluation = directory.evaluation(request.name)
        metrics = directory.path / "metrics.jsonl"
        if how == "lines":  # of the same length, as a failing disk does it
            metrics.write_bytes(metrics.read_bytes().replace(b'{"step": 2', b"\x00" * 10))
        elif how == "gone":
            metrics.unlink()
        elif how == "record":
            (directory.path / "train.json").write_text("{")
        elif how in ("samples", "judged"):
            folder = evaluation if how == "samples" else next((evaluation / "judgements").iterdir())
            path = folder / "samples.jsonl.gz"
            path.write_bytes(path.read_bytes()[:40] + b"\xff" * (path.stat().st_size - 40))
        else:
            directory.log.mkdir()
        done[run.id] = how
    return done


def test_damaged_files_of_some_runs_stop_nothing_and_are_told_where_they_are(tmp_path: Path) -> None:
    asked = ask([*WORDS, "seed=0,1,2,3,4,5", f"root={tmp_path}"])
    how = damaged(tmp_path, asked.sweep)
    items = asked.plan()
    told = told_of(items, tmp_path)
    side_by_side = answers(items, tmp_path, told=told)
    found = {how[run]: one for run, one in details(items, tmp_path, told).items() if run in how}
    assert found["lines"]["faults"] == ["1 lines of metrics.jsonl cannot be read"]
    assert found["lines"]["curves"] == {"loss": [[1, 2.0], [3, 2.0], [4, 2.0]]}
    (gone,) = found["gone"]["faults"]
    assert gone.startswith("retrain: ")
    assert gone.endswith("/metrics.jsonl is missing")
    assert found["record"]["faults"] == ["retrain: its train.json is damaged: no JSON object"]
    assert found["record"]["curves"]["loss"][-1] == [4, 2.0]
    assert "samples.jsonl.gz cannot be read" in found["samples"]["faults"][0]
    assert "judgements/" in found["judged"]["faults"][0]
    assert found["log"]["faults"] == []
    assert [log_end(RunDir(tmp_path, run).log) for run, what in how.items() if what == "log"] == [None]
    shown = {answer["label"] for entry in side_by_side for answer in entry["answers"]}
    assert found["samples"]["label"] not in shown
    assert {found["judged"]["label"], found["lines"]["label"]} <= shown
    assert provenance(items, tmp_path, told).sentences
    assert "5 of 7 runs are complete" in write_report(asked, items)


def test_scores_that_are_no_finite_numbers_are_null(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "benchmark.real_toxicity.judge=none")
    for run in trained(sweep):
        finish_training(tmp_path, run, **trained_in(3.0, CPU))
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            evaluated(tmp_path, request, texts(item.run), float("inf"))
    run, _ = of(plan(sweep, tmp_path), tmp_path)
    assert [score[3] for score in run["scores"]] == [None]


def test_runs_of_a_grid_of_many_blocks_have_names_that_tell_them_apart_and_say_nothing_twice() -> None:
    sweep = expand("+grid=study_small")
    names = labels(sweep.runs)
    assert len(set(names.values())) == len(sweep.runs)
    assert not any("seed=" in name for name in names.values())
    assert "sft qlora hh_rlhf harmless tiny seed 0 peft.alpha=16.0 peft.r=64" in names.values()
