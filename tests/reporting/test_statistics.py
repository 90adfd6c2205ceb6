"""Student's interval over seeds, against scipy's."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_align.reporting.statistics import Interval, t_interval


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
