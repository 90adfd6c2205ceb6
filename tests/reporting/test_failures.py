"""Runs that failed: why, when, at which step, and the end of their logs as people may see it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from sweeping import expand, finish_training, plan, trained

from peft_align.cli import ask
from peft_align.report import write_report
from peft_align.reporting.failures import FAILURES, LINE, LINES, failure_rows, log_end
from peft_align.store import records
from peft_align.store.runs import RunDir

WORDS = ["model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(records, "sync", lambda path: None)  # nothing is lost here that matters


def test_a_failed_run_is_told_with_category_step_and_the_end_of_its_log(tmp_path: Path) -> None:
    asked = ask([*WORDS, "seed=0,1,2", f"root={tmp_path}"])
    done, failed, _ = trained(asked.sweep)
    finish_training(tmp_path, done)
    directory = RunDir(tmp_path, failed.id)
    directory.path.mkdir(parents=True)
    directory.log.write_text("one\ntwo\n=HYPERLINK(1)\n")
    for _ in range(2):
        directory.report_progress(stage="train", step=3, of=4)
        directory.fail("train", "OutOfMemoryError: too much", "out_of_memory")
    (row,) = failure_rows(asked.plan(), tmp_path)
    assert list(row) == FAILURES
    assert (row["run_id"], row["seed"], row["kind"]) == (failed.id, 1, "train")
    assert (row["stage"], row["category"], row["reason"]) == ("train", "out_of_memory", "OutOfMemoryError: too much")
    assert (row["step"], row["attempts"]) == (3, 2)
    assert row["when"].startswith("20")
    assert row["when"].endswith("Z")
    assert row["log_end"] == "one\ntwo\n=HYPERLINK(1)"
    write_report(asked, asked.plan())
    with (asked.folder / "failures.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert written["log_end"] == "one\ntwo\n=HYPERLINK(1)"
    assert written["category"] == "out_of_memory"


def test_a_run_that_is_done_after_all_did_not_fail(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    items = plan(sweep, tmp_path)
    assert failure_rows(items, tmp_path) == []


def test_a_note_of_a_failure_that_is_damaged_is_told_as_far_as_it_can_be(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    directory = RunDir(tmp_path, trained(sweep)[0].id)
    directory.path.mkdir(parents=True)
    (directory.path / "failed.json").write_text('{"time": 1e300, "step": "x", "host": 3, "kind": "failed"}')
    (row,) = failure_rows(plan(sweep, tmp_path), tmp_path)
    assert (row["reason"], row["step"], row["when"], row["host"]) == ("failed.json does not say why", None, None, None)
    assert row["log_end"] is None


def test_the_end_of_a_log_is_short_and_harmless(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    head = b"x" * 100_000 + b"\n" + b"".join(b"line %d\n" % i for i in range(100))
    log.write_bytes(head + b" 10%|\r 20%|\r100%|\n\n\x1b[31mred\xff token=abcdefghij1\n" + b"y" * 1000)
    found = log_end(log)
    assert found is not None
    lines = found.split("\n")
    assert len(lines) == LINES
    assert lines[:2] == ["line 83", "line 84"]
    assert lines[-3:-1] == ["100%|", "\\x1b[31mred\ufffd token=***"]
    assert len(lines[-1]) < LINE + 10


def test_a_log_that_is_not_there_or_empty_has_no_end(tmp_path: Path) -> None:
    assert log_end(tmp_path / "none") is None
    (tmp_path / "empty").write_bytes(b"\n \r\n")
    assert log_end(tmp_path / "empty") is None
