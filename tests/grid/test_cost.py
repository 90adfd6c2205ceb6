"""What a run costs, against figures that others published and hand-computed ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from sweeping import expand, finish_training, plan, shipped, trained

from peft_align.grid.cost import (
    adapter_parameters,
    human_bytes,
    human_time,
    measured,
    module_shapes,
    seconds_left,
)
from peft_align.grid.planner import Item


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        # as `print_trainable_parameters` of PEFT prints them for these models
        (["model=llama_7b", "peft.r=8"], 4_194_304),
        (["model=llama_7b"], 33_554_432),
        (["model=mistral_7b", "peft.r=8"], 3_407_872),
        (["model=mistral_7b", "method=dpo"], 41_943_040),
        (["model=llama_7b", "method=dpo"], 39_976_960),
        # 2 layers x 8 x (32 + 32 for q, 32 + 16 for v)
        (["model=tiny", "peft.r=8"], 2 * 8 * (64 + 48)),
    ],
)
def test_trainable_parameters(words: list[str], parameters: int) -> None:
    assert adapter_parameters(trained(expand(*words))[0]) == parameters


def test_a_module_named_twice_gets_one_adapter_and_an_unknown_one_makes_it_unknown() -> None:
    one, twice, unknown = (
        adapter_parameters(trained(expand("model=tiny", f"peft.target_modules={modules}"))[0])
        for modules in ("[q_proj]", "[q_proj,q_proj]", "[q_proj,lm_head]")
    )
    assert one == twice
    assert unknown is None


def test_key_value_heads_count_in_the_shapes() -> None:
    shape = trained(expand("model=mistral_7b"))[0].config.model.shape
    assert module_shapes(shape)["k_proj"] == (4096, 1024)
    assert module_shapes(shape)["down_proj"] == (14336, 4096)
    assert "tiny" in shipped().options("model")


def left(items: Sequence[Item], root: Path) -> float | None:
    """Seconds of training still to be done."""
    return seconds_left(items, measured(root, items))


def test_the_time_left_is_the_median_of_like_runs_or_unknown(tmp_path: Path) -> None:
    sweep = expand("model=tiny", "train.max_steps=10", "seed=range(5)", "method=sft,dpo")
    runs = trained(sweep)
    assert left(plan(sweep, tmp_path), tmp_path) is None
    sft = [run for run in runs if run.config.method.kind == "sft"]
    for run, rate in zip(sft, (1.0, 2.0, 9.0), strict=False):
        finish_training(tmp_path, run, seconds_per_step=rate)
    items = plan(sweep, tmp_path)
    assert left(items, tmp_path) is None  # no DPO run was measured
    alike = [item for item in items if item.run.config.method.kind == "sft"]
    assert left(alike, tmp_path) == 2 * 10 * 2.0
    assert left([item for item in items if item.run.kind == "baseline"], tmp_path) == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (45745730560, "45.7 GB"), (10**16, "10.0 PB")],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min 00 s"), (3720, "1 h 02 min"), (90000, "1 d 1 h"), (59.6, "1 min 00 s")],
)
def test_time_for_people(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
