"""Contrasts: the language that declares them, and which cells they pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from measured import results
from sweeping import expand, shipped, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.errors import Fault, InputError
from peft_align.grid.runs import Run
from peft_align.reporting.cells import Measure, Results
from peft_align.reporting.contrasts import Contrast, load_comparisons, load_sides, pairs, parse, parts

MMLU = Measure("mmlu", "acc")
TINY = ("model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[mmlu]")
SIDES = {"helpful": ["mmlu", "bbh"], "harmless": ["real_toxicity"]}


def contrast(**node: Any) -> Contrast:
    """A contrast as a file declares it."""
    found: list[Fault] = []
    parsed = parse(shipped(), "mine", node, "mine.yaml: mine", SIDES, found)
    assert parsed is not None, found
    return parsed


def faults(**node: Any) -> list[str]:
    found: list[Fault] = []
    assert parse(shipped(), "mine", node, "mine.yaml: mine", SIDES, found) is None
    return [str(fault) for fault in found]


def of_method(run: Run, benchmark: str, step: int) -> float:
    """Scores by which every pair can be recognised: tenths by method, hundredths by preference, then the seed."""
    choices = run.choices
    tenths = {"sft": 0.1, "dpo": 0.4}[choices["method"]] if run.kind == "train" else 0.0
    hundredths = {"harmless": 0.01, "helpful": 0.02, "mixture": 0.05}[choices["preference"]]
    return tenths + hundredths + run.config.seed / 1000 + step / 100_000


def differences(
    measured: Results, one: Contrast, where: dict[str, list[Any]] | None = None
) -> dict[Any, dict[Any, float]]:
    """By cell and seed, rounded."""
    found = pairs(measured, one, MMLU, one.where | (where or {}))
    return {key: {s: round(p.difference, 6) for s, p in of.items()} for key, of in found.items()}


# --- which cells are a pair


def test_cells_of_a_pair_are_equal_in_all_else_and_in_the_seed() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "preference=harmless,helpful", "seed=0,1,2")
    found = differences(results(sweep, of_method), contrast(cells={"method": "dpo"}, against={"method": "sft"}))
    assert sorted(key[1] for key in found) == ["harmless", "helpful"]
    assert list(found.values()) == [{0: 0.3, 1: 0.3, 2: 0.3}] * 2


def test_what_one_side_lacks_is_no_pair() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "preference=harmless,helpful", "seed=0,1,2")

    def give(run: Run, benchmark: str, step: int) -> float | None:
        lost = (run.choices["method"], run.choices["preference"], run.config.seed)
        return None if lost in {("sft", "harmless", 0), ("dpo", "helpful", 1)} else of_method(run, benchmark, step)

    found = differences(results(sweep, give), contrast(cells={"method": "dpo"}, against={"method": "sft"}))
    assert {key[1]: sorted(of) for key, of in found.items()} == {"harmless": [1, 2], "helpful": [0, 2]}


def test_the_runs_of_a_pair_are_counted_and_no_others() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "seed=0,1")
    measured = results(sweep, lambda run, b, s: None if run.config.seed and run.choices["method"] == "sft" else 0.5)
    found = pairs(measured, contrast(cells={"method": "dpo"}, against={"method": "sft"}), MMLU, {})
    ((pair,),) = [of.values() for of in found.values()]
    expected = {run.id for run in sweep.runs if run.kind == "train" and run.config.seed == 0}
    assert pair.runs == expected


def test_a_further_axis_is_equal_too() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "peft.r=8,16", "seed=0")
    measured = results(sweep, lambda run, b, s: run.config.peft.r / 100 + (run.choices["method"] == "dpo"))
    found = differences(measured, contrast(cells={"method": "dpo"}, against={"method": "sft"}))
    assert list(found.values()) == [{0: 1.0}, {0: 1.0}]


def test_over_a_setting_that_one_side_does_not_have_the_others_mean_counts() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "method.beta=0.1,0.3", "seed=0,1")
    measured = results(sweep, lambda run, b, s: getattr(run.config.method, "beta", 0.0))
    found = differences(measured, contrast(cells={"method": "dpo"}, against={"method": "sft"}))
    assert list(found.values()) == [{0: 0.2, 1: 0.2}]


WHOLE = ("+grid=full", "model=mistral_7b", "dataset=beavertails", "peft=qlora")


def test_in_the_whole_study_methods_are_paired_though_each_has_its_own_rank() -> None:
    sweep = expand(*WHOLE, "seed=0,1")
    scored = [run for run in sweep.runs if run.kind == "train" and "mmlu" in dict(run.scorings[0].benchmarks)]
    assert set(map(_own, scored)) == {("sft", 64), ("dpo", 16)}
    measured = results(sweep, lambda run, b, s: of_method(run, b, s) if run.kind == "train" else None)
    found = differences(measured, contrast(cells={"method": "dpo"}, against={"method": "sft"}))
    assert {key[1]: of for key, of in found.items()} == {
        "harmless": {0: 0.3, 1: 0.3}, "helpful": {0: 0.3, 1: 0.3}, "mixture": {0: 0.3, 1: 0.3}
    }  # fmt: skip
    with_dpo = {"more_with": {"method": "dpo"}, "than_with": {"method": "sft"}}
    one = contrast(cells={"preference": "helpful"}, against={"preference": "harmless"}, **with_dpo)
    assert list(differences(measured, one).values()) == [{0: 0.0, 1: 0.0}]


def test_ranks_that_both_methods_are_to_have_are_not_mixed_while_some_are_missing() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "peft.r=8,16", "seed=0,1")
    there = {("sft", 8), ("dpo", 16)}
    measured = results(sweep, lambda run, b, s: 0.5 if _own(run) in there else None)
    assert differences(measured, contrast(cells={"method": "dpo"}, against={"method": "sft"})) == {}


def pairs_of(words: Sequence[str], there: Callable[[Run], bool], one: Contrast) -> list[dict[Any, float]]:
    """The pairs where the score is the rank in hundredths."""
    measured = results(expand(*TINY, *words), lambda run, b, s: run.config.peft.r / 100 if there(run) else None)
    return list(differences(measured, one).values())


def test_of_several_ranks_on_a_side_none_stands_for_another_whatever_is_there() -> None:
    """Complete or not, in a difference of differences too: a rank is compared with itself, or with nothing."""
    words = ("method=sft,dpo", "preference=harmless,helpful", "peft.r=32,64", "seed=0")
    one = contrast(cells={"method": "dpo"}, against={"method": "sft"})
    two = contrast(cells={"preference": "helpful"}, against={"preference": "harmless"},
                   more_with={"method": "sft"}, than_with={"method": "dpo"})  # fmt: skip
    half = {("sft", "helpful", 32), ("sft", "harmless", 64), ("dpo", "helpful", 64), ("dpo", "harmless", 32)}

    def is_there(run: Run) -> bool:
        return (run.choices.get("method"), run.choices.get("preference"), run.config.peft.r) in half

    for which in (one, two):
        assert pairs_of(words, is_there, which) == []
        assert {value for of in pairs_of(words, lambda run: run.kind == "train", which) for value in of.values()} == {0}


@pytest.mark.parametrize("order", [("search", "test"), ("test", "search")])
def test_a_search_does_not_hide_what_is_planned_on_the_test_split(order: tuple[str, str], tmp_path: Path) -> None:
    both = {"method": ["sft", "dpo"]}
    own = [{"where": {"method": method}, "axes": {"peft.r": [r]}} for method, r in (("sft", 8), ("dpo", 16))]
    scored = {"evaluation.benchmarks": ["preference"]}
    blocks: dict[str, dict[str, Any]] = {
        "search": {"axes": both, "when": own, "set": scored | {"evaluation.heldout_split": "validation"}},
        "test": {"axes": both | {"peft.r": [8, 16]}, "set": scored},
    }
    common = {"model": "tiny", "dataset": "everyday", "peft": "lora", "train.max_steps": 4, "seed": 0}
    grid = {"name": "two", "blocks": [
        {"name": name, **blocks[name], "set": common | blocks[name]["set"]} for name in order]}  # fmt: skip
    write_option(tmp_path, "grid/two", yaml.safe_dump(grid))
    sweep = expand("+grid=two", space=ConfigSpace([tmp_path]))
    measured = results(sweep, lambda run, b, s: 0.5)
    ranks = {v.place["peft.r"] for v in measured.planned["preference"]}
    assert ranks == {8, 16}
    assert len(measured.planned["preference"]) == 4
    assert len(measured.planned["preference/validation"]) == 2


def _own(run: Run) -> tuple[str | None, int]:
    return run.choices.get("method"), run.config.peft.r


def test_a_mean_over_several_values_is_of_all_of_them_or_there_is_none() -> None:
    """The mixture against the mean of both: where the harmless run of a seed is missing, that seed is no pair."""
    words = ("dataset=beavertails", "method=sft", "preference=harmless,helpful,mixture", "seed=0,1")
    sweep = expand("model=tiny", "peft=lora", "evaluation.benchmarks=[mmlu]", *words)

    def give(run: Run, benchmark: str, step: int) -> float | None:
        lost = run.choices["preference"] == "harmless" and run.config.seed == 1
        return None if lost else of_method(run, benchmark, 0)

    single = contrast(cells={"preference": "mixture"}, against={"preference": ["harmless", "helpful"]})
    assert list(differences(results(sweep, give), single).values()) == [{0: 0.035}]


def test_models_are_paired_with_what_they_were_tuned_from() -> None:
    words = ("model=llama_7b,vicuna_7b,mistral_7b,mistral_7b_instruct", "dataset=everyday", "peft=lora", "seed=0")
    sweep = expand(*words, "evaluation.benchmarks=[mmlu]")
    level = {"llama_7b": 0.1, "vicuna_7b": 0.15, "mistral_7b": 0.5, "mistral_7b_instruct": 0.7}
    measured = results(sweep, lambda run, b, s: level[run.choices["model"]])
    one = contrast(cells={"model.instruction_tuned": True}, against={"model.instruction_tuned": False})
    found = differences(measured, one)
    assert sorted(of[0] for of in found.values()) == [0.05, 0.2]


def test_the_last_step_counts_unless_steps_are_named(tmp_path: Path) -> None:
    sweep = expand(*TINY, "train.checkpoint_steps=[1,2,4]", "method=sft,dpo", "seed=0,1")
    measured = results(sweep, of_method)
    by_method = differences(measured, contrast(cells={"method": "dpo"}, against={"method": "sft"}))
    assert list(by_method.values()) == [{0: 0.3, 1: 0.3}]
    by_step = differences(measured, contrast(cells={"step": "last"}, against={"step": "first"}))
    assert list(by_step.values()) == [{0: 0.00003, 1: 0.00003}] * 2
    named = differences(measured, contrast(cells={"step": 2}, against={"step": 1}, where={"method": "sft"}))
    assert list(named.values()) == [{0: 0.00001, 1: 0.00001}]


def test_the_last_step_is_the_last_that_was_asked_for_not_the_last_that_is_there() -> None:
    sweep = expand(*TINY, "train.checkpoint_steps=[1,2,4]", "method=sft,dpo", "seed=0")
    unfinished = results(sweep, lambda run, b, s: None if s == 4 and run.choices["method"] == "dpo" else 0.5)
    assert differences(unfinished, contrast(cells={"method": "dpo"}, against={"method": "sft"})) == {}


def test_one_step_is_not_first_and_last_at_once() -> None:
    sweep = expand(*TINY, "seed=0,1")
    assert differences(results(sweep, of_method), contrast(cells={"step": "last"}, against={"step": "first"})) == {}


def test_runs_are_set_against_their_own_unaligned_base() -> None:
    sweep = expand(*[w for w in TINY if w != "peft=lora"], "peft=lora,qlora", "method=sft,dpo", "seed=0,1")
    level = {"bf16": 0.2, "nf4": 0.3}
    measured = results(sweep, lambda run, b, s: level[run.base] if run.kind == "baseline" else 0.5)
    found = differences(measured, contrast(cells={"method": "dpo"}, against="baseline"))
    assert {key[3:5]: of for key, of in found.items()} == {
        ("tiny", "lora"): {0: 0.3, 1: 0.3},
        ("tiny", "qlora"): {0: 0.2, 1: 0.2},
    }


MERGES = """
blocks:
  - name: trained
    axes: {method: [sft, dpo], preference: [harmless, helpful], seed: [0, 1]}
    set: &own {model: tiny, dataset: beavertails, peft: qlora, evaluation.benchmarks: [mmlu]}
  - name: merges
    kind: merge
    axes: {merge: [slerp], seed: [0, 1]}
    inputs:
      - [{method: sft, preference: harmless}, {method: sft, preference: helpful}]
    set: *own
"""


@pytest.mark.parametrize(("against", "difference"), [("parents", 0.885), ("best_parent", 0.88)])
def test_merges_are_set_against_their_inputs(tmp_path: Path, against: str, difference: float) -> None:
    write_option(tmp_path, "grid/mine", MERGES)
    sweep = expand("+grid=mine", space=ConfigSpace([tmp_path]))
    seed = lambda run: run.config.seed / 1000  # noqa: E731
    measured = results(sweep, lambda run, b, s: 1 + seed(run) if run.kind == "merge" else of_method(run, b, 0))
    found = differences(measured, contrast(cells={"kind": "merge"}, against=against))
    assert list(found.values()) == [{0: difference, 1: difference}]
    chosen = {"merge": "slerp", "inputs": "sft_harmless+sft_helpful"}
    assert differences(measured, contrast(cells=chosen, against=against)) == found
    assert differences(measured, contrast(cells={"merge": "dare_ties"}, against=against)) == {}


def test_a_merge_of_which_an_input_is_missing_is_no_pair(tmp_path: Path) -> None:
    write_option(tmp_path, "grid/mine", MERGES)
    sweep = expand("+grid=mine", space=ConfigSpace([tmp_path]))
    lost = next(run.id for run in sweep.runs if run.kind == "train" and run.choices["method"] == "sft")
    measured = results(sweep, lambda run, b, s: None if run.id == lost else 0.5)
    (of,) = differences(measured, contrast(cells={"kind": "merge"}, against="parents")).values()
    assert len(of) == 1


def test_an_interaction_is_the_difference_of_two_effects_of_the_same_seed() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "preference=harmless,helpful", "seed=0,1")

    def give(run: Run, benchmark: str, step: int) -> float:
        more = run.choices["method"] == "dpo" and run.choices["preference"] == "helpful"
        return of_method(run, benchmark, step) + more * (0.07 + run.config.seed / 100)

    one = contrast(
        cells={"preference": "helpful"},
        against={"preference": "harmless"},
        more_with={"method": "dpo"},
        than_with={"method": "sft"},
    )
    (of,) = differences(results(sweep, give), one).values()
    assert of == {0: 0.07, 1: 0.08}


def test_each_value_of_an_axis_is_a_part_of_its_own() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "preference=harmless,helpful", "seed=0,1")
    one = contrast(cells={"preference": "helpful"}, against={"preference": "harmless"}, each=["method"])
    found = list(parts(results(sweep, of_method), one, MMLU))
    assert [part for part, _ in found] == [{"method": ["sft"]}, {"method": ["dpo"]}]
    assert [len(of) for _, of in found] == [1, 1]


def test_a_setting_that_is_no_axis_can_be_named() -> None:
    sweep = expand(*TINY, "method=sft,dpo", "seed=0")
    measured = results(sweep, of_method, asked=["peft.r"])
    rank = {run.choices["method"]: run.config.peft.r for run in sweep.runs if run.kind == "train"}
    one = contrast(cells={"method": "dpo"}, against={"method": "sft"})
    assert differences(measured, one, {"peft.r": [3]}) == {}
    by_rank = contrast(cells={"peft.r": rank["dpo"]}, against={"peft.r": rank["sft"]})
    assert differences(measured, by_rank) == {}  # the methods differ, and are not named


def test_validation_scores_and_values_that_are_no_numbers_are_left_out() -> None:
    sweep = expand(*[w for w in TINY if "benchmarks" not in w], "seed=0,1", "evaluation.benchmarks=[mmlu]")
    measured = results(sweep, lambda run, b, s: float("nan") if run.config.seed else 0.5)
    assert [v.value for v in measured.values[MMLU] if v.place["kind"] == "train"] == [0.5]
    assert measured.dropped == 1


# --- the language


@pytest.mark.parametrize(
    ("node", "where", "told"),
    [
        ({}, "mine.yaml: mine.cells", "is missing"),
        ({"cells": {"methd": "dpo"}}, "mine.cells.methd", "did you mean 'method'?"),
        ({"cells": {"method": "dppo"}}, "mine.cells.method", "did you mean 'dpo'?"),
        ({"cells": {"peft.r": "many"}}, "mine.cells.peft.r", "whole number"),
        ({"cells": ["dpo"]}, "mine.cells", "a mapping is expected"),
        ({"against": "parent"}, "mine.against", "did you mean 'parents'?"),
        ({"against": {"method": "dpo"}}, "mine.against", "the same as cells"),
        ({"aginst": {}}, "mine.aginst", "did you mean 'against'?"),
        ({"benchmarks": ["mmul"]}, "mine.benchmarks", "did you mean 'mmlu'?"),
        ({"benchmarks": [3]}, "mine.benchmarks", "name of a benchmark"),
        ({"expect": "beter"}, "mine.expect", "did you mean 'better'?"),
        ({"expect": "alike"}, "mine.benchmarks", "needs a margin"),
        ({"expect": "alike", "benchmarks": "mmlu"}, "mine.margin.mmlu", "is missing"),
        ({"expect": "alike", "benchmarks": "mmlu", "margin": {"mmlu": 0}}, "mine.margin.mmlu", "no number above 0"),
        ({"expect": "alike", "benchmarks": "mmlu", "margin": {"mmlu": 1, "bbh": 1}}, "mine.margin.bbh", "not among"),
        ({"expect": "alike", "benchmarks": "mmlu", "margin": 1}, "mine.margin", "a mapping"),
        ({"expect": "better", "benchmarks": "mmlu", "margin": {"mmlu": 1}}, "mine.margin", "may differ a little"),
        ({"more_with": {"peft": "lora"}}, "mine.than_with", "belong together"),
        ({"each": ["metod"]}, "mine.each", "did you mean 'method'?"),
        ({"cells": {"step": "lst"}}, "mine.cells.step", "first, last or a whole number"),
        ({"cells": {"kind": "marge"}}, "mine.cells.kind", "did you mean 'merge'?"),
    ],
    ids=str,
)
def test_a_fault_of_a_contrast_is_told_with_place_and_remedy(node: dict[str, Any], where: str, told: str) -> None:
    base = {} if not node else {"cells": {"method": "dpo"}, "against": {"method": "sft"}}
    found = faults(**(base | node))
    assert any(where in fault and told in fault for fault in found), found


def test_all_faults_of_all_files_are_told_together(tmp_path: Path) -> None:
    write_option(tmp_path, "report/comparisons/mine", "one: {cells: {methd: dpo}, against: parents}\ntwo: 3")
    write_option(tmp_path, "report/comparisons/more", "DPO against SFT: {cells: {method: dpo}, against: parents}")
    with pytest.raises(InputError) as caught:
        load_comparisons(ConfigSpace([tmp_path]))
    text = caught.value.render()
    for message in ("mine.yaml: one.cells.methd", "mine.yaml: two: a mapping", "comparison of this name already"):
        assert message in text, text


def test_a_side_of_ones_own_is_added_and_one_of_the_same_name_replaced(tmp_path: Path) -> None:
    write_option(tmp_path, "report/sides", "harmless: [over_refusal]\nhonest: [truthfulqa]")
    dirs = ConfigSpace([tmp_path]).dirs
    assert load_sides(dirs) == load_sides(dirs[:1]) | {"harmless": ["over_refusal"], "honest": ["truthfulqa"]}
    write_option(tmp_path, "report/sides", "harmless: real_toxicity")
    with pytest.raises(InputError, match="a list of benchmarks"):
        load_sides(dirs)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"cells": {"method": "dpo"}, "against": {"method": "sft"}}, "method=dpo against sft"),
        ({"cells": {"preference": "mixture"}, "against": {"preference": ["harmless", "helpful"]}},
         "preference=mixture against harmless,helpful"),
        ({"cells": {"step": "last"}, "against": "baseline", "where": {"method": "sft"}},
         "step=last against baseline where method=sft"),
        ({"cells": {"method": "dpo", "peft": "lora"}, "against": {"method": "sft", "peft": "qlora"}},
         "method=dpo peft=lora against method=sft peft=qlora"),
        ({"cells": {"method": "dpo"}, "against": {"method": "sft"}, "more_with": {"peft": "lora"},
          "than_with": {"peft": "qlora"}}, "method=dpo against sft, more with peft=lora than with qlora"),
    ],
)  # fmt: skip
def test_a_contrast_names_an_axis_once_where_both_sides_are_values_of_it(node: dict[str, Any], words: str) -> None:
    assert str(contrast(**node)) == words


def test_benchmarks_are_named_by_side_by_name_or_with_a_metric() -> None:
    found = contrast(cells={"method": "dpo"}, against={"method": "sft"}, benchmarks=["helpful", "red_instruct.safety"])
    assert found.benchmarks == (("mmlu", None), ("bbh", None), ("red_instruct", "safety"))
