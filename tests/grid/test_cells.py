"""Overrides against a grid, block by block, and what plan says of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sweeping import cells, expand, faults

from peft_align.grid.runs import Sweep

Grid = Callable[..., Sweep]
GridFaults = Callable[..., list[str]]

TWO_BLOCKS = """
blocks:
  - name: first
    axes: {method: [sft, dpo], seed: [0, 1]}
    set: {peft: qlora}
  - name: second
    axes: {model: [tiny], peft: [lora]}
    zip: [{train.learning_rate: [5.0e-5, 1.0e-4], train.warmup_steps: [0, 50]}]
    when: [{where: {method: sft}, axes: {peft.r: [8, 16]}}]
    set: {method: sft}
baselines: false
"""
KEYS = ("method", "seed", "peft")


def test_an_axis_keeps_the_cells_with_the_values(grid: Grid) -> None:
    sweep = grid(TWO_BLOCKS, "method=dpo")
    assert cells(sweep, *KEYS) == [("dpo", 0, "qlora"), ("dpo", 1, "qlora")]
    assert sweep.notes == [
        "method=dpo: block first: 2 of 4 cells kept",
        "method=dpo: block second: 0 of 4 cells kept",
    ]


def test_several_values_of_an_axis_are_kept(grid: Grid) -> None:
    text = "blocks: [{axes: {seed: [0, 1, 2, 3]}}]"
    assert cells(grid(text, "seed=1,3"), "seed") == [(1,), (3,)]
    assert cells(grid(text, "seed=range(1,3)"), "seed") == [(1,), (2,)]


def test_a_value_no_block_has_replaces_the_keys_in_every_block_that_has_it(grid: Grid) -> None:
    sweep = grid("blocks: [{name: a, axes: {seed: [0, 1]}}, {name: b, set: {seed: 2, model: tiny}}]", "seed=7,8")
    assert cells(sweep, "model", "seed") == [("mistral_7b", 7), ("mistral_7b", 8), ("tiny", 7), ("tiny", 8)]
    assert sweep.notes == [
        "seed=7,8: block a: replaces its values",
        "seed=7,8: block b: replaces its values",
    ]


def test_a_single_value_that_replaces_is_no_axis_anymore(grid: Grid) -> None:
    sweep = grid("blocks: [{axes: {train.batch_size: [2, 4], seed: [0]}}]", "train.batch_size=8")
    assert cells(sweep, "train.batch_size") == [(8,)]
    assert "train.batch_size" not in sweep.axis_keys


def test_a_block_left_empty_is_dropped(grid: Grid) -> None:
    assert cells(grid(TWO_BLOCKS, "peft=lora"), "method", "peft") == [("sft", "lora")] * 4
    assert cells(grid(TWO_BLOCKS, "peft=qlora"), "method", "peft") == [("dpo", "qlora")] * 2 + [("sft", "qlora")] * 2


def test_a_set_key_keeps_or_is_replaced(grid: Grid) -> None:
    text = "blocks: [{axes: {seed: [0, 1]}, set: {peft: qlora}}]"
    assert cells(grid(text, "peft=qlora"), "peft") == [("qlora",)] * 2
    assert cells(grid(text, "peft=lora"), "peft") == [("lora",)] * 2


def test_an_absent_key_is_a_constant_or_a_new_axis(grid: Grid) -> None:
    text = "blocks: [{name: only, axes: {seed: [0, 1]}}]"
    constant, axis = grid(text, "train.max_steps=8"), grid(text, "train.max_steps=8,9")
    assert cells(constant, "seed", "train.max_steps") == [(0, 8), (1, 8)]
    assert constant.notes == ["train.max_steps=8: block only: set for all its runs"]
    assert cells(axis, "seed", "train.max_steps") == [(0, 8), (0, 9), (1, 8), (1, 9)]
    assert axis.notes == ["train.max_steps=8,9: block only: a new axis"]
    assert axis.axis_keys[-1] == "train.max_steps"


def test_a_key_of_one_block_only_is_a_constant_in_the_other(grid: Grid) -> None:
    sweep = grid(TWO_BLOCKS, "model=tiny", "method=sft", "seed=0")
    assert cells(sweep, "model", *KEYS) == [("tiny", "sft", 0, "lora")] * 4 + [("tiny", "sft", 0, "qlora")]
    assert [note for note in sweep.notes if note.startswith("model=tiny")] == [
        "model=tiny: block first: set for all its runs",
        "model=tiny: block second: 4 of 4 cells kept",
    ]


def test_a_zip_key_keeps_its_rows_whole(grid: Grid) -> None:
    sweep = grid(TWO_BLOCKS, "train.learning_rate=1e-4", "peft=lora")
    assert cells(sweep, "train.learning_rate", "train.warmup_steps", "peft.r") == [(1e-4, 50, 8), (1e-4, 50, 16)]


def test_a_zip_key_that_is_replaced_leaves_the_others_of_its_row(grid: Grid) -> None:
    sweep = grid(TWO_BLOCKS, "train.learning_rate=3e-4", "peft=lora", "peft.r=8")
    assert cells(sweep, "train.learning_rate", "train.warmup_steps") == [(3e-4, 0), (3e-4, 50)]


def test_a_when_axis_keeps_the_cells_with_the_values(grid: Grid) -> None:
    sweep = grid(TWO_BLOCKS, "peft.r=16", "peft=lora")
    assert cells(sweep, "peft.r", "train.warmup_steps") == [(16, 0), (16, 50)]


def test_a_when_axis_given_on_the_command_line_holds_for_every_run(grid: Grid) -> None:
    text = "blocks: [{axes: {method: [sft, dpo]}, when: [{where: {method: dpo}, axes: {peft.r: [8, 16]}}]}]"
    assert cells(grid(text, "peft.r=8"), "method", "peft.r") == [("dpo", 8), ("sft", 8)]
    assert cells(grid(text, "peft.r=4"), "method", "peft.r") == [("dpo", 4), ("sft", 4)]
    assert cells(grid(text, "method=dpo", "peft.r=16"), "method", "peft.r") == [("dpo", 16)]


def test_the_command_line_goes_before_when_and_set(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {seed: [0]}
        set: {peft.r: 4, train.batch_size: 4}
        when: [{where: {method: sft}, axes: {peft.r: [8]}}]
    """
    assert cells(grid(text), "peft.r", "train.batch_size") == [(8, 4)]
    assert cells(grid(text, "peft.r=2", "train.batch_size=2"), "peft.r", "train.batch_size") == [(2, 2)]


def test_a_when_follows_a_replaced_value(grid: Grid) -> None:
    text = "blocks: [{axes: {method: [sft]}, when: [{where: {method: dpo}, axes: {peft.r: [8, 16]}}]}]"
    assert cells(grid(text, "method=dpo"), "method", "peft.r") == [("dpo", 8), ("dpo", 16)]


def test_an_exclude_is_checked_against_the_grid_as_it_is_written(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {dataset: [hh_rlhf, beavertails], preference: [harmless, mixture]}
        exclude: [{where: {dataset: hh_rlhf, preference: mixture}, reason: none}]
    """
    sweep = grid(text, "dataset=beavertails")
    assert cells(sweep, "dataset", "preference") == [("beavertails", "harmless"), ("beavertails", "mixture")]
    assert sweep.excluded == []
    assert cells(grid(text, "preference=helpful"), "preference") == [("helpful",)] * 2


def test_a_setting_of_some_runs_goes_to_those(grid: Grid) -> None:
    text = "blocks: [{axes: {method: [sft, dpo], seed: [0, 1]}}]"
    found = cells(grid(text, "method.beta=0.2"), "method", "seed", "method.beta")
    assert found == [("dpo", 0, 0.2), ("dpo", 1, 0.2), ("sft", 0, None), ("sft", 1, None)]
    sweep = grid(text, "method.beta=0.2,0.3")
    assert len(cells(sweep, "method")) == 4 + 2
    assert {run.axes.get("method.beta") for run in sweep.runs if run.choices["method"] == "sft"} == {None}


def test_a_setting_that_no_run_has_is_a_fault(grid_faults: GridFaults) -> None:
    text = "blocks: [{axes: {method: [sft, dpo]}}]"
    found = grid_faults(text, "method=sft", "method.beta=0.2")
    assert found == [
        "method.beta=0.2: no run of this sweep has it: it belongs to method dpo (leave it out, or add method=dpo)"
    ]


def test_a_block_without_a_name_obeys_overrides_too(grid: Grid) -> None:
    sweep = grid("blocks: [{name: '', axes: {seed: [0, 1]}}]", "seed=5", "model=tiny")
    assert cells(sweep, "seed", "model") == [(5, "tiny")]


def test_what_leaves_nothing_is_a_fault(grid_faults: GridFaults) -> None:
    text = "blocks: [{axes: {method: [sft], seed: [0]}}, {axes: {method: [dpo], seed: [1]}}]"
    assert grid_faults(text, "method=sft", "seed=1") == [
        "method=sft seed=1: no run is left (no cell has all of these; "
        "block block0 has method: sft; seed: 0; block block1 has method: dpo; seed: 1)"
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.micro_batch_size=1,2", "cannot be an axis"),
        ("train.checkpoint_steps=1,2", "write train.checkpoint_steps=[1,2]"),
        ("evaluation.limit=1,2", "cannot be an axis"),
        ("root=a,b", "holds for a sweep as a whole"),
        ("tracker=none,wandb", "holds for a sweep as a whole"),
    ],
)
def test_an_operational_key_cannot_be_an_axis(word: str, message: str) -> None:
    assert any(message in fault for fault in faults("+grid=main", word))


def test_two_grids_are_narrowed_together() -> None:
    sweep = expand("+grid=main,quickstart", "seed=0", "method=sft", "peft=lora")
    assert sweep.name == "main+quickstart"
    assert len(cells(sweep, "dataset")) == 2 * 2 * 4 + 1


def test_without_a_grid_lists_make_the_axes() -> None:
    sweep = expand("method=sft,dpo", "peft.r=8,16", "model=tiny")
    assert sweep.name == "adhoc"
    assert cells(sweep, "method", "peft.r") == [("dpo", 8), ("dpo", 16), ("sft", 8), ("sft", 16)]
    assert [run.kind for run in sweep.runs].count("baseline") == 1
