"""A disk that takes nothing is told in one line, by whoever meets it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_align.cli import BAD_INPUT, FAILED, run_verb
from peft_align.errors import DISK_FAULTS
from peft_align.launch import outcome
from peft_align.launch.outcome import reason
from peft_align.launch.process import DISK, code_of_disk

WORKER = """
import sys
from peft_align.launch.process import code_of_disk
print("this is not written yet")
sys.exit(code_of_disk(OSError(28, "No space left on device", "/x")))
"""


@pytest.mark.parametrize("number", DISK_FAULTS)
def test_a_verb_says_it_and_that_nothing_is_lost(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(argv: list[str]) -> int:
        raise OSError(number, os.strerror(number), "/scratch/outputs")

    monkeypatch.setattr(sys, "argv", ["sweep"])
    assert run_verb(verb, "") == (BAD_INPUT if number == errno.EROFS else FAILED)
    told = capsys.readouterr().err
    assert told.startswith(f"peft_align: {DISK_FAULTS[number]}: /scratch/outputs: {os.strerror(number)}\n")
    assert "the same command goes on" in told


def test_another_error_of_the_system_is_not_taken_for_the_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(argv: list[str]) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(sys, "argv", ["sweep"])
    with pytest.raises(OSError, match="Too many open files"):
        run_verb(verb, "")
    with pytest.raises(OSError, match="Too many open files"):
        code_of_disk(OSError(errno.EMFILE, "Too many open files"))


def test_a_worker_ends_with_the_disks_code_even_if_it_cannot_print() -> None:
    with Path("/dev/full").open("wb") as full:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run([sys.executable, "-c", WORKER], stdout=full, stderr=full, env=environment)
    assert done.returncode == DISK + errno.ENOSPC


def test_a_failure_of_a_run_says_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/weights")
    assert reason(full, tmp_path) == "the disk is full: /x/weights: No space left on device"
    by_torch = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert reason(by_torch, tmp_path) == f"RuntimeError: {by_torch}"
    monkeypatch.setattr(outcome, "FULL", 2**70)
    assert reason(by_torch, tmp_path) == f"RuntimeError: {by_torch} (the disk is full)"
