"""A report as a run of Weights & Biases, for real but offline: what is in it, what is not, and when there is none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured import noise
from sweeping import finish_evaluation, finish_training, metric, plan, trained

from peft_align import report
from peft_align.cli import Asked, ask
from peft_align.config.schema import Wandb
from peft_align.reporting import findings, tracked
from peft_align.reporting.table import rows
from peft_align.reporting.tracked import summary, tables, track_report

WORDS = ["model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]"]
AXES = ["method=sft,dpo", "seed=0,1,2"]
OFFLINE = Wandb(kind="wandb", project="p", entity=None, mode="auto")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A sweep that is done; DPO scores 0.2 more. No key, no home: wandb stays offline."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    found = ask([*WORDS, *AXES, f"root={tmp_path / 'outputs'}"])
    root = found.root
    for run in trained(found.sweep):
        finish_training(root, run)
    for item in plan(found.sweep, root):
        for request in item.requests:
            is_dpo = item.run.kind == "train" and item.run.choices["method"] == "dpo"
            value = 0.5 + 0.2 * is_dpo + noise(item.run, spread=0.01)
            finish_evaluation(root, request, [metric("acc", value)])
    return found


def found_of(asked: Asked) -> tuple[list[dict[str, Any]], findings.Findings]:
    """The table of a sweep, and what it shows."""
    items = asked.plan()
    table = rows(asked.sweep, items, asked.root)
    questions = findings.load_questions(asked.space)
    return table, findings.find(asked.space, questions, asked.sweep, items, table)


def wait_for(condition: Callable[[], bool]) -> None:
    """wandb's own process writes some of it a moment after finish() comes back."""
    end = time.time() + 60
    while not condition() and time.time() < end:
        time.sleep(0.1)
    assert condition()


def test_the_report_is_one_run_in_the_group_of_the_sweep_with_tables_figures_and_files(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "Sup3rSecretValue"
    monkeypatch.setenv("MY_API_KEY", secret)
    report.write_report(asked, asked.plan())
    folder = asked.folder
    drawn = sorted((folder / "figures").glob("*.svg"))
    assert drawn
    table, found = found_of(asked)
    assert track_report(OFFLINE, asked.sweep, folder, table, found) is None
    (place,) = (folder / "tracking/wandb").glob("offline-run-*")
    assert place.name.endswith(f"-report-{folder.name}")

    def written() -> bytes:
        return b"".join(path.read_bytes() for path in place.glob("*.wandb"))

    words = [folder.name, "report", "train.max_steps=4", "runs/done", "differences/shown", "everyday_mc acc/dpo"]
    wait_for(lambda: all(word.encode() in written() for word in words))
    (logged,) = (place / "files/media/table").glob("results_*.table.json")
    content = json.loads(logged.read_text(encoding="utf-8"))
    values = [row[content["columns"].index("value")] for row in content["data"]]
    assert values == [row["value"] for row in table]
    shown = [path.read_text(encoding="utf-8") for path in (place / "files/media/html").rglob("*.html")]
    assert sorted(shown) == sorted(path.read_text(encoding="utf-8") for path in (folder / "report.html", *drawn))
    for name in ("results.csv", "findings.md", "report.html", f"figures/{drawn[0].name}"):
        assert (place / "files" / name).read_bytes() == (folder / name).read_bytes()
    everything = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert secret.encode() not in everything

    monkeypatch.setattr(tracked, "started", None)  # or it would be called, and fail
    assert track_report(OFFLINE, asked.sweep, folder, table, found) is None
    (folder / "findings.md").write_text("more is known", encoding="utf-8")
    with pytest.raises(TypeError):
        track_report(OFFLINE, asked.sweep, folder, table, found)


def test_tables_are_those_of_the_files_and_the_summary_counts(asked: Asked) -> None:
    table, found = found_of(asked)
    logged = tables(asked.sweep, table, found)
    assert {name: len(own) for name, (_, own) in logged.items()}["results"] == len(table) == 7
    assert set(logged) == {"results", "cells", "comparisons", "claims"}
    told = summary(found)
    assert (told["runs/done"], told["runs/missing"]) == (7, 0)
    assert told["differences/shown"] == 1
    assert told["everyday_mc acc/dpo"] - told["everyday_mc acc/sft"] == pytest.approx(0.2, abs=0.03)
    assert sum(n for name, n in told.items() if name.startswith("claims/")) == len(found.claims)


def test_a_report_is_tracked_by_the_tracker_that_is_asked_for(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def noted(tracker: Wandb, sweep: object, folder: Path, *rest: object) -> str:
        assert (folder / "findings.md").is_file()
        calls.append(folder)
        return "the report was not tracked: so it was"

    monkeypatch.setattr(tracked, "track_report", noted)
    assert "not tracked" not in report.write_report(asked, asked.plan())
    assert calls == []
    other = ask([*WORDS, *AXES, "tracker=wandb", f"root={asked.root}"])
    assert "warning: the report was not tracked: so it was\n" in report.write_report(other, other.plan())
    assert calls == [asked.folder]


def test_a_tracker_that_fails_leaves_the_report_as_it_is(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError("no room for it")

    report.write_report(asked, asked.plan())
    monkeypatch.setattr(tracked, "started", refuse)
    told = track_report(OFFLINE, asked.sweep, asked.folder, *found_of(asked))
    assert told == "the report was not tracked: OSError: no room for it"
    assert not (asked.folder / "tracking/report.json").exists()
