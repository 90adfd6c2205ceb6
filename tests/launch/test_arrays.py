"""Runs into job arrays: what is started alike is one array, and nothing starts before what it reads is there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeping import expand, finish_evaluation, finish_judgement, finish_training, metric, plan, trained, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.config.launchers import Allocation, ResourceRule, Resources, Slurm
from peft_align.grid.order import order
from peft_align.grid.planner import Item
from peft_align.grid.resources import allocation
from peft_align.grid.runs import STAGES, Run, Sweep
from peft_align.launch.arrays import Array, plan_arrays
from peft_align.store.runs import RunDir

SMALL = ("model=tiny", "dataset=everyday", "train.max_steps=4", "peft=lora")
SCORED = "evaluation.benchmarks=[everyday_mc]"
WRITTEN = ("evaluation.benchmarks=[alpaca_eval,real_toxicity]", "judge=gpt4", "benchmark.real_toxicity.judge=profanity")
LAUNCHER = Slurm(
    kind="slurm", threads=None, runs_per_task=1, throttle=None, max_array=None, signal_before=120, attempts=3,
    offline=True, follow=False, dry_run=False,
)  # fmt: skip
ALIKE = Resources()
MERGES = """
blocks:
  - name: trained
    axes: {method: [sft, dpo], preference: [harmless, helpful], peft: [lora, qlora], seed: [0, 1]}
    set: {model: tiny, dataset: everyday, train.max_steps: 4}
    when: [{where: {method: dpo}, axes: {method.init: [sft]}}]
  - name: pair
    kind: merge
    axes: {merge: [linear], seed: [0, 1], peft: [lora, qlora]}
    inputs: [[{method: dpo, preference: harmless}, {method: dpo, preference: helpful}]]
    set: {model: tiny, dataset: everyday, train.max_steps: 4, method.init: sft}
"""
Live = Mapping[tuple[str, str], str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def launcher(**more: Any) -> Slurm:
    return dataclasses.replace(LAUNCHER, **more)


def rule(where: dict[str, str], **asked: Any) -> ResourceRule:
    return ResourceRule(where, Allocation(**asked))


def arrays_of(
    items: Sequence[Item],
    resources: Resources = ALIKE,
    config: Slurm = LAUNCHER,
    largest: int = 1000,
    live: Live | None = None,
    stages: Sequence[str] = STAGES,
) -> list[Array]:
    todo = [item for item in order(items) if not item.done]
    return plan_arrays(todo, resources, config, largest, live or {}, stages)


def shown(arrays: Sequence[Array], sweep: Sweep) -> list[tuple[Any, ...]]:
    """Stages, judges, kinds of the runs, and the stages of the arrays that are waited for."""
    by_id, by_name = sweep.by_id(), {array.name: array for array in arrays}
    return [
        (
            array.stages,
            array.judges,
            [by_id[run].kind for task in array.tasks for run in task],
            [by_name[name].stages for name in array.after],
        )
        for array in arrays
    ]


def grid(folder: Path, text: str = MERGES, *words: str) -> Sweep:
    write_option(folder, "grid/mine", text)
    return expand("+grid=mine", *words, space=ConfigSpace([folder]))


def runs_in(array: Array) -> list[str]:
    return [run for task in array.tasks for run in task]


# --- stages and classes


def test_what_asks_for_the_same_is_trained_and_evaluated_in_one_array(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "seed=0,1,2")
    arrays = arrays_of(plan(sweep, tmp_path))
    assert shown(arrays, sweep) == [
        (("train", "evaluate"), None, ["train"] * 3, []),
        (("evaluate",), None, ["baseline"], []),
    ]
    assert [len(array.tasks) for array in arrays] == [3, 1]
    assert len({array.name for array in arrays}) == len(arrays)


def test_where_evaluation_asks_for_something_else_it_is_an_array_after_the_training(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "seed=0,1")
    resources = Resources(gpus=1, rules=[rule({"stage": "evaluate"}, time="60")])
    arrays = arrays_of(plan(sweep, tmp_path), resources)
    assert shown(arrays, sweep) == [
        (("train",), None, ["train"] * 2, []),
        (("evaluate",), None, ["train", "train", "baseline"], [("train",)]),
    ]
    assert [array.asked for array in arrays] == [Allocation(gpus=1), Allocation(gpus=1, time="60")]


def test_each_class_of_resources_is_an_array_of_its_own(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "method=sft,dpo", "seed=0,1")
    resources = Resources(gpus=1, rules=[rule({"method": "dpo", "stage": "train"}, gpus=2)])
    arrays = [array for array in arrays_of(plan(sweep, tmp_path), resources) if "train" in array.stages]
    by_id = sweep.by_id()
    found = {a.asked.gpus: {by_id[run].choices["method"] for run in runs_in(a)} for a in arrays}
    assert found == {1: {"sft"}, 2: {"dpo"}}
    assert all(array.asked == allocation(resources, "train", by_id[run]) for array in arrays for run in runs_in(array))


def test_parents_are_an_array_of_their_own_children_come_after_it_and_wait_for_no_score(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "method=sft,dpo", "method.init=sft", "seed=0,1")
    by_id = sweep.by_id()
    arrays = arrays_of(plan(sweep, tmp_path))
    parents, children, scores = arrays
    assert parents.stages == ("train",)
    assert {by_id[run].choices["method"] for run in runs_in(parents)} == {"sft"}
    assert children.stages == ("train", "evaluate")
    assert {by_id[run].choices["method"] for run in runs_in(children)} == {"dpo"}
    assert children.after == [parents.name]
    assert scores.stages == ("evaluate",)
    assert scores.after == [parents.name]
    assert set(runs_in(scores)) >= set(runs_in(parents))


def test_a_parent_that_is_done_is_not_waited_for(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "method=dpo", "method.init=sft")
    (parent,) = (run for run in sweep.runs if run.is_parent_only)
    finish_training(tmp_path, parent)
    arrays = arrays_of(plan(sweep, tmp_path))
    assert parent.id not in {run for array in arrays for run in runs_in(array)}
    assert [array.after for array in arrays] == [[], []]


def test_merges_come_after_their_inputs_and_wait_for_no_score(tmp_path: Path) -> None:
    sweep = grid(tmp_path, MERGES, SCORED)
    arrays = arrays_of(plan(sweep, tmp_path / "root"))
    by_id = sweep.by_id()
    (merges,) = (array for array in arrays if "merge" in array.stages)
    assert merges.stages == ("merge", "evaluate")
    assert {by_id[run].kind for run in runs_in(merges)} == {"merge"}
    training = {run: array.name for array in arrays if "train" in array.stages for run in runs_in(array)}
    assert set(merges.after) == {training[parent] for run in runs_in(merges) for parent in by_id[run].parents}
    names = [array.name for array in arrays]
    assert all(names.index(name) < names.index(merges.name) for name in merges.after)
    assert not any("evaluate" in array.stages for array in arrays if array.name in merges.after)


def test_each_judge_is_an_array_after_the_texts(tmp_path: Path) -> None:
    sweep = expand(*SMALL, *WRITTEN)
    resources = Resources(gpus=1, rules=[rule({"judge": "gpt4"}, gpus=0)])
    arrays = arrays_of(plan(sweep, tmp_path), resources)
    texts = [("train", "evaluate"), ("evaluate",)]
    assert shown(arrays, sweep) == [
        (("train", "evaluate"), None, ["train"], []),
        (("evaluate",), None, ["baseline"], []),
        (("judge",), ("gpt4",), ["train", "baseline"], texts),
        (("judge",), ("profanity",), ["train", "baseline"], texts),
    ]
    assert [array.asked.gpus for array in arrays] == [1, 1, 0, 1]


def test_texts_that_are_there_are_judged_at_once_and_those_that_are_judged_are_not_judged_again(tmp_path: Path) -> None:
    sweep = expand(*SMALL, *WRITTEN)
    finish_training(tmp_path, trained(sweep)[0])
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    train, baseline = plan(sweep, tmp_path)
    (own,) = (judgement for judgement in train.to_judge if judgement.option == "gpt4")
    finish_judgement(tmp_path, own, [metric("win_rate", 50)])
    arrays = arrays_of(plan(sweep, tmp_path))
    assert [(array.judges, runs_in(array), array.after) for array in arrays] == [
        (("gpt4",), [baseline.run.id], []),
        (("profanity",), [train.run.id, baseline.run.id], []),
    ]


def test_only_the_stages_that_are_asked_for_are_planned(tmp_path: Path) -> None:
    sweep = expand(*SMALL, *WRITTEN)
    items = plan(sweep, tmp_path)
    assert {stage for a in arrays_of(items, stages=("train", "merge")) for stage in a.stages} == {"train"}
    assert {stage for a in arrays_of(items, stages=("evaluate",)) for stage in a.stages} == {"evaluate"}
    assert {stage for a in arrays_of(items, stages=("judge",)) for stage in a.stages} == {"judge"}


def test_nothing_is_planned_where_nothing_is_missing(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED)
    finish_training(tmp_path, trained(sweep)[0])
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    assert arrays_of(plan(sweep, tmp_path)) == []


def with_scores(root: Path, *words: str) -> tuple[Sweep, Run, Run]:
    """A sweep that is done, of a parent and a child, whose parent's adapter is lost then."""
    sweep = expand(*SMALL, *words, "method=sft,dpo", "method.init=sft")
    parent, child = trained(sweep)
    for run in (parent, child):
        finish_training(root, run)
    for item in plan(sweep, root):
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)])
    (RunDir(root, parent.id).adapter / "adapter_model.safetensors").unlink()
    return sweep, parent, child


def test_a_child_of_what_is_trained_again_is_trained_and_evaluated_again_though_its_own_files_are_there(
    tmp_path: Path,
) -> None:
    sweep, parent, child = with_scores(tmp_path, SCORED)
    items = {item.run.id: item for item in plan(sweep, tmp_path)}
    assert items[parent.id].to_make
    assert items[child.id].done
    arrays = plan_arrays(order(list(items.values())), ALIKE, LAUNCHER, 1000, {}, STAGES)
    done = {stage for array in arrays for stage in array.stages if child.id in runs_in(array)}
    assert done == {"train", "evaluate"}


# --- size of arrays and tasks


def test_arrays_are_cut_at_the_largest_that_the_cluster_takes(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "seed=range(7)")
    arrays = [a for a in arrays_of(plan(sweep, tmp_path), largest=3) if "train" in a.stages]
    assert [len(array.tasks) for array in arrays] == [3, 3, 1]
    assert [array.after for array in arrays] == [[], [], []]
    assert len({array.name for array in arrays}) == 3


@pytest.mark.parametrize(
    ("largest", "max_array", "sizes"), [(1000, 4, [4, 3]), (2, 4, [2, 2, 2, 1]), (1000, None, [7])]
)
def test_arrays_are_cut_at_what_the_user_asks_for_if_that_is_less(
    tmp_path: Path, largest: int, max_array: int | None, sizes: list[int]
) -> None:
    sweep = expand(*SMALL, SCORED, "seed=range(7)")
    arrays = arrays_of(plan(sweep, tmp_path), config=launcher(max_array=max_array), largest=largest)
    assert [len(array.tasks) for array in arrays if "train" in array.stages] == sizes


def test_what_comes_after_an_array_that_was_cut_waits_for_every_part_that_it_reads(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "method=dpo", "method.init=sft", "seed=range(5)")
    arrays = arrays_of(plan(sweep, tmp_path), largest=2)
    by_id = sweep.by_id()
    made = {run: array.name for array in arrays if "train" in array.stages for run in runs_in(array)}
    for array in (a for a in arrays if "train" in a.stages):
        assert set(array.after) == {made[parent] for run in runs_in(array) for parent in by_id[run].parents}


def test_with_a_throttle_the_parts_of_an_array_run_one_after_the_other(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "seed=range(7)")
    config = launcher(throttle=2, max_array=3)
    first, second, third, baseline = arrays_of(plan(sweep, tmp_path), config=config)
    assert [first.after, second.after, third.after] == [[], [first.name], [second.name]]
    assert baseline.stages == ("evaluate",)
    assert baseline.after == []


def test_a_task_does_several_runs_of_one_base_model(tmp_path: Path) -> None:
    sweep = expand("model=tiny", "dataset=everyday", "train.max_steps=4", SCORED, "peft=lora,qlora", "seed=range(5)")
    by_id = sweep.by_id()
    arrays = arrays_of(plan(sweep, tmp_path), config=launcher(runs_per_task=3))
    tasks = [task for array in arrays if "train" in array.stages for task in array.tasks]
    assert sorted(map(len, tasks)) == [2, 2, 3, 3]
    assert all(len({by_id[run].choices["peft"] for run in task}) == 1 for task in tasks)


# --- what lives


def test_what_a_living_job_is_going_to_do_is_not_planned_again(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED, "seed=0,1")
    one, other = trained(sweep)
    live = {(one.id, "train"): "17", (one.id, "evaluate"): "17"}
    arrays = arrays_of(plan(sweep, tmp_path), live=live)
    assert one.id not in {run for array in arrays for run in runs_in(array)}
    assert other.id in runs_in(arrays[0])
    assert [array.after_jobs for array in arrays] == [[], []]


def test_nothing_is_planned_where_living_jobs_do_everything(tmp_path: Path) -> None:
    sweep = expand(*SMALL, *WRITTEN)
    told = [*STAGES, "judge gpt4", "judge profanity"]
    live = {(run.id, stage): "17" for run in sweep.runs for stage in told}
    assert arrays_of(plan(sweep, tmp_path), live=live) == []


def test_what_reads_the_work_of_a_living_job_waits_for_it(tmp_path: Path) -> None:
    sweep = expand(*SMALL, *WRITTEN, "method=sft,dpo", "method.init=sft")
    parent, child = trained(sweep)
    live = {(parent.id, "train"): "17", (parent.id, "evaluate"): "18", (child.id, "evaluate"): "19"}
    arrays = arrays_of(plan(sweep, tmp_path), live=live)
    (training,) = (array for array in arrays if "train" in array.stages)
    assert (runs_in(training), training.after_jobs) == ([child.id], ["17"])
    for array in (a for a in arrays if a.stages == ("judge",)):
        assert array.after_jobs == ["17", "18", "19"]
        assert training.name in array.after


def test_scores_of_a_run_that_another_sweep_trains_wait_for_its_job(tmp_path: Path) -> None:
    sweep = expand(*SMALL, SCORED)
    (run,) = trained(sweep)
    (scores,) = arrays_of(plan(sweep, tmp_path), live={(run.id, "train"): "17"})
    assert scores.stages == ("evaluate",)
    assert run.id in runs_in(scores)
    assert scores.after_jobs == ["17"]


# --- in general

RULES = (
    rule({"stage": "train"}, gpus=2),
    rule({"stage": "evaluate"}, time="60"),
    rule({"stage": "judge"}, gpus=0),
    rule({"judge": "gpt4"}, partition="login"),
    rule({"method": "dpo"}, mem="64G"),
    rule({"peft": "qlora"}, gpus=3),
    rule({"kind": "merge"}, cpus=2),
    rule({"kind": "baseline"}, cpus=1),
)
STATES = ("nothing", "made", "evaluated", "half judged", "done")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, list[Item]]:
    """A sweep with parents, children, merges, two bases and two judges, of which nothing is there."""
    folder = tmp_path_factory.mktemp("conf")
    sweep = grid(folder, MERGES, *WRITTEN)
    return sweep, order(plan(sweep, folder / "root"))


def in_state(item: Item, state: str) -> Item:
    """The item as it is seen when so much of it is there."""
    found = dataclasses.replace(item)
    if state != "nothing" or item.run.kind == "baseline":
        found.to_make = None
    if state in ("evaluated", "half judged", "done"):
        found.missing = []
    if state == "half judged":
        found.unjudged = [(judgement, why) for judgement, why in item.unjudged if judgement.option == "gpt4"]
    if state == "done":
        found.unjudged = []
    return found


def key_of(stage: str, judge: str | None) -> str:
    """What lives is told apart by judge."""
    return f"{stage} {judge}" if judge else stage


def needed(items: Sequence[Item], live: Live) -> Counter[tuple[str, str, str | None]]:
    """(run, stage, judge) that must be in an array."""
    found: Counter[tuple[str, str, str | None]] = Counter()
    for item in items:
        run = item.run
        wanted: list[tuple[str, str | None]] = [(run.kind, None)] if item.to_make else []
        wanted += [("evaluate", None)] if item.missing else []
        wanted += [("judge", option) for option in {judgement.option for judgement, _ in item.unjudged}]
        found.update((run.id, stage, judge) for stage, judge in wanted if (run.id, key_of(stage, judge)) not in live)
    return found


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_everything_missing_is_in_one_task_and_comes_after_what_it_reads(
    everything: tuple[Sweep, list[Item]], data: st.DataObject
) -> None:
    sweep, fresh = everything
    by_id = sweep.by_id()
    states: dict[str, str] = {}
    for item in fresh:  # a child is never made before its parents
        first = all(states[parent] != "nothing" for parent in item.run.parents)
        states[item.run.id] = data.draw(st.sampled_from(STATES)) if first else "nothing"
    items = [found for item in fresh if not (found := in_state(item, states[item.run.id])).done]
    pairs = sorted({(run, key_of(stage, judge)) for run, stage, judge in needed(items, {})})
    alive = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=12)) if pairs else []
    live = {pair: str(100 + i) for i, pair in enumerate(alive)}
    resources = Resources(gpus=1, rules=data.draw(st.lists(st.sampled_from(RULES), unique_by=id)) or None)
    largest, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    max_array, throttle = data.draw(st.none() | st.integers(1, 9)), data.draw(st.none() | st.integers(1, 3))
    config = launcher(runs_per_task=size, max_array=max_array, throttle=throttle)

    arrays = plan_arrays(items, resources, config, largest, live, STAGES)

    planned: Counter[tuple[str, str, str | None]] = Counter()
    place: dict[tuple[str, str], set[str]] = {}
    for array in arrays:
        judge = array.judges[0] if array.judges else None
        planned.update((run, stage, judge) for run in runs_in(array) for stage in array.stages)
        for run in runs_in(array):
            for stage in array.stages:
                place.setdefault((run, stage), set()).add(array.name)
    assert planned == needed(items, live)

    names = [array.name for array in arrays]
    assert len(set(names)) == len(names)
    for i, array in enumerate(arrays):
        assert set(array.after) <= set(names[:i]), "an array hangs on a later one"
        assert 0 < len(array.tasks) <= min(largest, max_array or largest)
        reads: set[tuple[str, str]] = set()
        for task in array.tasks:
            assert 0 < len(task) <= size
            bases = {(by_id[run].choices["model"], by_id[run].config.peft.base_precision) for run in task}
            assert len(bases) == 1, "a task would load two bases"
        for run in runs_in(array):
            judge = array.judges[0] if array.judges else None
            asked = [allocation(resources, stage, by_id[run], judge) for stage in array.stages]
            assert asked == [array.asked] * len(asked)
            makes = by_id[run].kind in array.stages
            reads |= {(parent, "train") for parent in by_id[run].parents} if makes else {(run, by_id[run].kind)}
            reads |= {(run, "evaluate")} if "judge" in array.stages else set()
        wanted = {name for pair in reads for name in place.get(pair, ())} - {array.name}
        jobs = {live[pair] for pair in reads if pair in live}
        assert set(array.after_jobs) == jobs
        assert wanted <= set(array.after)
        others = set(array.after) - wanted
        assert others <= ({names[i - 1]} if throttle and i else set()), "it waits for what it does not read"
        if {"train", "evaluate"} <= set(array.stages):
            assert not _awaited(items) & set(runs_in(array)), "children would wait for scores"


def _awaited(items: Sequence[Item]) -> set[str]:
    """Runs that others which are to be made start from."""
    return {parent for item in items if item.to_make for parent in item.run.parents}
