"""Blocks of merges, selections, and which steps are kept and evaluated: from the grid to the plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, ids, metric, one_fault, plan, setting, shipped, trained

from peft_align.grid.language import load_grid
from peft_align.grid.planner import Item, adapter_digest, asked_of
from peft_align.grid.runs import Run, Sweep
from peft_align.grid.serialize import run_from_plain, run_to_plain
from peft_align.store.records import Digests, inventory, write_json
from peft_align.store.runs import FORMAT, RunDir

Grid = Callable[..., Sweep]
GridFaults = Callable[..., list[str]]

PAIR = "[{preference: harmless}, {preference: helpful}]"
METHODS = "[{method: sft}, {method: dpo}]"
# The inputs of PAIR, trained by a block of their own.
TRAINED = (
    "{name: trained, axes: {preference: [harmless, helpful]},"
    " set: {model: tiny, dataset: everyday, peft: lora, train.max_steps: 4}}"
)
EVERY_100 = tuple(range(100, 701, 100))


def block(*inputs: str, merge: str = "linear", name: str = "pair", sets: str = "", more: str = "") -> str:
    """A block of merges of small runs, as one line of YAML."""
    entries = ", ".join(inputs or (PAIR,))
    given = f"model: tiny, dataset: everyday, peft: lora, train.max_steps: 4{sets and ', '}{sets}"
    return (
        f"{{name: {name}, kind: merge, axes: {{merge: [{merge}]}}, inputs: [{entries}],"
        f" set: {{{given}}}{more and ', '}{more}}}"
    )


def grid_of(*blocks: str) -> str:
    return f"blocks: [{', '.join(blocks)}]\nbaselines: false"


def merges(sweep: Sweep) -> list[Run]:
    return [run for run in sweep.runs if run.kind == "merge"]


def inputs_of(sweep: Sweep, run: Run, *keys: str) -> list[tuple[Any, ...]]:
    """These keys' values of a merge's inputs, in order."""
    by_id = sweep.by_id()
    return [tuple(setting(by_id[parent], key) for key in keys) for parent in run.parents]


def of_merges(sweep: Sweep, *keys: str) -> list[tuple[Any, ...]]:
    """These keys' values of the sweep's merges, in order."""
    return [tuple(setting(run, key) for key in keys) for run in merges(sweep)]


def counts(sweep: Sweep) -> tuple[int, int, int]:
    """How many merges, parents that the grid lacks, and baselines."""
    kinds = Counter("parent" if run.is_parent_only else run.kind for run in sweep.runs)
    return kinds["merge"], kinds["parent"], kinds["baseline"]


def id_of(sweep: Sweep) -> str:
    (run,) = merges(sweep)
    return run.id


# --- the shipped grids


def test_the_merges_of_the_study_bring_their_inputs_and_baselines_along() -> None:
    assert counts(expand("+grid=merge")) == (50, 40, 2)
    full = expand("+grid=full")
    assert counts(full) == (50, 0, 8)
    assert {parent for run in merges(full) for parent in run.parents} <= ids(expand("+grid=main"))


def test_inputs_come_before_their_merge_in_the_order_in_which_they_are_written() -> None:
    sweep = expand("+grid=merge", "model=mistral_7b", "seed=3")
    order = [run.id for run in sweep.runs]
    assert all(order.index(parent) < order.index(run.id) for run in merges(sweep) for parent in run.parents)
    four = [("sft", "harmless", 3), ("sft", "helpful", 3), ("dpo", "harmless", 3), ("dpo", "helpful", 3)]
    found = [inputs_of(sweep, run, "method", "preference", "seed") for run in merges(sweep)]
    assert found == [four[:2], four[2:], four[:2], four[2:], four]


def test_a_merge_is_scored_at_its_end_on_the_pairs_of_each_of_its_inputs() -> None:
    for run in merges(expand("+grid=merge", "model=mistral_7b", "seed=0")):
        scored = [(s.dataset_name, s.preference_name, s.steps) for s in run.scorings]
        assert scored == [("beavertails", "harmless", (700,)), ("beavertails", "helpful", (700,))]
        assert run.base == "nf4 dequantized"


def test_the_small_study_has_the_blocks_of_the_whole_one() -> None:
    small, full = ({b.name: b for b in load_grid(shipped(), name).blocks} for name in ("study_small", "full"))
    assert set(small) == set(full)
    for name, theirs in full.items():
        assert (small[name].kind, small[name].inputs) == (theirs.kind, theirs.inputs)
        operational = {"train.checkpoint_steps", "evaluation.steps"}  # for what is kept of main's
        operational |= {"evaluation"}  # it has small benchmarks of its own
        assert theirs.own_keys() - operational <= small[name].own_keys()
        assert small[name].own_keys() & {"evaluation", "evaluation.benchmarks"}


# --- steps that are kept, and steps that are evaluated


def test_main_keeps_what_quantity_evaluates_and_evaluates_only_the_end() -> None:
    main = trained(expand("+grid=main"))
    kept = [run for run in main if run.steps == EVERY_100]
    assert {run.steps for run in main} == {EVERY_100, (700,)}
    assert len(kept) == 40
    assert {(run.choices["dataset"], run.choices["peft"]) for run in kept} == {("beavertails", "qlora")}
    assert {run.choices["model"] for run in kept} == {"mistral_7b", "mistral_7b_instruct"}
    assert {scoring.steps for run in main for scoring in run.scorings} == {(700,)}
    quantity = trained(expand("+grid=quantity"))
    assert {run.id for run in quantity} == {run.id for run in kept}
    assert {scoring.steps for run in quantity for scoring in run.scorings} == {EVERY_100}


def test_after_main_quantity_has_nothing_to_train(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "seed=0", "method=sft", "evaluation.benchmarks=[preference]")
    for run in trained(expand("+grid=main", *words, "dataset=beavertails", "peft=qlora")):
        finish_training(tmp_path, run)
    items = [item for item in plan(expand("+grid=quantity", *words), tmp_path) if item.run.kind == "train"]
    assert [(item.to_make, len(item.missing)) for item in items] == [(None, 7)] * 2


def test_a_step_to_be_evaluated_is_kept_too() -> None:
    (run,) = trained(expand("train.max_steps=8", "evaluation.steps=[4]"))
    assert run.steps == (4, 8)
    assert [scoring.steps for scoring in run.scorings] == [(4,)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["+grid=full", "train.max_steps=8"], "train.checkpoint_steps: step 100 is beyond train.max_steps=8"),
        (["train.max_steps=8", "train.checkpoint_steps=[2,9]"], "train.checkpoint_steps: step 9 is beyond"),
        (["train.max_steps=8", "evaluation.steps=[2,9]"], "evaluation.steps: step 9 is beyond"),
    ],
)
def test_steps_beyond_the_last_are_one_fault_that_names_what_to_give(words: list[str], told: str) -> None:
    fault = one_fault(*words)
    assert fault.startswith(told)
    key = told.partition(":")[0]
    assert fault.endswith(f"(give {key}=[8] too)")
    remedied = [word for word in words if not word.startswith(key)] + [f"{key}=[8]"]
    assert {run.steps for run in trained(expand(*remedied))} == {(8,)}


# --- overrides


def test_a_key_of_the_selectors_keeps_the_merges_whose_inputs_all_have_the_value() -> None:
    sweep = expand("+grid=merge", "method=sft")
    assert counts(sweep) == (20, 20, 2)
    assert {row for run in merges(sweep) for row in inputs_of(sweep, run, "method")} == {("sft",)}
    assert sweep.notes == [
        "method=sft: block slerp: 10 of 20 cells kept",
        "method=sft: block dare_ties: 10 of 30 cells kept",
    ]
    assert counts(expand("+grid=merge", "method=sft,dpo")) == (50, 40, 2)


def test_a_value_that_no_merge_has_for_all_its_inputs_leaves_none() -> None:
    told = one_fault("+grid=merge", "preference=harmless")
    assert told.startswith("preference=harmless: no run is left (no cell has all of these; block slerp has ")


def test_an_axis_narrows_the_inputs_too() -> None:
    sweep = expand("+grid=merge", "model=mistral_7b", "seed=0,1")
    assert counts(sweep) == (10, 8, 1)
    assert {(run.choices["model"], run.config.seed) for run in sweep.runs if run.kind != "baseline"} == {
        ("mistral_7b", 0),
        ("mistral_7b", 1),
    }


def test_a_value_that_no_block_selects_drops_the_merges_and_says_so(grid: Grid) -> None:
    sweep = grid(grid_of(TRAINED, block()), "preference=mixture", "dataset=beavertails")
    assert [run.kind for run in sweep.runs] == ["train"]
    assert "preference=mixture: block trained: replaces its values" in sweep.notes
    assert "preference=mixture: block pair: dropped, its inputs have other values" in sweep.notes


def test_a_setting_of_the_inputs_goes_to_all_of_them(grid: Grid) -> None:
    sweep = grid(grid_of(block()), "peft.r=8,16")
    assert [inputs_of(sweep, run, "peft.r") for run in merges(sweep)] == [[(8,), (8,)], [(16,), (16,)]]
    assert len({run.id for run in merges(sweep)}) == 2


def test_a_setting_of_one_method_goes_to_the_inputs_of_that_method(grid: Grid) -> None:
    sweep = grid(grid_of(block(METHODS)), "method.beta=0.3")
    assert inputs_of(sweep, merges(sweep)[0], "method.beta") == [(None,), (0.3,)]


@pytest.mark.parametrize(
    ("word", "left"),
    [("merge=slerp", {"slerp": 20}), ("merge=slerp,dare_ties", {"slerp": 20, "dare_ties": 30}), ("merge=ties", None)],
)
def test_merge_filters_or_replaces(word: str, left: dict[str, int] | None) -> None:
    sweep = expand("+grid=merge", word)
    # two blocks merge some of the same inputs: with the same merge, that is one run
    assert Counter(run.choices["merge"] for run in merges(sweep)) == (left or {"ties": 30})


def test_a_parameter_reaches_the_merges_that_have_it() -> None:
    words = ("+grid=merge", "model=mistral_7b", "seed=0")
    sweep = expand(*words, "merge.density=0.3,0.5")
    dense = [("dare_ties", 0.3)] * 3 + [("dare_ties", 0.5)] * 3
    assert sorted(of_merges(sweep, "merge", "merge.density"), key=str) == [*dense, *[("slerp", None)] * 2]
    assert "merge.density" in sweep.axis_keys
    assert {run.axes.get("merge.density") for run in merges(sweep) if run.choices["merge"] == "slerp"} == {None}
    assert set(of_merges(expand(*words, "merge.t=0.25"), "merge", "merge.t")) == {("slerp", 0.25), ("dare_ties", None)}


def test_a_parameter_that_no_merge_has_is_a_fault() -> None:
    told = one_fault("+grid=merge", "merge=dare_ties", "merge.t=0.25")
    assert (
        told
        == "merge.t=0.25: no run of this sweep has it: it belongs to merge slerp (leave it out, or add merge=slerp)"
    )


@pytest.mark.parametrize("words", [["+grid=main", "merge=slerp"], ["merge=slerp"]])
def test_a_merge_without_a_block_of_merges_is_a_fault(words: list[str]) -> None:
    assert "a merge needs inputs, which a grid names in a block with kind: merge" in one_fault(*words)
    assert trained(expand("merge=none"))


# --- when and set


def test_set_for_some_inputs_by_a_key_of_their_selectors(grid: Grid) -> None:
    more = "when: [{where: {method: dpo}, set: {peft.r: 8}}, {where: {method: sft}, set: {peft.r: 4, peft.alpha: 5}}]"
    text = grid_of(block(METHODS, "[{method: dpo}, {method: sft}]", sets="peft.r: 2", more=more))
    sweep = grid(text)
    found = [inputs_of(sweep, run, "method", "peft.r", "peft.alpha") for run in merges(sweep)]
    assert found == [[("sft", 4, 5.0), ("dpo", 8, 32.0)], [("dpo", 8, 32.0), ("sft", 4, 5.0)]]
    sweep = grid(text, "peft.r=16")
    assert inputs_of(sweep, merges(sweep)[0], "peft.r") == [(16,), (16,)]


def test_parameters_of_a_merge_by_which_merge_it_is(grid: Grid) -> None:
    whens = "{where: {merge: slerp}, axes: {merge.t: [0.25, 0.75]}}, {where: {merge: ties}, set: {merge.density: 0.9}}"
    sweep = grid(grid_of(block(merge="slerp, ties", more=f"when: [{whens}]")))
    found = of_merges(sweep, "merge", "merge.t", "merge.density")
    assert found == [("slerp", 0.25, None), ("slerp", 0.75, None), ("ties", None, 0.9)]
    assert "merge.density" not in sweep.axis_keys


def test_the_order_is_command_line_when_set_selection_default(grid: Grid, tmp_path: Path) -> None:
    chosen = tmp_path / "selected.yaml"
    keys = ("peft.r", "peft.alpha", "train.batch_size", "train.warmup_steps", "seed")
    chosen.write_text(f"when: [{{where: {{method: sft}}, set: {{{', '.join(f'{key}: 7' for key in keys[:4])}}}}}]")
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {model: tiny, peft.r: 3, peft.alpha: 3, train.batch_size: 3}
        when: [{where: {method: [sft]}, set: {peft.r: 5, peft.alpha: 5}}]
    baselines: false
    """
    sft, dpo = (tuple(setting(run, k) for k in keys) for run in trained(grid(text, f"+selected={chosen}", "peft.r=9")))
    assert sft == (9, 5.0, 3, 7, 0)
    assert dpo == (9, 3.0, 3, 0, 0)


def test_a_when_may_set_and_vary_at_once(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {model: tiny}
        when: [{where: {method: dpo}, axes: {peft.r: [8, 16]}, set: {peft.alpha: 3, evaluation.limit: 2}}]
    """
    sweep = grid(text)
    found = [tuple(setting(r, k) for k in ("peft.r", "peft.alpha", "evaluation.limit")) for r in trained(sweep)]
    assert found == [(64, 16.0, None), (8, 3.0, 2), (16, 3.0, 2)]
    assert "peft.alpha" not in sweep.axis_keys


def test_a_setting_of_a_when_that_the_run_does_not_have_is_left_out(grid: Grid) -> None:
    text = "blocks: [{axes: {method: [sft, dpo]}, when: [{where: {model: tiny}, set: {method.beta: 0.3}}]}]"
    found = [setting(run, "method.beta") for run in trained(grid(text, "model=tiny"))]
    assert found == [None, 0.3]


def test_a_when_holds_for_inputs_that_have_the_value_by_default(grid: Grid) -> None:
    more = "when: [{where: {method: sft}, set: {peft.r: 4}}]"
    sweep = grid(grid_of(block(PAIR, METHODS, more=more)))
    assert [inputs_of(sweep, run, "peft.r") for run in merges(sweep)] == [[(4,), (4,)], [(4,), (16,)]]


def test_a_key_of_the_selectors_never_makes_other_merges_than_the_grid_has(grid: Grid) -> None:
    text = grid_of(block(PAIR, METHODS, "[{method: dpo}, {method: dpo, peft.r: 8}]"))
    whole = {run.id for run in merges(grid(text))}
    assert len(whole) == 3
    for word in ("method=sft", "method=dpo"):
        assert {run.id for run in merges(grid(text, word))} < whole


@pytest.mark.parametrize("where", ["model: tiny", "merge: linear"])
def test_each_merge_of_a_when_axis_has_inputs_of_its_own(grid: Grid, where: str) -> None:
    more = f"when: [{{where: {{{where}}}, axes: {{peft.r: [4, 8]}}}}]"
    sweep = grid(grid_of(block(more=more)))
    assert [inputs_of(sweep, run, "peft.r") for run in merges(sweep)] == [[(4,), (4,)], [(8,), (8,)]]


def test_a_when_axis_of_the_merge_alone_has_the_same_inputs(grid: Grid) -> None:
    more = "when: [{where: {model: tiny}, axes: {merge.density: [0.3, 0.5]}}]"
    sweep = grid(grid_of(block(merge="dare_ties", more=more)))
    assert of_merges(sweep, "merge.density") == [(0.3,), (0.5,)]
    assert len({run.parents for run in merges(sweep)}) == 1


# --- faults of a grid

TAKEN = "is an axis or a setting of the block already"
REFUSED = {
    "no inputs": ("{kind: merge, axes: {merge: [linear]}}", "blocks[0].inputs: is missing"),
    "no entry": ("{kind: merge, axes: {merge: [linear]}, inputs: []}", "blocks[0].inputs: is missing"),
    "inputs of a training": (f"{{axes: {{seed: [0]}}, inputs: [{PAIR}]}}", "inputs: belongs to a block of merges"),
    "one selector": (block("[{preference: harmless}]"), "inputs[0]: a list of two or more selectors is expected"),
    "no list": (block("{preference: harmless}"), "inputs[0]: a list of two or more selectors is expected"),
    "no mapping": (block("[{preference: harmless}, helpful]"), "inputs[0][1]: a mapping is expected"),
    "selected by an axis": (
        "{kind: merge, axes: {merge: [linear], seed: [0, 1]}, inputs: [[{seed: 0}, {seed: 1}]]}",
        f"inputs[0].seed: {TAKEN}",
    ),
    "selected by a setting": (block("[{model: tiny}, {seed: 1}]"), f"inputs[0].model: {TAKEN}"),
    "operational": (block("[{evaluation.limit: 1}, {seed: 1}]"), "tells no training run from another"),
    "of the merge": (block("[{merge.t: 0.5}, {seed: 1}]"), "tells no training run from another"),
    "of the sweep": (block("[{hub.mirror: here}, {seed: 1}]"), "holds for a sweep as a whole"),
    "unknown option": (block("[{method: dop}, {seed: 1}]"), "did you mean 'dpo'?"),
    "duplicates": (block("[{seed: 1}, {seed: 2}, {seed: 1}]"), "inputs[0]: names one input twice"),
    "no merge": (f"{{kind: merge, inputs: [{PAIR}]}}", "blocks[0].axes.merge: is missing"),
    "no merge but its when": (
        f"{{kind: merge, inputs: [{PAIR}], when: [{{where: {{seed: 0}}, set: {{merge: ties}}}}], set: {{seed: 0}}}}",
        "blocks[0].axes.merge: is missing",
    ),
    "none is no merge": (block(merge="none"), "block pair: merge=none: is no merge"),
    "merge of a training": ("{axes: {merge: [slerp]}}", "blocks[0].merge: belongs to a block of merges"),
    "parameter of a training": ("{set: {merge.t: 0.5}}", "blocks[0].merge.t: belongs to a block of merges"),
    "when of a training": (
        "{when: [{where: {method: sft}, set: {merge.t: 0.5}}]}",
        "blocks[0].merge.t: belongs to a block of merges",
    ),
    "axes for some inputs": (
        block(more="when: [{where: {preference: helpful}, axes: {peft.r: [4, 8]}}]"),
        "when[0].axes: cannot be: it holds for some inputs of a merge only",
    ),
    "exclude by a selector": (
        block(more="exclude: [{where: {preference: helpful}, reason: x}]"),
        "exclude[0].where.preference: is neither an axis nor a setting of this block",
    ),
    "slerp of three": (block("[{seed: 0}, {seed: 1}, {seed: 2}]", merge="slerp"), "slerp merges two inputs, not 3"),
    "weights": (block(sets="merge.weights: [1, 1, 1]"), "merge.weights has 3 values for 2 inputs"),
    "other bases": (
        "{kind: merge, axes: {merge: [ties]}, inputs: [[{peft: lora}, {peft: qlora}]], set: {model: tiny}}",
        "its inputs were trained on different bases",
    ),
    "one run twice": (block("[{preference: harmless}, {method: sft}]"), "two of its inputs are the same run"),
    "kind": (block().replace("kind: merge", "kind: merg"), "did you mean 'merge'?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(grid_faults: GridFaults, case: str) -> None:
    text, message = REFUSED[case]
    found = grid_faults(grid_of(text))
    assert any(message in fault for fault in found)
    assert len(found) == (2 if case == "kind" else 1)


def test_a_parameter_of_the_merge_for_some_inputs_is_refused(grid_faults: GridFaults) -> None:
    more = "when: [{where: {preference: helpful}, set: {merge.density: 0.3}}]"
    (fault,) = grid_faults(grid_of(block(merge="dare_ties", more=more)))
    assert "when[0]" in fault


# --- identity


def test_inputs_their_order_parameters_and_seed_make_a_merge(grid: Grid) -> None:
    inputs = [PAIR, "[{preference: helpful}, {preference: harmless}]", METHODS]
    sets = ["", "seed: 1", "merge.density: 0.4", "merge.weights: [1, 2]", "merge.scaling: 2", "peft.r: 8"]
    found = [id_of(grid(grid_of(block(each)))) for each in inputs]
    found += [id_of(grid(grid_of(block(sets=each, merge="dare_ties")))) for each in sets]
    assert len({name.rpartition("-")[2] for name in found}) == len(found)


def test_what_is_saved_of_a_merge_does_not_make_it(grid: Grid) -> None:
    words = [(), ("merge.save=adapter",), ("merge.save=full",), ("merge.save_rank=4",), ("merge.save_tolerance=1",)]
    words += [("evaluation.limit=3",), ("hub.mirror=here",), ("train.micro_batch_size=1",)]
    assert len({id_of(grid(grid_of(block()), *each)) for each in words}) == 1


def test_a_merge_is_named_by_what_is_merged_and_how(grid: Grid) -> None:
    (run,) = merges(grid(grid_of(block(METHODS, merge="slerp", sets="seed: 3"))))
    assert run.id.startswith("merge-everyday-sft_harmless_dpo_harmless-slerp-tiny-lora-s3-")
    named = (run.axes["inputs"], run.axes["merge"], run.choices["method"])
    assert named == ("sft_harmless+dpo_harmless", "slerp", "sft+dpo")


def test_equal_merges_of_two_blocks_are_one_run(grid: Grid) -> None:
    first, both = grid(grid_of(block())), grid(grid_of(block(), block(PAIR, METHODS, name="more")))
    assert len({run.id for run in merges(both)}) == len(merges(both)) == 2
    assert merges(both)[0] == merges(first)[0]


@pytest.mark.parametrize("first", [TRAINED, block()], ids=["inputs trained before", "merged before"])
def test_a_merge_is_scored_as_its_own_block_says(grid: Grid, first: str) -> None:
    (run,) = merges(grid(grid_of(first, block(sets="evaluation.limit: 3"))))
    asked = [(s.preference_name, s.evaluation.limit) for s in run.scorings]
    assert asked[-2:] == [("harmless", 3), ("helpful", 3)]


def test_a_search_beside_merges_does_not_change_how_they_are_scored() -> None:
    sweep = expand("+grid=rank,merge", "model=mistral_7b")
    assert {s.evaluation.heldout_split for run in merges(sweep) for s in run.scorings} == {"test"}


@pytest.mark.parametrize("saves", [("none", "full"), ("full", "none"), ("full", "adapter")])
def test_of_equal_merges_what_one_block_wants_saved_is_saved(grid: Grid, saves: tuple[str, str]) -> None:
    sweep = grid(grid_of(*(block(name=each, sets=f"merge.save: {each}") for each in saves)))
    assert [run.saves for run in merges(sweep)] == [tuple(sorted({*saves} - {"none"}))]


def test_a_merge_of_runs_of_other_lengths_is_scored_once(grid: Grid, tmp_path: Path) -> None:
    more = "when: [{where: {method: dpo}, set: {train.max_steps: 8}}]"
    sweep = grid(grid_of(block(METHODS, sets="evaluation.benchmarks: [everyday_mc]", more=more)))
    finish(tmp_path, sweep)
    assert [request.step for request in state(tmp_path, sweep).requests] == [8]


# --- a selection


def selection(folder: Path, text: str) -> str:
    path = folder / "selected.yaml"
    path.write_text(text, encoding="utf-8")
    return f"+selected={path}"


BOTH = "when: [{where: {method: sft}, set: {peft.r: 32}}, {where: {method: dpo}, set: {peft.r: 8, peft.dropout: 0.2}}]"


def test_a_selection_sets_values_only_where_nothing_else_does(grid: Grid, tmp_path: Path) -> None:
    text = """
    blocks:
      - {name: free, set: {model: tiny}}
      - {name: set, set: {model: tiny, seed: 1, peft.r: 4}}
      - {name: varied, axes: {peft.r: [2, 3]}, set: {model: tiny, seed: 2}}
      - {name: other, set: {model: tiny, method: dpo, seed: 3}}
    baselines: false
    """
    found = [setting(run, "peft.r") for run in trained(grid(text, selection(tmp_path, BOTH)))]
    assert found == [32, 4, 2, 3, 8]
    assert [setting(run, "peft.r") for run in trained(grid(text, selection(tmp_path, BOTH), "peft.r=6"))] == [6] * 4


def test_a_selection_on_the_command_line_alone(tmp_path: Path) -> None:
    sweep = expand("method=sft,dpo", "model=tiny", selection(tmp_path, BOTH))
    assert [(setting(run, "peft.r"), setting(run, "peft.dropout")) for run in trained(sweep)] == [(32, 0.1), (8, 0.2)]
    assert "peft.r" not in sweep.axis_keys


def test_the_command_line_goes_before_a_selection_where_another_cells_when_has_the_key(
    grid: Grid, tmp_path: Path
) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {model: tiny}
        when: [{where: {method: dpo}, axes: {peft.r: [8, 16]}}]
    """
    words = ("peft.r=8",)
    assert [setting(run, "peft.r") for run in trained(grid(text, *words))] == [8, 8]
    assert [setting(run, "peft.r") for run in trained(grid(text, *words, selection(tmp_path, BOTH)))] == [8, 8]


@pytest.mark.parametrize("methods", ["sft,dpo", "dpo"])
def test_a_run_that_continues_an_adapter_has_the_rank_selected_for_that(tmp_path: Path, methods: str) -> None:
    sweep = expand(f"method={methods}", "method.init=sft", "model=tiny", selection(tmp_path, BOTH))
    found = [(run.config.method.kind, run.config.peft.r, run.config.peft.dropout) for run in sweep.runs[:2]]
    assert found == [("sft", 32, 0.1), ("dpo", 32, 0.2)]


def test_inputs_of_a_merge_have_what_was_selected_for_their_method(grid: Grid, tmp_path: Path) -> None:
    sweep = grid(grid_of(block(METHODS)), selection(tmp_path, BOTH))
    assert inputs_of(sweep, merges(sweep)[0], "method", "peft.r") == [("sft", 32), ("dpo", 8)]


@pytest.mark.parametrize("selected", [False, True])
def test_the_sft_run_that_an_input_starts_from_is_the_one_that_is_an_input_too(
    grid: Grid, tmp_path: Path, selected: bool
) -> None:
    sets = "[{where: {method: dpo}, set: {train.learning_rate: 0.5}}, {where: {method: sft}, set: {peft.r: 4}}]"
    entry = "[{method: sft}, {method: dpo, method.init: sft}]"
    text = grid_of(block(entry, more="" if selected else f"when: {sets}"))
    sweep = grid(text, *([selection(tmp_path, f"when: {sets}")] if selected else []))
    (run,) = merges(sweep)
    assert inputs_of(sweep, run, "peft.r", "train.learning_rate") == [(4, 2e-4), (4, 0.5)]
    sft, dpo = (sweep.by_id()[parent] for parent in run.parents)
    assert dpo.parents == (sft.id,)


def test_a_selection_changes_no_baseline(tmp_path: Path) -> None:
    words = ("method=sft,dpo", "model=tiny")
    plain, selected = expand(*words), expand(*words, selection(tmp_path, BOTH))
    assert plain.runs[-1].kind == "baseline"
    assert plain.runs[-1].id == selected.runs[-1].id
    assert not ids(plain) & ids(selected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("when: [{where: {method: sft}, set: {peft.rr: 8}}]", "when[0].set.peft.rr: no such key (did you mean"),
        ("when: [{where: {metod: sft}, set: {peft.r: 8}}]", "when[0].where.metod: is neither an axis"),
        ("when: [{where: {method: sft}, axes: {peft.r: [8]}}]", "a selection sets values, it has no axes"),
        ("when: []", "when: is empty (make the file with python -m peft_align.select)"),
        ("", "when: is empty"),
        ("wen: []", "wen: no such key (did you mean 'when'?)"),
        ("when: [{where: {method: sft}, set: {root: x}}]", "holds for a sweep as a whole"),
        ("when: [{where: {method: sft}}]", "when[0]: has neither axes nor set"),
        ("when: [", "is not YAML"),
    ],
)
def test_what_is_refused_of_a_selection(tmp_path: Path, text: str, told: str) -> None:
    fault = one_fault("model=tiny", selection(tmp_path, text))
    assert str(tmp_path / "selected.yaml") in fault
    assert told in fault


def test_a_selection_that_is_not_there_is_told_with_the_other_faults(tmp_path: Path) -> None:
    told = one_fault("model=tiny", f"+selected={tmp_path}/none.yaml")
    assert told.startswith(f"{tmp_path}/none.yaml: is not there")


# --- job files and the plan


def test_a_merge_comes_back_from_a_job_file_as_it_was(grid: Grid) -> None:
    sweep = grid(grid_of(block(METHODS, merge="slerp, dare_ties", sets="merge.save: adapter")))
    for run in sweep.runs:
        assert run_from_plain(json.loads(json.dumps(run_to_plain(run)))) == run


@pytest.fixture
def small(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """One merge; digests are remembered in a folder of the test."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    return grid(grid_of(block(sets="evaluation.benchmarks: [preference, everyday_mc]")))


def finish(root: Path, sweep: Sweep, save: str = "none") -> None:
    """Leave the sweep's inputs and merges on disk."""
    for run in sweep.runs:
        if run.kind == "train":
            finish_training(root, run)
        if run.kind == "merge":
            finish_merge(root, run, save)


def finish_merge(root: Path, run: Run, save: str = "none") -> RunDir:
    """Leave a merge on disk as models/merged.py does, with a few bytes for what is saved of it."""
    directory = RunDir(root, run.id)
    saved = {}
    if save != "none":
        folder = directory.merged(save)
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(run.id.encode())
        files = inventory(folder, ["weights.safetensors"], Digests())
        saved = {save: {"asked": asked_of(run, save), "files": files, "inputs": {}}}
    parents = {parent: adapter_digest(RunDir(root, parent).train_record()) for parent in run.parents}
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "merge",
        "merge": {"kind": "arithmetic"},
        "adapters": list(parents.values()),
        "seed": run.config.seed,
        "digest": "0123456789abcdef",
        "parents": parents,
        "weights": run.base,
        "saved": saved,
    }
    write_json(directory.path / "merge.json", record)
    return directory


def state(root: Path, sweep: Sweep) -> Item:
    """The state of the sweep's only merge."""
    (item,) = [item for item in plan(sweep, root) if item.run.kind == "merge"]
    return item


def test_a_merge_without_a_record_is_to_be_made_and_has_no_key_to_be_scored_under(small: Sweep, tmp_path: Path) -> None:
    item = state(tmp_path, small)
    assert item.why == "merge; evaluate everyday_mc, preference"
    assert [(r.benchmark, r.scoring.preference_name, r.key) for r in item.requests] == [
        ("preference", "harmless", None),
        ("everyday_mc", "harmless", None),
        ("preference", "helpful", None),
    ]


def test_a_merge_with_its_record_is_to_be_scored_and_then_done(small: Sweep, tmp_path: Path) -> None:
    finish(tmp_path, small)
    item = state(tmp_path, small)
    assert item.why == "evaluate everyday_mc, preference"
    assert [r.key and (r.key["adapter"], r.key["base"]["weights"]) for r in item.requests] == [
        ("0123456789abcdef", "bf16")
    ] * 3
    for request in item.requests:
        finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    assert (state(tmp_path, small).done, state(tmp_path, small).why) == (True, "")


def test_a_merge_of_another_adapter_than_now_is_made_again(small: Sweep, tmp_path: Path) -> None:
    finish(tmp_path, small)
    parent = RunDir(tmp_path, merges(small)[0].parents[1])
    record = parent.train_record() or {}
    digest = record["checkpoints"]["4"]["digest"]
    record["checkpoints"]["4"]["digest"] = "fedcba9876543210"
    write_json(parent.path / "train.json", record)
    told = state(tmp_path, small).to_make
    assert told == f"merge again: its parent {parent.id} changed: was {digest[:12]}, is fedcba987654"


def test_a_merge_whose_inputs_are_gone_is_still_a_merge(small: Sweep, tmp_path: Path) -> None:
    finish(tmp_path, small)
    (RunDir(tmp_path, merges(small)[0].parents[0]).path / "train.json").unlink()
    assert state(tmp_path, small).to_make is None


def test_what_is_to_be_saved_and_is_not_is_to_be_made(small: Sweep, grid: Grid, tmp_path: Path) -> None:
    finish(tmp_path, small)
    asked = grid(grid_of(block()), "merge.save=adapter")
    assert (state(tmp_path, asked).to_make, state(tmp_path, asked).to_save) == (None, ("adapter",))
    assert state(tmp_path, asked).why.startswith("save as adapter; evaluate")
    directory = finish_merge(tmp_path, merges(asked)[0], "adapter")
    assert state(tmp_path, asked).to_save == ()
    assert state(tmp_path, small).to_save == ()  # what asks for less needs nothing
    assert state(tmp_path, grid(grid_of(block()), "merge.save=full")).to_save == ("full",)
    other = grid(grid_of(block()), "merge.save=adapter", "merge.save_rank=2")
    assert state(tmp_path, other).to_save == ("adapter",)
    (directory.merged("adapter") / "weights.safetensors").unlink()
    assert state(tmp_path, asked).to_save == ("adapter",)


def test_a_merge_on_a_quantized_base_is_scored_as_dequantized(grid: Grid, tmp_path: Path) -> None:
    sweep = grid(grid_of(block().replace("peft: lora", "peft: qlora")))
    finish(tmp_path, sweep)
    keys = [request.key for request in state(tmp_path, sweep).requests]
    assert [key and key["base"]["weights"] for key in keys] == ["nf4 dequantized"] * len(keys)
