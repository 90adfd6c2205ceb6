"""Intervals and tests over seeds and cells, against scipy, closed forms and worked examples."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_align.reporting.statistics import (
    LEAST_DF,
    Effect,
    Interval,
    Score,
    by_seed,
    holm,
    paired,
    score,
    t_interval,
)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_that_of_scipy(n: int, confidence: float) -> None:
    rng = random.Random(n)
    values = [rng.gauss(0.6, 0.02) for _ in range(n)]
    found = t_interval(values, confidence)
    low, high = stats.t.interval(confidence, n - 1, loc=found.mean, scale=stats.sem(values))
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-12)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-12)
    assert found.seeds == n


def test_a_value_computed_by_hand() -> None:
    # mean 2, s = 1, t(2) at 97.5% = 4.302653 (any printed table), half width = 4.302653 / sqrt(3)
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_no_interval() -> None:
    assert t_interval([0.25]) == Interval(0.25, None, 1)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert t_interval([0.1] * 3) == Interval(pytest.approx(0.1), pytest.approx(0.0, abs=1e-15), 3)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.randoms())
def test_the_order_of_the_seeds_does_not_matter(values: list[float], rng: random.Random) -> None:
    shuffled = rng.sample(values, len(values))
    assert t_interval(shuffled) == t_interval(values)


# --- the score of a cell


def test_one_seed_has_the_error_of_its_items_and_says_so() -> None:
    found = score([0.5], [0.02])
    assert (found.mean, found.basis, found.seeds) == (0.5, "items", 1)
    assert found.high == pytest.approx(0.5 + 1.959964 * 0.02)
    assert found.low == pytest.approx(0.5 - 1.959964 * 0.02)
    assert (found.wide_low, found.wide_high) == (None, None)


def test_one_seed_without_an_item_error_has_no_interval() -> None:
    assert score([0.5], [None]) == Score(0.5, None, None, "", 1, None)


def test_several_seeds_have_the_t_interval_and_item_errors_do_not_narrow_it() -> None:
    values = [0.5, 0.6, 0.7]
    found, plain = score(values, [0.001] * 3), t_interval(values)
    assert found.basis == "seeds"
    assert found.high == pytest.approx(plain.mean + (plain.half_width or 0))
    assert found.low == pytest.approx(plain.mean - (plain.half_width or 0))


def test_the_interval_for_other_items_adds_their_variance_to_that_of_the_seeds() -> None:
    # s² = 0.01, s²/3 = 1/300; items 0.1² = 0.01; together 4/300; df = 2 × ((4/300) / (1/300))² = 32
    found = score([0.5, 0.6, 0.7], [0.1, 0.1, 0.1])
    assert found.items == pytest.approx(0.1)
    half = stats.t.ppf(0.975, 32) * math.sqrt(4 / 300)
    assert (found.wide_low, found.wide_high) == (pytest.approx(0.6 - half), pytest.approx(0.6 + half))


def test_seeds_that_agree_by_chance_still_have_their_items_error() -> None:
    found = score([0.5, 0.5], [0.1, 0.1])
    assert found.low == found.high == 0.5
    assert found.wide_high == pytest.approx(0.5 + 1.959964 * 0.1)


def test_an_item_error_that_is_no_number_is_not_used() -> None:
    assert score([0.5, 0.6], [math.nan, 0.1]).items == pytest.approx(0.1)


# --- paired differences


def test_one_cell_is_students_paired_test() -> None:
    one, other = [0.61, 0.64, 0.59, 0.66, 0.60], [0.55, 0.60, 0.57, 0.58, 0.59]
    found = paired({"cell": [a - b for a, b in zip(one, other, strict=True)]})
    yardstick = stats.ttest_rel(one, other)
    low, high = yardstick.confidence_interval()
    assert (found.p, found.df) == (pytest.approx(yardstick.pvalue), pytest.approx(4))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.basis, found.cells, found.seeds) == ("seeds", 1, (5, 5))


def test_two_cells_are_welchs_test_of_their_sum() -> None:
    # the mean of two cells is half of (one - (-other)): Welch's test of one against minus the other
    one, other = [1.0, 2.0, 4.0], [0.5, 0.0, 3.0, 1.5]
    found = paired({"one": one, "other": other})
    yardstick = stats.ttest_ind(one, [-v for v in other], equal_var=False)
    low, high = yardstick.confidence_interval()
    assert (found.p, found.df) == (pytest.approx(yardstick.pvalue), pytest.approx(yardstick.df))
    assert (found.low, found.high) == (pytest.approx(low / 2), pytest.approx(high / 2))
    assert found.seeds == (3, 4)


def test_cells_may_differ_without_a_wider_interval() -> None:
    """The cells are those that were asked for: their spread is no error."""
    alike, apart = (
        paired({"a": [1.0, 1.2, 0.8], "b": [1.0, 1.2, 0.8]}),
        paired({"a": [1.0, 1.2, 0.8], "b": [9, 9.2, 8.8]}),
    )
    assert (alike.high or 0) - (alike.low or 0) == pytest.approx((apart.high or 0) - (apart.low or 0))


def test_a_cell_with_one_seed_is_given_the_mean_variance_of_the_others() -> None:
    # variances 1 and 4, three seeds each; the third cell has 2.5: (1/3 + 4/3 + 2.5) / 9
    found = paired({"a": [-1.0, 0.0, 1.0], "b": [-2.0, 0.0, 2.0], "c": [3.0]})
    assert found.value == pytest.approx(1.0)
    assert found.error == pytest.approx(math.sqrt((1 / 3 + 4 / 3 + 2.5) / 9))
    # each of the two variances counts 1/3 + 1/2 times
    assert found.df == pytest.approx((5 * 5 / 6) ** 2 / ((5 / 6) ** 2 * (1 / 2 + 16 / 2)))


def test_without_a_second_seed_it_is_students_test_over_the_cells_and_says_so() -> None:
    values = [0.3, 0.1, 0.5, 0.2]
    found = paired({i: [v] for i, v in enumerate(values)})
    yardstick = stats.ttest_1samp(values, 0)
    low, high = yardstick.confidence_interval()
    assert (found.basis, found.df, found.p) == ("cells", 3, pytest.approx(yardstick.pvalue))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_two_seeds_of_two_cells_are_just_enough_whatever_they_scored() -> None:
    assert all(paired({"a": [0.0, 1.0], "b": [0.0, spread]}).p is not None for spread in (0.01, 1.0, 100.0))


@pytest.mark.parametrize("groups", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0]], [[1.0]]], ids=str)
def test_fewer_than_two_degrees_of_freedom_are_not_enough(groups: list[list[float]]) -> None:
    found = paired(dict(enumerate(groups)))
    assert (found.low, found.high, found.p, found.basis) == (None, None, None, "")
    assert found.value == pytest.approx(math.fsum(math.fsum(g) / len(g) for g in groups) / len(groups))
    assert LEAST_DF == 2


def test_no_pairs_are_no_effect() -> None:
    assert paired({}) == paired({"a": []}) == Effect(None, None, None, 0, None, None, "", 0, (0, 0))


def test_differences_without_spread_have_no_p_value_but_are_told_apart_from_too_few() -> None:
    found = paired({"a": [0.25, 0.25, 0.25]})
    assert (found.value, found.p, found.low, found.basis) == (0.25, None, None, "seeds")


def test_a_one_sided_p_value_is_half_of_the_two_sided_one() -> None:
    found = paired({"a": [0.5, 0.7, 0.3, 0.9]})
    assert found.p_above(0.0) == pytest.approx((found.p or 0) / 2)
    assert found.p_above(found.low or 0) == pytest.approx(0.025)
    assert found.p_above(found.high or 0) == pytest.approx(0.975)


def test_one_mean_a_seed_is_students_interval_of_the_means_over_cells() -> None:
    found = by_seed({"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {0: 3.0, 1: 3.0, 2: 3.0, 3: 9.0}})
    assert found == t_interval([2.0, 2.5, 3.5])
    assert by_seed({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 1.0, 1: 2.0}}) is None
    assert by_seed({}) is None


# --- many comparisons


def test_holms_correction_is_that_of_statsmodels() -> None:
    # multipletests([0.01, 0.04, 0.03, 0.005, 0.5], method="holm") of statsmodels 0.15
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])


def test_what_has_no_p_value_does_not_count_for_the_correction() -> None:
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([None]) == [None]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values: list[float]) -> None:
    found = [p for p in holm(values) if p is not None]
    assert all(p <= q <= 1 for p, q in zip(values, found, strict=True))
    by_value = sorted(range(len(values)), key=lambda i: values[i])
    assert [found[i] for i in by_value] == sorted(found)
