"""The choice of how much a step holds at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, run_of, trained
from hypothesis import given
from hypothesis import strategies as st

from peft_align.models.loading import load_base
from peft_align.training import engine, memory
from peft_align.training.memory import MOST, SHARE, free_bytes, kept_bytes, row_tokens

CPU = torch.device("cpu")
SMALL = (
    "model=tiny", "dataset=everyday", "peft=lora", "method=dpo", "train.engine=packed", "train.max_steps=2",
    "train.batch_size=4", "train.max_length=200", "train.learning_rate=1e-3", *FP32,
)  # fmt: skip


def test_what_autograd_keeps_is_counted_once_however_many_need_it() -> None:
    x, weight = torch.randn(1000, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)

    def work() -> None:
        y = x @ weight  # keeps both
        z = y.sigmoid()  # keeps its result
        (z * z).sum().backward()  # the same again

    assert kept_bytes(work, CPU) == pytest.approx((2 * x.nbytes + weight.nbytes) * memory.BEYOND, abs=1)


def test_what_is_freed_in_between_is_not_added_up() -> None:
    x = torch.randn(1000, requires_grad=True)

    def once() -> None:
        x.sigmoid().sum().backward()

    def often() -> None:
        for _ in range(5):
            once()

    assert kept_bytes(often, CPU) == kept_bytes(once, CPU)


@given(st.integers(0, 10**12), st.floats(1, 1e8) | st.just(float("inf")), st.sampled_from(["cpu", "cuda"]))
def test_a_row_is_a_power_of_two_that_fits(free: int, per_token: float, device: str) -> None:
    tokens = row_tokens(free, per_token, device)
    assert 1 <= tokens <= MOST[device]
    assert tokens & (tokens - 1) == 0
    assert tokens == 1 or tokens * per_token <= free * SHARE[device]
    assert tokens == MOST[device] or 2 * tokens * per_token > free * SHARE[device]


def test_a_control_group_that_leaves_less_than_the_machine_has_is_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "slurm" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    (group.parent / "memory.max").write_text("5000000\n")
    (group.parent / "memory.current").write_text("1000000\n")
    read = Path.read_text

    def told(path: Path, *args: Any, **kwargs: Any) -> str:
        return "0::/slurm/job\n" if str(path) == "/proc/self/cgroup" else read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", told)
    assert list(memory._free_of_groups(tmp_path)) == [4_000_000]


def test_there_is_memory_here() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many bytes are free."""

    def say(count: int) -> None:
        monkeypatch.setattr(engine, "free_bytes", lambda device: count)

    return say


def test_less_memory_makes_shorter_rows_then_recomputes_and_changes_no_loss(
    tmp_path: Path, room: Callable[[int], None]
) -> None:
    run = run_of(*SMALL)
    base = load_base(run.config)
    records = {}
    for megabytes in (10_000, 16, 5, 3):
        room(megabytes * 10**6)
        records[megabytes] = trained(run, tmp_path / str(megabytes), base)
    chosen = {size: record["memory"] for size, record in records.items()}
    tokens = [each["micro_batch_tokens"] for each in chosen.values()]
    again = [each["gradient_checkpointing"] for each in chosen.values()]
    print(chosen)
    assert tokens[0] == MOST["cpu"] > tokens[1]
    assert again == [False, False, True, True]
    assert chosen[3]["measured"]["bytes_per_token"] < chosen[10_000]["measured"]["bytes_per_token"] / 2
    for record in records.values():
        assert record["loss"] == pytest.approx(records[10_000]["loss"], rel=1e-5)


def test_a_run_of_very_few_and_short_samples_is_measured_too(tmp_path: Path) -> None:
    run = run_of("model=tiny", "dataset=everyday", "train.max_steps=1", "train.batch_size=1", "train.max_length=64")
    record = trained(run, tmp_path)
    assert record["memory"]["measured"]["bytes_per_token"] > 0


@pytest.mark.parametrize("asked", [{"micro_batch_tokens": 77}, {"gradient_checkpointing": "true"}])
def test_what_is_asked_for_is_not_chosen(asked: dict[str, object], tmp_path: Path, room: Callable[[int], None]) -> None:
    room(10**10)
    record = trained(run_of(*SMALL, *(f"train.{key}={value}" for key, value in asked.items())), tmp_path)
    (key,) = asked
    assert record["memory"][key] == (77 if key == "micro_batch_tokens" else True)


def test_the_measurement_changes_neither_the_dropout_nor_the_weights(tmp_path: Path) -> None:
    words = (*(word for word in SMALL if not word.startswith("peft.dropout")), "peft.dropout=0.5")
    chosen = trained(run_of(*words), tmp_path / "measured")
    told = [f"train.{key}={chosen['memory'][key]}" for key in ("micro_batch_tokens", "gradient_checkpointing")]
    assert trained(run_of(*words, *told), tmp_path / "told")["loss"] == chosen["loss"]
