"""What runs took, and what a point over the unaligned base took, with the measure's direction."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from measured import done, table
from sweeping import expand, finish_evaluation, finish_training, metric, plan, shipped, trained
from written import CPU, GPU, finish, made_on, trained_in

from peft_align.cli import ask
from peft_align.grid.runs import Run, Sweep
from peft_align.report import write_report
from peft_align.reporting import findings
from peft_align.reporting.cost import COLUMNS, cost_rows, per_point, per_point_columns
from peft_align.reporting.table import Row
from peft_align.store import records

WORDS = ("model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4")
TEXTS, CHOICE = "evaluation.benchmarks=[real_toxicity]", "evaluation.benchmarks=[everyday_mc]"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(records, "sync", lambda path: None)  # nothing is lost here that matters


def of_one(root: Path, **record: Any) -> Row:
    """The row of a training run with such a record."""
    sweep = expand(*WORDS, CHOICE)
    finish_training(root, trained(sweep)[0], **record)
    (row,) = cost_rows(plan(sweep, root), root)
    assert list(row) == COLUMNS
    return row


def test_a_run_is_told_with_hours_memory_throughput_and_device(tmp_path: Path) -> None:
    row, base = cost_rows(finish(tmp_path, expand(*WORDS, TEXTS, "seed=5")), tmp_path)
    assert (row["train_hours"], row["device_hours"], row["evaluation_hours"], row["judging_hours"]) == (
        1,
        1,
        0.01,
        0.01,
    )
    assert (row["peak_memory_gb"], row["memory_of"]) == (2, "process")
    assert (row["tokens"], row["tokens_per_second"], row["samples_per_second"]) == (1600, 1600 / 3599, 16 / 3599)
    assert (row["device"], row["device_kind"], row["processes"]) == ("x86_64 CPU, 1 thread", "CPU", 1)
    assert (row["method"], row["seed"], row["energy_kwh"]) == ("sft", 5, None)
    assert (base["kind"], base["train_hours"], base["device"]) == ("baseline", None, None)
    assert (base["evaluation_hours"], base["evaluated_on"]) == (0.01, "x86_64 CPU, 1 thread")


def test_several_gpus_count_each_and_their_energy_is_what_they_told(tmp_path: Path) -> None:
    row = of_one(tmp_path, **trained_in(3599, GPU, processes=4, energy_joules=7.2e6))
    assert (row["train_hours"], row["device_hours"]) == (1, 4)
    assert (row["device"], row["device_kind"], row["energy_kwh"]) == ("NVIDIA H100", "GPU", 2)
    assert (row["peak_memory_gb"], row["memory_of"]) == (3, "GPU")


def test_hours_of_attempts_that_it_goes_on_from_count(tmp_path: Path) -> None:
    """The total is of the last attempt, the steps of all."""
    assert of_one(tmp_path, **trained_in(7200, seconds={"total": 10, "training": 7200}))["train_hours"] == 2


def test_of_a_pack_a_run_has_its_share_of_the_hours(tmp_path: Path) -> None:
    row = of_one(tmp_path, **trained_in(1800, seconds={"total": 7200, "training": 1800}, packed_with=["a", "b"]))
    assert (row["train_hours"], row["packed_with"]) == (0.5, 2)


def test_what_an_early_record_does_not_say_is_empty(tmp_path: Path) -> None:
    row = of_one(tmp_path, samples=8, provenance={"hardware": {"cpu": "x86_64"}}, processes="many")
    assert (row["train_hours"], row["device_hours"], row["device"], row["peak_memory_gb"]) == (None,) * 4
    assert row["processes"] == 1


def test_runs_of_which_nothing_is_known_have_no_row_and_parents_have_one(tmp_path: Path) -> None:
    sweep = expand(*WORDS, CHOICE, "method=dpo", "method.init=sft")
    finish_training(tmp_path, sweep.runs[0], **trained_in(3599))
    (row,) = cost_rows(plan(sweep, tmp_path), tmp_path)
    assert (row["run_id"], row["is_parent_only"]) == (sweep.runs[0].id, True)


def gains(words: tuple[str, ...], values: dict[str, float], hours: float = 3.0, better: bool = True) -> list[Row]:
    """What a point took where methods, and the base, have these values of their benchmark."""
    sweep: Sweep = expand(*WORDS, *words)

    def give(run: Run, name: str, step: int) -> float:
        return values[run.choices["method"] if run.kind == "train" else "base"]

    rows = [row | {"higher_is_better": better} for row in table(sweep, give)]
    found = findings.find(shipped(), findings.load_questions(shipped()), sweep, done(sweep), rows)
    costs = [{"run_id": run.id, "device_hours": hours, "device_kind": "GPU"} for run in trained(sweep)]
    points = per_point(found, costs)
    assert all(set(row) == set(per_point_columns(found.results)) for row in points)
    return points


def test_a_point_of_a_share_is_a_hundredth(tmp_path: Path) -> None:
    row, other = gains((CHOICE, "method=sft,dpo"), {"base": 0.5, "sft": 0.56, "dpo": 0.5})
    assert (row["method"], row["point"], row["baseline"], row["mean"]) == ("sft", 0.01, 0.5, 0.56)
    assert row["gain"] == pytest.approx(6)
    assert row["hours_per_point"] == pytest.approx(0.5)
    assert row["device_kind"] == "GPU"
    assert (other["gain"], other["hours_per_point"]) == (0, None)


def test_where_lower_is_better_a_fall_is_the_gain() -> None:
    row, other = gains((CHOICE, "method=sft,dpo"), {"base": 0.5, "sft": 0.56, "dpo": 0.4}, better=False)
    assert row["gain"] == pytest.approx(-6)
    assert row["hours_per_point"] is None
    assert other["gain"] == pytest.approx(10)
    assert other["gain_low"] < other["gain"] < other["gain_high"]
    assert other["hours_per_point"] == pytest.approx(0.3)


def test_a_measure_that_is_no_share_counts_in_its_own_units_and_seeds_are_one_cell() -> None:
    words = ("evaluation.benchmarks=[alpaca_eval]", "judge=gpt4", "judge.model=m", "seed=0,1")
    (row,) = gains(words, {"base": 20.0, "sft": 26.0})
    assert (row["point"], row["gain"], row["hours"], row["hours_per_point"], row["seeds"]) == (1, 6, 3, 0.5, 2)
    assert (row["gain_low"], row["gain_high"], row["is_gain_shown"]) == (6, 6, True)


def test_a_merge_took_what_its_inputs_took() -> None:
    sweep = expand("+grid=merge", "model=mistral_7b", "seed=0", "evaluation.benchmarks=[everyday_mc]")
    rows = table(sweep, lambda run, name, step: 0.5 if run.kind == "baseline" else 0.75)
    found = findings.find(shipped(), findings.load_questions(shipped()), sweep, done(sweep), rows)
    costs = [{"run_id": run.id, "device_hours": 2.0, "device_kind": "GPU"} for run in sweep.runs if run.kind == "train"]
    merged = [row for row in per_point(found, costs) if row["kind"] == "merge"]
    assert merged
    parents = {run.id: len(run.parents) for run in sweep.runs if run.kind == "merge"}
    assert {row["hours"] for row in merged} == {2.0 * n for n in parents.values()}


def test_report_writes_them_also_of_a_sweep_in_progress(tmp_path: Path) -> None:
    asked = ask([*WORDS, CHOICE, "seed=0,1", f"root={tmp_path}"])
    finish_training(tmp_path, trained(asked.sweep)[0], **trained_in(3599, provenance=made_on(CPU)))
    for item in plan(asked.sweep, tmp_path):
        for request in item.requests:
            if request.key is not None:
                finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    write_report(asked, asked.plan())
    with (asked.folder / "cost.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["kind"], row["train_hours"], row["device_kind"]) for row in found] == [("train", "1.0", "CPU")]
