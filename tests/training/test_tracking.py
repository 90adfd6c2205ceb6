"""wandb: offline without a key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peft_align.config.schema import NoTracker, Wandb
from peft_align.training.tracking import online_or_offline, tracking


def test_without_a_key_the_mode_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert online_or_offline() == "offline"


def test_an_offline_run_is_written_with_its_group_name_and_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = Wandb(kind="wandb", project="p", entity=None, mode="auto")
    with tracking(tracker, group="sweep-1", name="run-1", axes={"seed": 3}, folder=tmp_path / "tracking") as log:
        log({"loss": 0.5}, 1)

    def written() -> bytes:
        return b"".join(path.read_bytes() for path in (tmp_path / "tracking").rglob("*.wandb"))

    end = time.time() + 30  # wandb's own process closes the file, a moment after finish() comes back
    while b"loss" not in written() and time.time() < end:
        time.sleep(0.1)
    for word in (b"sweep-1", b"run-1", b"seed", b"loss"):
        assert word in written()


def test_no_tracker_takes_metrics_and_writes_nothing(tmp_path: Path) -> None:
    with tracking(NoTracker(kind="none"), group="g", name="n", axes={}, folder=tmp_path / "tracking") as log:
        log({"loss": 0.5}, 1)
    assert not (tmp_path / "tracking").exists()
