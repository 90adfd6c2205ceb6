"""Energy is told where the GPU counts it, over all attempts; where nobody counts, it is not known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import interrupted, run_of, trained

from peft_align.models.loading import load_base
from peft_align.training import energy

WORDS = ("model=tiny", "dataset=everyday", "method=sft", "train.max_steps=4", "train.batch_size=2")


class NVMLError(Exception):
    """As pynvml's."""


def nvml(millijoules: int | None, asked: list[str]) -> SimpleNamespace:
    """A stand-in for pynvml: a GPU with such a counter, or one that has none."""

    def counter(handle: str) -> int:
        if millijoules is None:
            raise NVMLError
        return millijoules

    def handle(uuid: str) -> str:
        asked.append(uuid)
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=counter,
    )


def has_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="1234-abcd"))


def test_the_counter_is_that_of_the_gpu_that_this_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    has_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(5_000_000, asked))
    assert energy.joules() == 5000
    assert asked == ["GPU-1234-abcd"]


@pytest.mark.parametrize("module", [None, nvml(None, [])], ids=["no package", "no counter"])
def test_without_the_package_or_a_counter_nothing_is_known(
    module: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert energy.joules() is None


def test_without_a_gpu_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1, []))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert energy.joules() is None


def test_a_part_that_is_not_known_makes_the_whole_unknown() -> None:
    assert energy.used(5.0, 100.0, 130.0) == 35
    assert energy.used(None, 100.0, 130.0) is None
    assert energy.used(0.0, None, 130.0) is None
    assert energy.used(0.0, 100.0, None) is None
    assert energy.used(0.0, 100.0, 30.0) is None  # the driver was loaded anew
    assert energy.of_all([1.0, 2.0]) == 3
    assert energy.of_all([1.0, None]) is None


def test_a_record_has_the_energy_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 J between two looks at the counter; an interrupted run looks when it begins and when it saves its state."""
    counter = iter(range(1000, 9999, 10))
    monkeypatch.setattr(energy, "joules", lambda: float(next(counter)))
    run = run_of(*WORDS, "train.state_every=9")
    base = load_base(run.config)
    interrupted(run, tmp_path, base, 2)
    next(counter)  # what was used between the attempts is not the run's
    assert trained(run, tmp_path, base)["energy_joules"] == 20


def test_on_a_cpu_a_record_says_that_it_is_not_known(tmp_path: Path) -> None:
    assert trained(run_of(*WORDS), tmp_path)["energy_joules"] is None
