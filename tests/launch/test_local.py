"""Workers on this machine: one failed run never stops the others, a dead worker is told, nothing goes on unseen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_align.launch.local import visible_gpus
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir

SMALL = (
    "model=tiny", "dataset=everyday", "train.max_steps=2", "train.batch_size=2", "train.max_length=200",
    "evaluation.benchmarks=[preference]", "evaluation.heldout=4", "launcher.threads=1",
)  # fmt: skip


def ids(plan: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(plan.stdout)["run_list"]
    return listed


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.05)


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "peft_align.sweep", *words],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        # where the tests themselves run in a shell's background, an interrupt would be ignored by their children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def progress_of(root: Path) -> list[dict[str, Any]]:
    found = [read_json(path) for path in (root / "runs").glob("*/progress.json")]
    return [progress for progress in found if progress]


def test_a_failed_run_stops_no_other_and_is_told_with_the_end_of_its_log(verb: Any, tmp_path: Path) -> None:
    done = verb("sweep", *SMALL, "method=sft", "peft=lora", "train.learning_rate=1e-4,1e30", "train.max_grad_norm=1e30",
                "train.max_steps=4", "train.optimizer=adamw_torch")  # fmt: skip
    words = [word for word in SMALL if word != "train.max_steps=2"]
    assert done.returncode == 2, "a key given twice is refused"
    done = verb("sweep", *words, "method=sft", "peft=lora", "train.learning_rate=1e-4,1e30", "train.max_grad_norm=1e30",
                "train.max_steps=4", "train.optimizer=adamw_torch")  # fmt: skip
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "the loss is nan" in done.stdout
    assert "TrainingFailed" in done.stdout.partition("the end of")[2]
    assert "1 of 3 runs are not done" in done.stdout
    rows = (next((tmp_path / "outputs/sweeps").glob("*/results.csv"))).read_text().splitlines()
    assert len(rows) == 1 + 4 + 2  # the other run's four metrics, the baseline's two


def test_a_worker_killed_in_the_middle_fails_its_run_only(tmp_path: Path) -> None:
    words = [*(word for word in SMALL if "max_steps" not in word), "train.max_steps=400", "seed=0,1", "peft=lora"]
    root = tmp_path / "outputs"
    sweep = start(tmp_path, *words)
    try:
        wait_for(lambda: any(p.get("stage") == "train" and p.get("step", 0) > 3 for p in progress_of(root)))
        victim = next(p["pid"] for p in progress_of(root))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: any((root / "runs").glob("*/failed.json")))
        wait_for(lambda: any(p.get("stage") == "train" and p["pid"] != victim for p in progress_of(root)))
    finally:
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    failures = [read_json(path) or {} for path in (root / "runs").glob("*/failed.json")]
    assert [failure["reason"] for failure in failures] == ["the worker died: signal SIGKILL"]


def test_no_worker_outlives_a_killed_sweep_and_status_says_that_the_run_is_lost(verb: Any, tmp_path: Path) -> None:
    words = [*(word for word in SMALL if "max_steps" not in word), "train.max_steps=400", "peft=lora"]
    root = tmp_path / "outputs"
    sweep = start(tmp_path, *words)
    wait_for(lambda: any(p.get("step", 0) > 3 for p in progress_of(root)))
    worker = progress_of(root)[0]["pid"]
    running = json.loads(verb("status", *words, "--json").stdout)
    assert running["counts"]["running"] == 1
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text())
    lost = json.loads(verb("status", "--json").stdout)
    assert lost["counts"]["lost"] == 1
    train_run = next(run for run in lost["runs"] if run["state"] == "lost")
    assert RunDir(root, train_run["run_id"]).train_record() is None


def test_an_interrupt_stops_the_workers_and_the_sweep(tmp_path: Path) -> None:
    words = [*(word for word in SMALL if "max_steps" not in word), "train.max_steps=400", "peft=lora"]
    sweep = start(tmp_path, *words)
    wait_for(lambda: any(p.get("step", 0) > 3 for p in progress_of(tmp_path / "outputs")))
    worker = progress_of(tmp_path / "outputs")[0]["pid"]
    os.kill(sweep.pid, signal.SIGINT)
    assert sweep.wait(timeout=30) == 130
    assert not Path(f"/proc/{worker}").exists()
    assert list((tmp_path / "outputs/runs").glob("*/progress.json")) == []


@pytest.mark.slow
def test_two_sweeps_of_the_same_runs_at_once_do_none_twice(verb: Any, tmp_path: Path) -> None:
    words = (*SMALL, "method=sft,dpo", "peft=lora")
    other = start(tmp_path, *words)
    done = verb("sweep", *words)
    assert other.wait(timeout=120) == 0
    assert done.returncode == 0, done.stdout + done.stderr
    for log in (tmp_path / "outputs/runs").glob("*/train.log"):
        assert log.read_text().count("'train_runtime'") <= 1


@pytest.mark.slow
def test_two_workers_share_the_runs_of_one_base(verb: Any, tmp_path: Path) -> None:
    words = [word for word in SMALL if "threads" not in word]
    verb("sweep", *words, "seed=0,1", "peft=lora", "launcher.workers=2", check=True)
    assert len(list((tmp_path / "outputs/sweeps").glob("*/jobs/*.json"))) == 2


def test_visible_gpus_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert visible_gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
