"""Drawing the seeds again: bootstrap-t intervals, and the probability of being on the Pareto front."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from peft_align.reporting.resampling import bootstrap_t, front_probability, on_front, studentized

VALUES = [0.1, 0.4, 0.2, 1.9, 0.6, 0.3, 0.8, 0.5]


def test_the_interval_moves_and_stretches_with_the_values() -> None:
    low, high = bootstrap_t([VALUES]) or (math.nan, math.nan)
    moved = bootstrap_t([[3 * v + 7 for v in VALUES]])
    assert moved == (pytest.approx(3 * low + 7), pytest.approx(3 * high + 7))


def test_it_is_the_same_for_the_same_values() -> None:
    assert bootstrap_t([VALUES]) == bootstrap_t([VALUES])


def test_of_many_normal_values_it_is_close_to_students() -> None:
    values = np.random.default_rng(0).normal(2, 1, 200)
    low, high = bootstrap_t([values.tolist()], draws=20_000) or (0, 0)
    t_low, t_high = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values))
    assert (low, high) == (pytest.approx(t_low, abs=0.01), pytest.approx(t_high, abs=0.01))


def test_of_skewed_values_it_reaches_further_to_the_long_tail() -> None:
    low, high = bootstrap_t([VALUES]) or (0, 0)
    mean = sum(VALUES) / len(VALUES)
    assert high - mean > mean - low


def test_of_cells_it_is_the_interval_of_their_mean() -> None:
    """Shifting one of two cells shifts the mean by half, and the interval's width stays."""
    one = bootstrap_t([VALUES, VALUES]) or (0, 0)
    other = bootstrap_t([VALUES, [v + 10 for v in VALUES]]) or (0, 0)
    assert other == (pytest.approx(one[0] + 5), pytest.approx(one[1] + 5))


def test_cells_of_several_sizes_are_drawn_each_by_itself() -> None:
    found = bootstrap_t([VALUES, VALUES[:5], [v + 3 for v in VALUES]])
    assert found is not None
    mean = (2 * sum(VALUES) / 8 + 3 + sum(VALUES[:5]) / 5) / 3
    assert found[0] < mean < found[1]


@pytest.mark.parametrize("groups", [[], [VALUES, VALUES[:3]], [VALUES[:5]], [[1.0] * 8]], ids=["no", "3", "5", "equal"])
def test_too_few_values_or_equal_ones_have_none(groups: list[list[float]]) -> None:
    assert bootstrap_t(groups) is None


def test_a_draw_without_spread_counts_as_infinitely_far() -> None:
    low, high = studentized(np.array([-1.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0]))
    assert (low, high) == (-math.inf, math.inf)


# --- the front


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_front_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    expected = [not any(all(a >= b for a, b in zip(q, p, strict=True)) and q != p for q in points) for p in points]
    assert on_front(points) == expected


def test_a_cell_far_behind_is_never_on_the_front_and_one_far_ahead_always() -> None:
    rng = np.random.default_rng(0)
    cells = [rng.normal(centre, 0.1, (5, 2)).tolist() for centre in (0, 5, 10)]
    assert front_probability(cells) == [0, 0, 1]


def test_a_trade_off_has_both_ends_on_the_front() -> None:
    rng = np.random.default_rng(0)
    cells = [(rng.normal(0, 0.1, (5, 2)) + centre).tolist() for centre in ([0, 5], [5, 0], [-3, -3])]
    assert front_probability(cells) == [1, 1, 0]


def test_the_probability_is_that_of_the_normal_distribution() -> None:
    """Two cells of equal second measure: the first is better with the probability that its mean is."""
    seeds = np.array([-1.5, -0.5, 0.0, 0.5, 1.5, -1.0, 1.0, -0.2, 0.2, 0.0])
    one = np.stack([seeds, np.ones(10)], axis=1)
    other = np.stack([seeds[::-1] + 0.4, np.ones(10)], axis=1)
    error = math.sqrt(2 * seeds.var(ddof=1) / 10)
    found = front_probability([one.tolist(), other.tolist()], draws=20_000)
    assert found[1] == pytest.approx(stats.norm.cdf(0.4 / error), abs=0.015)
    assert sum(found) == pytest.approx(1, abs=0.01)


def test_measures_of_a_seed_are_drawn_together() -> None:
    """Two cells whose measures make up for each other seed by seed are both on the front in every draw."""
    cells = [[[s, -s] for s in (0.0, 1.0, 2.0, 3.0, 4.0)], [[s + 0.5, -s - 0.5] for s in (0.0, 1.0, 2.0, 3.0, 4.0)]]
    assert front_probability(cells) == [1, 1]


def test_one_seed_stays_where_it_is() -> None:
    assert front_probability([[[1.0, 1.0]], [[0.0, 0.0]]]) == [1, 0]
    assert front_probability([]) == []
