"""Paired comparisons: effects, their three intervals, what they rest on, and what is said where there is too little."""

from __future__ import annotations

import math

import pytest
from measured import noise, results
from sweeping import expand, shipped

from peft_align.grid.runs import Run
from peft_align.reporting.cells import Measure, Results
from peft_align.reporting.comparisons import COLUMNS, Compared, compare, comparison_rows, comparisons
from peft_align.reporting.contrasts import Contrast, load_comparisons, pairs
from peft_align.reporting.findings import comparison_sentence
from peft_align.reporting.statistics import paired

MMLU = Measure("mmlu", "acc")
WORDS = ("dataset=beavertails", "model=tiny", "peft=lora", "evaluation.benchmarks=[mmlu,bbh]")


def study(seeds: int, effect: float, preferences: str = "harmless,helpful") -> Results:
    """SFT and DPO, on which MMLU differs by an effect and BBH does not."""
    seed = f"seed=range(0,{seeds})" if seeds > 1 else "seed=0"
    sweep = expand(*WORDS, "method=sft,dpo", f"preference={preferences}", seed)

    def give(run: Run, benchmark: str, step: int) -> float:
        better = benchmark == "mmlu" and run.kind == "train" and run.choices["method"] == "dpo"
        return 0.5 + better * effect + noise(run, benchmark, spread=0.01)

    return results(sweep, give)


def compared(measured: Results) -> dict[tuple[str, str], Compared]:
    found = comparisons(measured, load_comparisons(shipped()))
    return {(one.contrast.name, one.measure.benchmark): one for one in found}


def test_an_effect_is_found_with_what_it_rests_on() -> None:
    found = compared(study(5, 0.05))
    mmlu, bbh = found["DPO against SFT", "mmlu"], found["DPO against SFT", "bbh"]
    assert (mmlu.result, bbh.result) == ("higher", "no difference shown")
    assert (mmlu.effect.cells, mmlu.effect.seeds, mmlu.runs) == (2, (5, 5), 20)
    assert mmlu.effect.low is not None
    assert mmlu.effect.low < 0.05 < (mmlu.effect.high or 0)
    assert mmlu.doubts() == []


def test_p_is_corrected_for_all_comparisons_that_could_be_tested() -> None:
    found = compared(study(5, 0.05))
    tested = [one for one in found.values() if one.effect.p is not None]
    assert len(tested) == 2
    smallest = min(tested, key=lambda one: one.effect.p or 1)
    assert smallest.p_holm == pytest.approx(2 * (smallest.effect.p or 0))


def test_what_the_sweep_does_not_have_has_not_enough_runs() -> None:
    found = compared(study(5, 0.05))
    one = found["QLoRA against LoRA", "mmlu"]
    assert (one.result, one.runs, one.effect.value, one.p_holm) == ("not enough runs", 0, None, None)


def test_one_seed_of_two_cells_is_not_enough_and_of_three_is_told_over_the_cells() -> None:
    two, three = study(1, 0.05), study(1, 0.05, "harmless,helpful,mixture")
    assert compared(two)["DPO against SFT", "mmlu"].result == "not enough runs"
    one = compared(three)["DPO against SFT", "mmlu"]
    assert (one.effect.basis, one.effect.df, one.by_seed) == ("cells", 2, None)
    assert "no second seed" in comparison_sentence(one)
    assert "interval over the cells" in comparison_sentence(one)


def test_the_two_other_intervals_are_given_and_agree_where_all_is_well() -> None:
    one = compared(study(5, 0.05))["DPO against SFT", "mmlu"]
    low, high = one.seed_bounds() or (math.nan, math.nan)
    assert low < 0.05 < high
    assert one.bootstrap is not None
    assert one.bootstrap[0] < 0.05 < one.bootstrap[1]


def test_a_difference_that_one_mean_a_seed_does_not_show_is_told_with_that_doubt() -> None:
    """A seed that moves all cells alike: over cells and seeds it looks sure, over five seeds it is not."""
    sweep = expand(
        *WORDS, "method=sft,dpo", "preference=harmless,helpful,mixture", "train.max_steps=4,8,16", "seed=range(0,5)"
    )
    moved = [0.11, -0.05, 0.07, -0.02, 0.07]

    def give(run: Run, benchmark: str, step: int) -> float:
        is_dpo = run.kind == "train" and run.choices["method"] == "dpo"
        return 0.5 + is_dpo * moved[run.config.seed] + noise(run, benchmark, spread=0.001)

    one = compared(results(sweep, give))["DPO against SFT", "mmlu"]
    assert one.result == "higher"
    assert "one mean a seed" in one.doubts()
    assert "but by one mean a seed" in comparison_sentence(one)


def test_equal_differences_have_no_error_and_are_not_called_significant() -> None:
    sweep = expand(*WORDS, "method=sft,dpo", "preference=harmless", "seed=0,1,2")
    measured = results(sweep, lambda run, b, s: 0.75 if run.choices["method"] == "dpo" else 0.5)
    one = compared(measured)["DPO against SFT", "mmlu"]
    assert one.result == "no spread"
    assert "+0.25 whatever the seed, so that its error is not known" in comparison_sentence(one)
    alone = expand(*WORDS, "method=sft,dpo", "preference=harmless,helpful,mixture", "seed=0")
    (one,) = compare(
        results(alone, lambda run, b, s: 0.75 if run.choices["method"] == "dpo" else 0.5), one.contrast, [MMLU]
    )
    assert "+0.25 in every pair, so that its error is not known" in comparison_sentence(one)


def test_a_lower_score_is_told_as_worse_only_where_higher_is_better() -> None:
    found = study(5, -0.05)
    one = compared(found)["DPO against SFT", "mmlu"]
    assert "lower (worse) by 0.0" in comparison_sentence(one)
    found.better = dict.fromkeys(found.better, False)
    assert "lower (better) by 0.0" in comparison_sentence(compared(found)["DPO against SFT", "mmlu"])


def test_two_judges_are_two_comparisons() -> None:
    sweep = expand(*WORDS, "method=sft,dpo", "seed=0,1,2")
    judges = {"mmlu": ["one/judge", "other/judge"]}
    found = comparisons(results(sweep, lambda run, b, s: noise(run), judges=judges), load_comparisons(shipped()))
    told = [one.measure.judge for one in found if one.contrast.name == "DPO against SFT"]
    assert told == ["one/judge", "other/judge", None]


def test_rows_have_the_columns_of_the_file() -> None:
    rows = comparison_rows(list(compared(study(5, 0.05)).values()))
    assert all(set(row) == set(COLUMNS) for row in rows)
    row = next(row for row in rows if row["comparison"] == "DPO against SFT" and row["benchmark"] == "mmlu")
    assert row["contrast"] == "method=dpo against sft"
    assert (row["interval_over"], row["cells"], row["seeds_min"], row["runs"]) == ("seeds", 2, 5, 20)


def test_a_third_of_the_runs_missing_changes_what_it_rests_on_and_biases_nothing() -> None:
    """Of cells with very different levels, only pairs count: which runs are missing does not show as an effect."""
    sweep = expand(*WORDS, "method=sft,dpo", "preference=harmless,helpful,mixture", "seed=range(0,6)")
    level = {"harmless": 0.0, "helpful": 5.0, "mixture": 10.0}

    def give(run: Run, benchmark: str, step: int) -> float | None:
        easy = run.choices["preference"] != "mixture"
        if run.kind == "train" and run.choices["method"] == "dpo" and easy and run.config.seed % 2:
            return None
        return level[run.choices["preference"]] + noise(run, spread=0.1)

    one = compared(results(sweep, give))["DPO against SFT", "mmlu"]
    assert (one.effect.cells, one.effect.seeds, one.runs) == (3, (3, 6), 24)
    assert abs(one.effect.value or 9) < 0.2


def test_against_an_unaligned_base_its_own_item_error_counts_once_for_all_that_share_it() -> None:
    """One base of two cells, its item error 0.01: the cells' spread is divided by their number, that is not."""
    sweep = expand(*WORDS, "method=sft", "preference=harmless,helpful", "seed=range(0,5)")
    measured = results(sweep, lambda run, b, s: 0.4 if run.kind == "baseline" else 0.5 + noise(run, b, spread=0.001))
    one = Contrast("aligned", {"method": ["sft"]}, "baseline")
    (mmlu, _) = compare(measured, one)
    found = pairs(measured, one, mmlu.measure, {})
    groups = {key: [pair.difference for pair in of.values()] for key, of in found.items()}
    without = paired(groups)
    assert (mmlu.effect.error or 0) ** 2 == pytest.approx((without.error or 0) ** 2 + 0.01**2)
    assert mmlu.effect.df > 1000 * without.df
    assert (mmlu.by_seed, mmlu.bootstrap) == (None, None)


def test_what_each_side_has_of_its_own_is_told() -> None:
    sweep = expand("+grid=full", "model=mistral_7b", "dataset=beavertails", "peft=qlora", "seed=0,1")
    found = comparisons(results(sweep, lambda run, b, s: noise(run)), load_comparisons(shipped()))
    of_methods = [one for one in found if one.contrast.name == "DPO against SFT" and one.measure.benchmark == "mmlu"]
    assert [row["own_settings"] for row in comparison_rows(of_methods)] == ["peft.alpha peft.r"]
    assert "12 runs, each side with its own peft.alpha and peft.r)" in comparison_sentence(of_methods[0])
    others = {row["own_settings"] for row in comparison_rows(found) if row["comparison"] != "DPO against SFT"}
    assert others == {None}
