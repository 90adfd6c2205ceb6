"""A worker between its stages: what is done is said to be done, and a signal is never lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained

from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.launch import distributed
from peft_align.launch.job import Worker
from peft_align.launch.process import Stopped, asked_to_stop
from peft_align.launch.watch import observe
from peft_align.store.runs import RunDir

WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "peft=lora", "evaluation.benchmarks=[everyday_mc]")


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that is done, and of which a failure is remembered."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    sweep = expand(*WORDS)
    (run,) = trained(sweep)
    finish_training(tmp_path, run)
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    RunDir(tmp_path, run.id).fail("judge", "RuntimeError: the endpoint is down")
    return run


def test_what_is_done_is_done_whatever_failed_before(tmp_path: Path, done: Run) -> None:
    planner = Planner(tmp_path, None)
    item = planner.item(done)
    assert item.done
    assert observe(planner, item).state == "done"


def test_a_run_seen_before_it_was_done_is_looked_at_again(tmp_path: Path, done: Run) -> None:
    evaluation = next((RunDir(tmp_path, done.id).path / "evaluations").glob("*/record.json"))
    content = evaluation.read_bytes()
    evaluation.unlink()
    planner = Planner(tmp_path, None)
    item = planner.item(done)
    assert observe(planner, item).state == "failed"
    evaluation.write_bytes(content)
    assert observe(planner, item).state == "done"


def test_a_worker_that_finds_nothing_left_to_do_forgets_the_failure(tmp_path: Path, done: Run) -> None:
    assert Worker(tmp_path, "sweep", ("judge",)).do(done) is True
    assert RunDir(tmp_path, done.id).failure() is None


@pytest.mark.parametrize("by", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_in_the_last_step_of_training_ends_the_task_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals
) -> None:
    def train(run: Run, *others: Any) -> None:
        asked_to_stop(by)  # its last step is under way: nobody asks any more
        finish_training(tmp_path, run)

    monkeypatch.setattr(distributed, "train_here", train)
    monkeypatch.setattr(Worker, "_base", lambda *args: object())
    monkeypatch.setattr(asked_to_stop, "by", 0)
    (run,) = trained(expand(*WORDS))
    with pytest.raises(Stopped) as stop:
        Worker(tmp_path, "sweep").do(run)
    assert stop.value.signal == by
    directory = RunDir(tmp_path, run.id)
    assert directory.train_record() is not None
    assert (directory.failure() or {})["kind"] == ("time_limit" if by == signal.SIGUSR1 else "stopped")


def test_a_worker_that_was_taken_for_dead_stops_and_leaves_the_run_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (run,) = trained(expand(*WORDS, "train.batch_size=2"))
    directory, steps, told = RunDir(tmp_path, run.id), set[int](), RunDir.report_progress

    def progress(self: RunDir, **now: Any) -> None:
        steps.add(now.get("step") or 0)
        if now.get("step") == 2:  # it slept for minutes, and another machine's worker went on
            (self.path / "lease/000002").write_text("{}")
        told(self, **now)

    monkeypatch.setattr(RunDir, "report_progress", progress)
    monkeypatch.setattr("peft_align.training.recorder.TOLD", 0.0)
    worker = Worker(tmp_path, "sweep", ("train",))
    assert worker.do(run) is None
    assert "gave no sign of life for too long" in capfd.readouterr().out
    assert max(steps) == 2
    assert directory.train_record() is None
    assert directory.failure() is None
    assert directory.progress() is not None, "it is the other's"
    (directory.path / "lease/000002.free").touch()
    monkeypatch.setattr(RunDir, "report_progress", told)
    assert worker.do(run) is True
    assert directory.train_record() is not None
