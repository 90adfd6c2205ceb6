"""Cells into runs: how many, which ids, which parents and baselines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeping import cells, expand, faults, ids, one_fault, shipped, trained

from peft_align.grid.runs import Run, Sweep

Grid = Callable[..., Sweep]
GridFaults = Callable[..., list[str]]

SHIPPED_GRIDS = shipped().options("grid")
GOLDEN = Path(__file__).with_name("golden_ids.json")
TINY_SFT_DPO = ("model=tiny", "dataset=everyday", "train.max_steps=4")


def golden(name: str) -> dict[str, Any]:
    """What the ids of a shipped grid are held to: their digest, and three of them to look at."""
    found = sorted(run.id for run in expand(f"+grid={name}").runs)
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
    return {"runs": len(found), "sha256": digest, "some": [found[0], found[len(found) // 2], found[-1]]}


@pytest.mark.parametrize("name", SHIPPED_GRIDS)
def test_ids_of_the_shipped_grids_are_the_golden_ones(name: str) -> None:
    now = golden(name)
    assert json.loads(GOLDEN.read_text(encoding="utf-8"))[name] == now, (
        f"The run ids of grid '{name}' changed: results that users have would be done again under new names. "
        f"If a scientific default or the hash was changed on purpose, say so in CHANGELOG.md and put this under "
        f"'{name}' in {GOLDEN.name}:\n{json.dumps(now, indent=1)}"
    )


def test_full_is_the_study() -> None:
    kinds = Counter(run.kind for run in expand("+grid=full").runs)
    assert kinds == {"train": 596, "merge": 50, "baseline": 8}


def test_ten_thousand_runs_expand_to_as_many_ids() -> None:
    runs = trained(expand("method=sft,dpo", "peft=lora,qlora", "seed=range(2500)", "model=tiny"))
    assert len(runs) == 10_000
    assert len({run.id for run in runs}) == 10_000


def test_a_run_lists_its_axes_and_a_slug_that_names_them() -> None:
    run = trained(expand("method=dpo", "peft.r=8,16", "seed=3", "model=tiny"))[0]
    assert run.axes == {
        "dataset": "hh_rlhf",
        "preference": "harmless",
        "method": "dpo",
        "model": "tiny",
        "peft": "qlora",
        "peft.r": 8,
    }
    assert run.id.startswith("hh_rlhf-harmless-dpo-tiny-qlora-s3-")


def parts(sweep: Sweep) -> tuple[list[Run], list[Run], list[Run]]:
    """Parents that the grid lacks, its own SFT runs, its DPO runs."""
    runs = [run for run in sweep.runs if run.kind == "train"]
    sft = [run for run in runs if run.config.method.kind == "sft"]
    own = [run for run in sft if not run.is_parent_only]
    return [run for run in sft if run.is_parent_only], own, [run for run in runs if run.config.method.kind == "dpo"]


def test_a_parent_that_the_grid_lacks_is_added_once_and_before_its_child() -> None:
    sweep = expand("method=dpo", "method.init=sft", "method.beta=0.1,0.2", "seed=0,1", *TINY_SFT_DPO)
    parents, own, dpo = parts(sweep)
    assert (len(parents), len(own), len(dpo)) == (2, 0, 4)
    assert {(run.parents, run.config.seed) for run in dpo} == {((p.id,), p.config.seed) for p in parents}
    order = [run.id for run in sweep.runs]
    assert all(order.index(parent) < order.index(run.id) for run in dpo for parent in run.parents)
    assert all(parent.scorings == [] for parent in parents)


def test_a_parent_that_the_grid_has_is_shared() -> None:
    sweep = expand("method=sft,dpo", "method.init=sft", "seed=0,1", *TINY_SFT_DPO)
    parents, own, dpo = parts(sweep)
    assert (len(parents), len(own), len(dpo)) == (0, 2, 2)
    assert {run.parents[0] for run in dpo} == {run.id for run in own}
    assert {run.id for run in own} == ids(expand("method=sft", "seed=0,1", *TINY_SFT_DPO))
    assert all(run.scorings for run in own)


def test_the_order_of_methods_does_not_decide_whether_a_parent_is_shared() -> None:
    words = ("method.init=sft", "seed=0", *TINY_SFT_DPO)
    assert ids(expand("method=dpo,sft", *words)) == ids(expand("method=sft,dpo", *words))
    assert not any(run.is_parent_only for run in expand("method=dpo,sft", *words).runs)


def test_a_child_takes_the_parents_adapter_shape_and_keeps_its_own_dropout() -> None:
    parents, _, (child,) = parts(expand("method=dpo", "method.init=sft", *TINY_SFT_DPO))
    ours, theirs = child.config.peft, parents[0].config.peft
    assert (ours.r, ours.alpha, ours.target_modules) == (theirs.r, theirs.alpha, theirs.target_modules)
    assert (ours.r, ours.alpha, ours.target_modules) == (64, 16.0, ["q_proj", "v_proj"])
    assert (ours.dropout, theirs.dropout) == (0.05, 0.1)


def test_a_run_from_sft_is_another_run_than_one_from_the_base() -> None:
    words = ("method=dpo", *TINY_SFT_DPO)
    from_base, from_sft = (trained(expand(*words, f"method.init={init}"))[0] for init in ("base", "sft"))
    assert from_base.parents == ()
    assert "-sft_dpo-" in from_sft.id
    assert from_base.id.rpartition("-")[2] != from_sft.id.rpartition("-")[2]


def test_a_rank_given_for_both_methods_is_the_parents_too() -> None:
    parents, _, dpo = parts(expand("method=dpo", "method.init=sft", "peft.r=8,16", *TINY_SFT_DPO))
    assert sorted(run.config.peft.r for run in parents) == [8, 16]
    by_id = {run.id: run for run in parents}
    assert all(by_id[run.parents[0]].config.peft.r == run.config.peft.r for run in dpo)


def test_a_rank_that_differs_from_the_parents_is_a_fault(grid_faults: GridFaults) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {model: tiny, method.init: sft}
        when: [{where: {method: dpo}, axes: {peft.r: [8]}}]
    """
    (fault,) = grid_faults(text)
    assert fault.startswith("peft.r=8: 8 differs from the SFT run's 64")


WHEN_SFT = """
blocks:
  - axes: {method: [sft, dpo]}
    set: {model: tiny, method.init: sft}
    when: [{where: {method: sft}, axes: {train.max_steps: [4, 8]}}]
baselines: false
"""


def test_several_runs_that_could_be_the_parent_are_a_fault(grid_faults: GridFaults) -> None:
    (fault,) = grid_faults(WHEN_SFT)
    assert "the SFT run that it starts from is not one run but 2, which differ in train.max_steps" in fault


def test_narrowed_to_one_candidate_it_is_the_parent(grid: Grid) -> None:
    parents, (own,), (dpo,) = parts(grid(WHEN_SFT, "train.max_steps=4"))
    assert parents == []
    assert (own.config.train.max_steps, dpo.config.train.max_steps) == (4, 4)
    assert dpo.parents == (own.id,)


def test_a_parent_of_the_same_cell_is_found_where_a_when_holds_for_both_methods(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo], peft: [qlora]}
        set: {model: tiny, method.init: sft}
        when: [{where: {peft: qlora}, axes: {peft.r: [8, 16]}}]
    baselines: false
    """
    parents, own, dpo = parts(grid(text))
    assert parents == []
    by_id = {run.id: run for run in own}
    assert {(run.config.peft.r, by_id[run.parents[0]].config.peft.r) for run in dpo} == {(8, 8), (16, 16)}


def test_a_baseline_is_shared_by_all_runs_on_its_base_and_scores_each_set_once() -> None:
    sweep = expand("+grid=main", "model=mistral_7b", "seed=0,1")
    baselines = [run for run in sweep.runs if run.kind == "baseline"]
    assert len(trained(sweep)) == 32
    assert [run.base for run in baselines] == ["bf16", "nf4"]
    for run in baselines:
        sets = [(s.dataset_name, s.preference_name) for s in run.scorings]
        assert len(sets) == len(set(sets)) == 4
        assert {s.steps for s in run.scorings} == {(0,)}


def test_parents_that_are_only_needed_have_no_baseline_of_their_own(grid: Grid) -> None:
    text = """
    blocks:
      - axes: {method: [sft, dpo]}
        set: {model: tiny, method.init: sft}
        when: [{where: {method: sft}, axes: {peft: [lora]}}]
    """
    both, dpo = grid(text), grid(text, "method=dpo")
    assert sorted(run.base for run in both.runs if run.kind == "baseline") == ["bf16", "nf4"]
    assert [run.base for run in dpo.runs if run.kind == "baseline"] == ["nf4"]
    assert [run.base for run in dpo.runs if run.is_parent_only] == ["bf16"]


def test_steps_that_several_blocks_ask_of_one_run_are_united(grid: Grid) -> None:
    text = """
    blocks:
      - set: {train.max_steps: 8, train.checkpoint_steps: [2, 8]}
      - set: {train.max_steps: 8, train.checkpoint_steps: [4], evaluation.limit: 3}
    """
    (run,) = trained(grid(text))
    assert run.steps == (2, 4, 8)
    assert [(s.steps, s.evaluation.limit) for s in run.scorings] == [((2, 8), None), ((4,), 3)]


def test_a_step_beyond_the_last_is_a_fault() -> None:
    fault = one_fault("train.checkpoint_steps=[4,900]")
    assert "step 900 is beyond train.max_steps=700" in fault


def test_a_preference_that_the_dataset_lacks_is_told_once_with_the_count() -> None:
    fault = one_fault("dataset=hh_rlhf", "preference=mixture", "seed=range(5)")
    assert fault.startswith("preference=mixture: dataset hh_rlhf has no preference 'mixture' (5 runs)")
    assert cells(expand("dataset=beavertails", "preference=mixture"), "preference") == [("mixture",)]


def test_faults_of_several_runs_are_told_together() -> None:
    found = faults("preference=mixture", "train.checkpoint_steps=[900]", "dataset=hh_rlhf,everyday")
    assert len(found) == 2
