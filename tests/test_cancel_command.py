"""cancel where there is nothing to cancel; with jobs, see end_to_end/test_slurm.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_align.cancel import verb as cancel
from peft_align.errors import InputError
from peft_align.launch import queue
from peft_align.store.submissions import new_submission, submissions
from peft_align.sweep import verb as sweep

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = ["model=tiny", "dataset=everyday", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]"]


@pytest.fixture(autouse=True)
def nothing_of_slurm(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder on a machine without Slurm."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("bin")))
    monkeypatch.chdir(tmp_path)


def refused(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        cancel(list(words))
    (fault,) = caught.value.faults
    return str(fault)


def test_where_no_sweep_was_started_one_fault_says_so(here: Verb, tmp_path: Path) -> None:
    done = here("cancel")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "1 fault in the input" in done.stderr
    assert "there is no sweep under outputs" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_was_submitted_one_fault_says_so(tmp_path: Path) -> None:
    told = refused(*WORDS)
    assert "no jobs of adhoc were submitted under outputs" in told
    assert list(tmp_path.iterdir()) == []


def test_the_help_shows_examples(here: Verb) -> None:
    text = here("cancel", "--help", check=True).stdout
    assert sum(line.strip().startswith("python -m peft_align.cancel") for line in text.splitlines()) == 3


def test_scripts_that_were_only_written_are_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "answers", lambda: False)
    assert sweep([*WORDS, "launcher=slurm", "launcher.dry_run=true"]) == 0
    assert len(submissions(tmp_path / "outputs")) == 1
    assert "no jobs of adhoc were submitted" in refused(*WORDS)


def test_jobs_of_another_sweep_are_not_those_that_were_asked_for(tmp_path: Path) -> None:
    other = new_submission(tmp_path / "outputs/sweeps/main-0123", {"name": "main", "runs": ["a"], "report": None})
    other.content["arrays"] = [{"name": "00-train", "job": "17", "tasks": [["a"]], "stages": ["train"]}]
    other.save()
    assert "no jobs of adhoc were submitted" in refused(*WORDS)


def test_a_misspelled_word_is_told_before_anything_else() -> None:
    assert "did you mean 'tiny'?" in refused("model=tinny")
