"""The grid language: what each word means, and what is refused before anything is expanded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sweeping import cells

from peft_align.grid.runs import Sweep

Grid = Callable[..., Sweep]
GridFaults = Callable[..., list[str]]


def test_axes_are_multiplied(grid: Grid) -> None:
    sweep = grid("blocks: [{axes: {method: [sft, dpo], peft: [lora, qlora], seed: [3, 4]}}]")
    expected = [(m, p, s) for m in ("dpo", "sft") for p in ("lora", "qlora") for s in (3, 4)]
    assert cells(sweep, "method", "peft", "seed") == expected
    assert sweep.axis_keys == ("dataset", "preference", "method", "model", "peft", "seed")


def test_equal_values_of_an_axis_count_once(grid: Grid) -> None:
    assert cells(grid("blocks: [{axes: {seed: [1, 1, 1.0]}}]"), "seed") == [(1,)]


def test_zipped_keys_vary_together(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {seed: [0, 1]}
        zip: [{train.learning_rate: [5.0e-5, 1.0e-4], train.warmup_steps: [0, 50]}]
    """
    found = cells(grid(text), "seed", "train.learning_rate", "train.warmup_steps")
    assert found == [(s, *pair) for s in (0, 1) for pair in ((5e-5, 0), (1e-4, 50))]


def test_two_zips_are_multiplied(grid: Grid) -> None:
    text = "blocks: [{zip: [{seed: [0, 1], train.batch_size: [4, 8]}, {peft: [lora, qlora]}]}]"
    assert len(cells(grid(text), "seed", "peft")) == 4


def test_when_axes_hold_for_the_matching_cells_only(grid: Grid) -> None:
    text = "blocks: [{axes: {method: [sft, dpo]}, when: [{where: {method: dpo}, axes: {peft.r: [8, 32]}}]}]"
    assert cells(grid(text), "method", "peft.r") == [("dpo", 8), ("dpo", 32), ("sft", 64)]


def test_when_may_name_several_values_and_a_default_option(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {seed: [0, 1, 2]}
        when:
          - {where: {seed: [0, 2], method: sft}, axes: {train.batch_size: [4, 8]}}
          - {where: {method: dpo}, axes: {peft.r: [1, 2]}}
    """
    assert cells(grid(text), "seed", "train.batch_size") == [(0, 4), (0, 8), (1, 16), (2, 4), (2, 8)]


def test_two_whens_that_hold_for_one_cell_are_multiplied(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {method: [dpo]}
        when:
          - {where: {method: dpo}, axes: {peft.r: [8, 16]}}
          - {where: {method: dpo}, axes: {seed: [0, 1]}}
    """
    assert cells(grid(text), "peft.r", "seed") == [(8, 0), (8, 1), (16, 0), (16, 1)]


def test_a_when_on_the_axis_of_an_earlier_when_loses_no_cell(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        when:
          - {where: {method: dpo}, axes: {peft.r: [8, 16]}}
          - {where: {peft.r: 8}, axes: {seed: [1, 2]}}
    """
    expected = [("dpo", 8, 1), ("dpo", 8, 2), ("dpo", 16, 0), ("sft", 64, 0)]
    assert cells(grid(text), "method", "peft.r", "seed") == expected


def test_excluded_cells_are_left_out_and_kept_with_their_reason(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {dataset: [hh_rlhf, beavertails], preference: [harmless, mixture], seed: [0, 1]}
        exclude: [{where: {dataset: hh_rlhf, preference: mixture}, reason: "it has none"}]
    """
    sweep = grid(text)
    assert ("hh_rlhf", "mixture") not in cells(sweep, "dataset", "preference")
    assert len(cells(sweep, "seed")) == 6
    assert [(e.values["dataset"], e.values["seed"], e.reason) for e in sweep.excluded] == [
        ("hh_rlhf", 0, "it has none"),
        ("hh_rlhf", 1, "it has none"),
    ]


def test_set_holds_for_every_cell_and_when_goes_before_set(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {peft: lora, peft.r: 4, evaluation.limit: 3}
        when: [{where: {method: dpo}, axes: {peft.r: [8]}}]
    """
    found = cells(grid(text), "method", "peft", "peft.r", "evaluation.limit")
    assert found == [("dpo", "lora", 8, 3), ("sft", "lora", 4, 3)]


def test_included_grids_are_united_and_equal_runs_are_one(grid: Grid) -> None:
    other = "blocks: [{axes: {seed: [1, 2]}}]\nbaselines: false"
    sweep = grid("include: [other]\nblocks: [{axes: {seed: [0, 1]}}]", other=other)
    assert cells(sweep, "seed") == [(0,), (1,), (2,)]
    assert [run.kind for run in sweep.runs].count("baseline") == 1


def test_the_same_grid_may_be_included_by_two_others(grid: Grid) -> None:
    left = right = "include: [base]"
    sweep = grid("include: [left, right]", left=left, right=right, base="blocks: [{axes: {seed: [5]}}]")
    assert cells(sweep, "seed") == [(5,)]


def test_baselines_may_be_left_out(grid: Grid) -> None:
    text = "blocks: [{{axes: {{peft: [lora, qlora], seed: [0, 1], model: [tiny, mistral_7b]}}}}]\nbaselines: {}"
    with_them, without = (grid(text.format(word)) for word in ("true", "false"))
    assert [run.kind for run in with_them.runs].count("baseline") == 4
    assert {run.kind for run in without.runs} == {"train"}


@pytest.mark.parametrize("written", ["5.0e-5", "5e-5", "0.00005"])
def test_numbers_are_read_as_numbers(grid: Grid, written: str) -> None:
    sweep = grid(f"blocks: [{{axes: {{train.learning_rate: [{written}]}}}}]")
    assert cells(sweep, "train.learning_rate") == [(5.0e-5,)]


def test_a_grid_is_named_by_its_file_or_by_itself(grid: Grid) -> None:
    assert grid("blocks: [{axes: {seed: [0]}}]").name == "mine"
    assert grid("name: other\nblocks: [{axes: {seed: [0]}}]").name == "other"


REFUSED = {
    "unknown key of the grid": ("blocs: []\nblocks: [{}]", "grid/mine.yaml: blocs: no such key"),
    "unknown key of a block": ("blocks: [{axis: {}}]", "blocks[0]: axis: no such key (did you mean 'axes'?)"),
    "unknown key of when": ("blocks: [{when: [{wher: {}}]}]", "blocks[0].when[0]: wher: no such key"),
    "unknown key of exclude": ("blocks: [{exclude: [{because: x}]}]", "blocks[0].exclude[0]: because: no such key"),
    "blocks null": ("blocks: null", "a list of blocks is expected"),
    "block null": ("blocks: [null]", "blocks[0]: a mapping is expected"),
    "axes null": ("blocks: [{axes: null}]", "blocks[0].axes: a mapping is expected"),
    "set null": ("blocks: [{set: null}]", "blocks[0].set: a mapping is expected"),
    "zip null": ("blocks: [{zip: null}]", "blocks[0].zip: a list is expected"),
    "zip entry null": ("blocks: [{zip: [null]}]", "blocks[0].zip[0]: a mapping is expected"),
    "when null": ("blocks: [{when: null}]", "blocks[0].when: a list is expected"),
    "when entry null": ("blocks: [{when: [null]}]", "blocks[0].when[0]: a mapping is expected"),
    "when without axes": ("blocks: [{when: [{where: {method: sft}}]}]", "when[0]: has neither axes nor set"),
    "when without where": ("blocks: [{when: [{axes: {seed: [0]}}]}]", "when[0].where: is missing"),
    "exclude null": ("blocks: [{exclude: null}]", "blocks[0].exclude: a list is expected"),
    "exclude without where": ("blocks: [{exclude: [{reason: x}]}]", "exclude[0].where: is missing"),
    "exclude without reason": ("blocks: [{exclude: [{where: {method: sft}}]}]", "exclude[0].reason: is missing"),
    "reason empty": ("blocks: [{exclude: [{where: {method: sft}, reason: ' '}]}]", "exclude[0].reason: is missing"),
    "include null": ("include: null\nblocks: [{}]", "include: a list of grid names is expected"),
    "include unknown": ("include: [quikstart]", "did you mean 'quickstart'?"),
    "baselines null": ("blocks: [{}]\nbaselines: null", "baselines: true or false is expected"),
    "nothing": ("", "has neither blocks nor include"),
    "a list": ("[1]", "a mapping is expected at the top"),
    "broken YAML": ("blocks: [", "is not YAML"),
    "a key twice": ("blocks: [{axes: {seed: [0], seed: [1]}}]", "duplicate"),
    "kind": ("blocks: [{kind: trian}]", "did you mean 'train'?"),
    "axis unknown": ("blocks: [{axes: {modle: [tiny]}}]", "modle: no such key (did you mean 'model'?)"),
    "axis of a deeper key": ("blocks: [{axes: {method.betta: [0.1]}}]", "did you mean 'method.beta'?"),
    "axis of a whole node": ("blocks: [{axes: {model.shape: [1]}}]", "is a group of settings"),
    "option unknown": ("blocks: [{axes: {model: [mistal_7b]}}]", "did you mean 'mistral_7b'?"),
    "option null": ("blocks: [{axes: {model: [null]}}]", "the value is empty"),
    "value of another type": ("blocks: [{axes: {peft.r: [eight]}}]", "'eight' is not a whole number"),
    "value out of range": ("blocks: [{axes: {peft.r: [0]}}]", "0 is out of range"),
    "values no list": ("blocks: [{axes: {seed: 0}}]", "a list of values is expected"),
    "values empty": ("blocks: [{axes: {seed: []}}]", "a list of values is expected"),
    "operational axis": ("blocks: [{axes: {train.micro_batch_size: [1, 2]}}]", "cannot be an axis"),
    "operational group": ("blocks: [{axes: {evaluation: [default]}}]", "cannot be an axis"),
    "operational zip": ("blocks: [{zip: [{evaluation.limit: [1, 2]}]}]", "cannot be an axis"),
    "operational when": (
        "blocks: [{when: [{where: {method: sft}, axes: {evaluation.limit: [1]}}]}]",
        "cannot be an axis",
    ),
    "sweep-level set": ("blocks: [{set: {root: here}}]", "holds for a sweep as a whole"),
    "sweep-level group": ("blocks: [{set: {launcher: local}}]", "holds for a sweep as a whole"),
    "zip of other lengths": ("blocks: [{zip: [{seed: [0], peft.r: [1, 2]}]}]", "equally many values"),
    "axis and set": ("blocks: [{axes: {seed: [0]}, set: {seed: 1}}]", "more than once"),
    "axis and zip": ("blocks: [{axes: {seed: [0]}, zip: [{seed: [1]}]}]", "more than once"),
    "axis and when": (
        "blocks: [{axes: {seed: [0]}, when: [{where: {method: sft}, axes: {seed: [1]}}]}]",
        "is an axis of the block already",
    ),
    "where on nothing": ("blocks: [{exclude: [{where: {peft.r: 8}, reason: x}]}]", "neither an axis nor a setting"),
    "where on an unknown option": (
        "blocks: [{exclude: [{where: {method: dop}, reason: x}]}]",
        "did you mean 'dpo'?",
    ),
    "exclude that matches nothing": (
        "blocks: [{axes: {method: [sft]}, exclude: [{where: {method: dpo}, reason: x}]}]",
        "matches no cell",
    ),
    "exclude of everything": (
        "blocks: [{axes: {method: [sft]}, exclude: [{where: {method: sft}, reason: x}]}]",
        "no run is left",
    ),
    "too large": (
        f"blocks: [{{axes: {{seed: {list(range(1001))}, peft.r: {list(range(1, 1001))}}}}}]",
        "1001000 cells are too many",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(grid_faults: GridFaults, case: str) -> None:
    text, message = REFUSED[case]
    assert any(message in fault for fault in grid_faults(text))


@pytest.mark.parametrize("others", [{}, {"b": "include: [c]", "c": "include: [mine]"}])
def test_a_cycle_of_includes_is_told(grid_faults: GridFaults, others: dict[str, str]) -> None:
    found = grid_faults("include: [b]" if others else "include: [mine]", **others)
    trail = "mine -> b -> c -> mine" if others else "mine -> mine"
    assert found[0].endswith(f"includes itself: {trail} (leave one of them out)")


def test_all_faults_of_all_files_are_told_at_once(grid_faults: GridFaults) -> None:
    text = """
    nane: x
    include: [other, nowhere]
    blocks:
      - axes: {modle: [tiny], seed: [-1], peft: [lroa]}
        exclude: [{where: {seed: 0}}]
        sett: {}
      - null
    """
    found = grid_faults(text, "model=mistal_7b", "--jsn", other="blocks: [{set: {peft.rr: 8}}]")
    expected = ("nane", "modle", "out of range", "lroa", "reason", "sett", "blocks[1]", "peft.rr", "nowhere")
    for message in (*expected, "mistal_7b", "--jsn"):
        assert any(message in fault for fault in found), message
    assert len(found) == len(expected) + 2
