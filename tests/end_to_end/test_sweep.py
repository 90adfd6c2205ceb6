"""A whole sweep through the command line, on the tiny model."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, plan

from peft_align.grid.disk import room_needed
from peft_align.store.usage import taken

WORDS = (
    "model=tiny", "dataset=everyday", "method=sft,dpo", "peft=lora,qlora",
    "train.max_steps=2", "train.batch_size=2", "train.max_length=200", "train.checkpoint_steps=[1,2]",
    "evaluation.benchmarks=[preference,everyday_mc]", "evaluation.heldout=4", "evaluation.limit=3",
    "launcher.threads=1",
)  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = (folder / "outputs/sweeps").glob("*/results.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "outputs/runs").rglob("*.json")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, "-m", "peft_align.sweep", *WORDS], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "| baseline | nf4" in done.stdout
    return folder


def test_the_table_is_complete(undisturbed: Path) -> None:
    table = rows(undisturbed)
    trained = [row for row in table if row["kind"] == "train"]
    assert len({row["run_id"] for row in trained}) == 4
    assert len(trained) == 4 * 2 * (4 + 2) + 2 * 2  # steps × (preference metrics + acc and acc_norm); DPO has its loss
    baselines = [row for row in table if row["kind"] == "baseline"]
    assert len({row["run_id"] for row in baselines}) == 2
    assert len(baselines) == 2 * (2 + 2)
    assert all(row["value"] and row["n"] for row in table)


def test_plan_said_beforehand_what_the_sweep_leaves_on_disk(undisturbed: Path, tmp_path: Path) -> None:
    planned = room_needed(tmp_path, plan(expand(*WORDS), tmp_path))
    root = undisturbed / "outputs"
    left = taken(root / "runs", root / "reference", root / "tokenized")
    assert planned.total - planned.states == pytest.approx(left, rel=0.1)


def test_the_same_command_again_does_nothing_and_shows_the_same(undisturbed: Path) -> None:
    before, table = stamps(undisturbed), rows(undisturbed)
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "peft_align.sweep", *WORDS], cwd=undisturbed, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "6 runs, 6 done, 0 to do" in done.stdout
    assert time.time() - started < 20
    assert stamps(undisturbed) == before
    assert rows(undisturbed) == table


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_completes_the_same_table(undisturbed: Path, tmp_path: Path) -> None:
    for seconds in (9.0, 11.0, 14.0):
        sweep = subprocess.Popen(
            [sys.executable, "-m", "peft_align.sweep", *WORDS], cwd=tmp_path, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(seconds)
        os.kill(sweep.pid, signal.SIGKILL)
        sweep.wait()
        time.sleep(0.5)
        kept = {
            path: path.stat().st_mtime_ns
            for path in (tmp_path / "outputs/runs").glob("*/train.json")
            if json.loads(path.read_text())
        }
    done = subprocess.run(
        [sys.executable, "-m", "peft_align.sweep", *WORDS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items()), "finished work was done again"
    assert rows(tmp_path) == rows(undisturbed)
    assert list((tmp_path / "outputs/runs").glob("*/attempt")) == []


@pytest.mark.slow
def test_another_benchmark_is_evaluated_without_training(here: Any, tmp_path: Path) -> None:
    words = [
        "model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=2", "train.batch_size=2",
        "train.max_length=200", "launcher=debug",
    ]  # fmt: skip
    here("sweep", *words, "evaluation.benchmarks=[preference]", "evaluation.heldout=4", check=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs/runs").glob("*/train.json")}
    more = ["evaluation.benchmarks=[preference,everyday_mc]", "evaluation.heldout=4", "evaluation.limit=3"]
    plan = json.loads(here("plan", *words, *more, "--json", check=True).stdout)
    assert {run["to_do"] for run in plan["run_list"]} == {"evaluate everyday_mc"}
    done = here("evaluate", *words, *more, check=True)
    assert "2 runs to evaluate, 0 not made yet" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs/runs").glob("*/train.json")} == before


@pytest.mark.slow
def test_another_checkpoint_step_replaces_the_run_with_the_same_adapter(here: Any, tmp_path: Path) -> None:
    words = [
        "model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=2", "train.batch_size=2",
        "train.max_length=200",
    ]  # fmt: skip
    here("train", *words, check=True)
    (adapter,) = (tmp_path / "outputs/runs").glob("*/adapter/adapter_model.safetensors")
    weights = adapter.read_bytes()
    more = [*words, "train.checkpoint_steps=[1,2]"]
    plan = json.loads(here("plan", *more, "--json", check=True).stdout)
    assert plan["run_list"][0]["to_do"].startswith("retrain for steps 1")
    here("train", *more, check=True)
    assert adapter.read_bytes() == weights
    here("train", *words, check=True)  # the other command's steps stay: the two do not undo each other
    assert sorted(p.name for p in adapter.parents[1].joinpath("checkpoints").iterdir()) == [
        "step-000001",
        "step-000002",
    ]


@pytest.mark.slow
def test_dpo_from_sft_shares_one_parent(here: Any, tmp_path: Path) -> None:
    words = [
        "model=tiny", "dataset=everyday", "method=dpo", "method.init=sft", "method.beta=0.1,0.5", "peft=lora",
        "train.max_steps=2", "train.batch_size=2", "train.max_length=200", "evaluation.benchmarks=[preference]",
        "evaluation.heldout=4",
    ]  # fmt: skip
    plan = json.loads(here("plan", *words, "--json", check=True).stdout)
    assert (plan["kinds"], plan["parents"]) == ({"train": 2, "merge": 0, "baseline": 1}, 1)
    here("sweep", *words, "launcher=debug", check=True)
    assert len(list((tmp_path / "outputs/runs").glob("*/train.json"))) == 3
    assert {row["method.beta"] for row in rows(tmp_path)} == {"0.1", "0.5", ""}
