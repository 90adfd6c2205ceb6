"""How often a run stopped and why: what is remembered, and what is counted against it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from peft_align.store.records import write_json
from peft_align.store.runs import COUNTED, STOPS, RunDir, step_name, this_task


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    found = RunDir(tmp_path, "run")
    found.path.mkdir(parents=True)
    return found


def stop(directory: RunDir, kind: str, step: int = 0, stage: str = "train") -> None:
    """Stop at a step as a worker does: it was in progress before, and training had saved its state."""
    if stage == "train":
        shutil.rmtree(directory.state, ignore_errors=True)
        write_json(directory.state / step_name(step) / "record.json", {"step": step})
    directory.report_progress(stage=stage, step=step, of=100)
    directory.fail(stage, "so it was", kind)


def test_a_run_that_never_stopped_has_no_history(directory: RunDir) -> None:
    assert directory.history() == []
    assert directory.attempts() == 0
    assert RunDir(directory.root, "not there").attempts() == 0


def test_why_it_stopped_is_kept_in_order_and_the_last_is_the_failure(directory: RunDir) -> None:
    stop(directory, "out_of_memory", 3)
    directory.fail("evaluate", "no such file", log="here")
    first, second = directory.history()
    assert (first["kind"], first["stage"], first["step"], first["reason"]) == ("out_of_memory", "train", 3, "so it was")
    assert (second["kind"], second["stage"], second["log"]) == ("failed", "evaluate", "here")
    assert directory.failure() == second
    assert directory.progress() is None
    assert first["time"] <= second["time"]


def test_a_new_start_forgets_the_failure_and_not_the_history(directory: RunDir) -> None:
    stop(directory, "failed")
    directory.clear_state()
    assert directory.failure() is None
    assert len(directory.history()) == 1


@pytest.mark.parametrize("kind", STOPS)
def test_what_a_run_does_by_itself_is_counted_and_what_happens_to_it_is_not(directory: RunDir, kind: str) -> None:
    for _ in range(3):
        stop(directory, kind, 5)
    assert directory.attempts() == (3 if kind in COUNTED else 0)


def test_what_the_cluster_does_in_between_changes_no_count(directory: RunDir) -> None:
    for kind in ("failed", "preempted", "out_of_memory", "node_failure", "lost", "stopped", "cancelled", "killed"):
        stop(directory, kind, 5)
    assert directory.attempts() == 3


def test_getting_further_starts_the_count_again(directory: RunDir) -> None:
    for step, expected in ((10, 1), (10, 2), (20, 1), (20, 2), (15, 3), (21, 1)):
        stop(directory, "time_limit", step)
        assert directory.attempts() == expected, step


def test_getting_further_before_the_cluster_took_its_node_counts_as_further(directory: RunDir) -> None:
    stop(directory, "failed", 10)
    stop(directory, "failed", 10)
    stop(directory, "preempted", 50)
    assert directory.attempts() == 0
    stop(directory, "failed", 50)
    assert directory.attempts() == 1


def test_what_is_recorded_in_between_starts_the_count_again(directory: RunDir) -> None:
    stop(directory, "failed", 90)
    stop(directory, "failed", 90)
    write_json(directory.path / "train.json", {})
    stop(directory, "out_of_memory", 0, "evaluate")
    assert directory.attempts() == 1
    stop(directory, "out_of_memory", 0, "evaluate")
    assert directory.attempts() == 2


def test_texts_of_a_later_benchmark_are_further_however_few_they_are(directory: RunDir) -> None:
    for done, texts in ((3, 800), (6, 300), (9, 200)):
        for i in range(done):
            write_json(directory.evaluation(f"benchmark-{i}") / "record.json", {})
        stop(directory, "time_limit", texts, "evaluate")
        assert directory.attempts() == 1
    stop(directory, "time_limit", 200, "evaluate")
    assert directory.attempts() == 2


def test_steps_that_no_state_was_saved_of_are_not_further(directory: RunDir) -> None:
    for step in (50, 51, 52):
        directory.report_progress(stage="train", step=step, of=100)
        directory.fail("train", "no memory", "out_of_memory")
    assert directory.attempts() == 3


def test_coming_to_its_end_starts_the_count_again(directory: RunDir) -> None:
    stop(directory, "failed", 3)
    stop(directory, "failed", 3)
    directory.remember({"kind": "done", "stage": "train", "time": 0.0, "task": None})
    assert directory.attempts() == 0
    stop(directory, "failed", 3)
    assert directory.attempts() == 1


def test_waiting_for_a_parent_is_neither_counted_nor_a_step_further(directory: RunDir) -> None:
    stop(directory, "failed", 3)
    directory.fail("evaluate", "blocked: its adapter is not made", "blocked")
    stop(directory, "failed", 3)
    assert directory.attempts() == 2


def test_a_failure_while_loading_is_no_step_further_than_the_one_before(directory: RunDir) -> None:
    for _ in range(3):
        directory.report_progress(stage="load", step=0, of=0)
        directory.fail("train", "the base cannot be loaded")
    assert directory.attempts() == 3


@pytest.mark.parametrize("cut", ['{"kind": "fail', "", "\x00\x00", "[1, 2]", "3", '{"kind": "failed", "step": "'])
def test_a_line_that_a_crash_cut_is_passed_over(directory: RunDir, cut: str) -> None:
    stop(directory, "failed", 3)
    with (directory.path / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(cut + "\n")
    stop(directory, "failed", 3)
    assert [entry["kind"] for entry in directory.history()] == ["failed", "failed"]
    assert directory.attempts() == 2


def test_what_is_remembered_after_a_cut_line_is_not_lost_with_it(directory: RunDir) -> None:
    stop(directory, "failed", 3)
    path = directory.path / "history.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "out_of_mem')  # a crash in the middle of the line
    stop(directory, "killed", 3)
    assert [entry["kind"] for entry in directory.history()] == ["failed", "killed"]


def test_bytes_that_are_no_text_are_passed_over(directory: RunDir) -> None:
    stop(directory, "failed", 3)
    with (directory.path / "history.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\xff\n")
    assert len(directory.history()) == 1


def test_a_reason_in_any_language_stays_one_line(directory: RunDir) -> None:
    directory.fail("train", "zu wenig Speicher: ähm\nund\u2028noch eine Zeile")
    assert [entry["reason"] for entry in directory.history()] == ["zu wenig Speicher: ähm\nund\u2028noch eine Zeile"]


def test_a_stop_is_that_of_the_task_that_was_at_the_run(directory: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    directory.report_progress(stage="train", step=4, of=9)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    directory.fail("train", "its node failed", "node_failure")
    directory.fail("train", "and then")
    assert [entry["task"] for entry in directory.history()] == ["17_3", "17_4"]
    directory.fail("train", "as Slurm says", "killed", task="17_9", step=7)
    last = directory.history()[-1]
    assert (last["task"], last["step"]) == ("17_9", 7)


def test_a_task_is_named_as_squeue_names_it(monkeypatch: pytest.MonkeyPatch, directory: RunDir) -> None:
    assert this_task() is None
    monkeypatch.setenv("SLURM_JOB_ID", "21")
    assert this_task() == "21"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert this_task() == "17_0"
