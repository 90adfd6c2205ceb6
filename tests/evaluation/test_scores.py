"""Means, their standard errors, and the bounds of rates whose items all agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sweeping import shipped

from peft_align.evaluation.alpaca_eval import data
from peft_align.evaluation.scores import clustered_error, mean_metric, rate_metric, zero_event_bound
from peft_align.grid.benchmarks import find_benchmark

VALUES = [0.5, 2.0, -1.0, 4.25, 4.25, 0.0, 3.0]
NUMBERS = st.floats(-1e3, 1e3)
ITEMS = st.lists(st.tuples(NUMBERS, st.integers(0, 5)), min_size=2, max_size=30)


def plain_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def test_the_error_of_clusters_of_one_is_that_of_the_items() -> None:
    assert clustered_error(VALUES, range(7)) == pytest.approx(plain_error(VALUES), rel=1e-12)
    plain, clustered = mean_metric("m", VALUES, True), mean_metric("m", VALUES, True, clusters="abcdefg")
    assert plain.stderr == pytest.approx(plain_error(VALUES), rel=1e-12)
    assert clustered.stderr == pytest.approx(plain.stderr, rel=1e-12)
    assert (clustered.value, clustered.n) == (plain.value, 7)


@pytest.mark.parametrize("copies", [2, 5])
def test_identical_items_in_clusters_of_one_size_tell_as_much_as_one_of_them(copies: int) -> None:
    repeated = [value for value in VALUES for _ in range(copies)]
    clusters = [i for i in range(7) for _ in range(copies)]
    metric = mean_metric("m", repeated, True, clusters=clusters)
    assert metric.stderr == pytest.approx(plain_error(VALUES), rel=1e-12)
    assert metric.stderr is not None
    assert metric.stderr > 1.3 * plain_error(repeated)
    assert (metric.value, metric.n) == (pytest.approx(statistics.mean(VALUES)), 7 * copies)


def test_clusters_of_one_size_have_the_error_of_their_means() -> None:
    values = [1.0, 3.0, -2.0, 5.0, 0.5, 0.25, 7.0, 1.0]
    means = [2.0, 1.5, 0.375, 4.0]
    assert clustered_error(values, [0, 0, 1, 1, 2, 2, 3, 3]) == pytest.approx(plain_error(means), rel=1e-12)


def test_the_error_of_uneven_clusters_is_the_formulas() -> None:
    values, clusters = [1.0, 2.0, 6.0, 3.0], ["a", "a", "b", "a"]  # mean 3: deviations -2 -1 0 of a, 3 of b
    assert clustered_error(values, clusters) == pytest.approx(math.sqrt((9 + 9) * 2 / 1) / 4)


def test_a_single_cluster_or_item_has_no_error() -> None:
    assert clustered_error(VALUES, ["a"] * 7) is None
    assert mean_metric("m", VALUES, True, clusters=["a"] * 7).stderr is None
    assert mean_metric("m", [2.0], True).stderr is None
    assert rate_metric("m", [True, False], True, clusters=["a", "a"]).stderr is None


def test_every_item_belongs_to_a_cluster() -> None:
    with pytest.raises(ValueError, match="argument"):
        clustered_error(VALUES, range(6))


@settings(deadline=None)
@given(items=ITEMS, order=st.randoms(use_true_random=False))
def test_the_error_does_not_depend_on_names_and_order_of_the_clusters(
    items: list[tuple[float, int]], order: object
) -> None:
    values, clusters = zip(*items, strict=True)
    expected = clustered_error(values, clusters)
    shuffled = list(items)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert clustered_error(values, [f"cluster {7 - c}" for c in clusters]) == expected
    found = clustered_error([v for v, _ in shuffled], [c for _, c in shuffled])
    assert (found is None) == (expected is None) == (len(set(clusters)) == 1)
    if expected is not None:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(items=ITEMS, factor=st.floats(0.01, 100), shift=NUMBERS)
def test_the_error_scales_with_the_values_and_does_not_move_with_them(
    items: list[tuple[float, int]], factor: float, shift: float
) -> None:
    values, clusters = zip(*items, strict=True)
    expected = clustered_error(values, clusters)
    found = clustered_error([factor * v + shift for v in values], clusters)
    if expected is not None:
        assert found == pytest.approx(factor * expected, rel=1e-6, abs=1e-6)
        scaled = mean_metric("m", values, None, clusters=clusters, scale=factor)
        assert scaled.stderr == pytest.approx(factor * expected, rel=1e-9)
        assert scaled.value == pytest.approx(factor * math.fsum(values) / len(values), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(values=st.lists(NUMBERS, min_size=2, max_size=30))
def test_clusters_of_one_have_the_plain_error_whatever_the_values(values: list[float]) -> None:
    assert clustered_error(values, range(len(values))) == pytest.approx(plain_error(values), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 10, 200, 805])
def test_no_event_in_n_items_leaves_room_for_the_rate_at_which_that_has_five_percent(n: int) -> None:
    bound = 1 - 0.05 ** (1 / n)
    none, every = rate_metric("r", [False] * n, False), rate_metric("r", [True] * n, False)
    assert none.bound == pytest.approx(bound, rel=1e-9)
    assert none.value == 0
    assert every.bound == pytest.approx(1 - bound, rel=1e-9)
    assert every.value == 1
    assert (1 - bound) ** n == pytest.approx(0.05)
    exact = binomtest(0, n, alternative="less").proportion_ci(0.95, method="exact")
    assert none.bound == pytest.approx(exact.high, rel=1e-9)
    if n > 1:
        assert (none.stderr, every.stderr) == (0, 0)


def test_the_bound_is_about_three_in_n() -> None:
    assert 200 * zero_event_bound(200) == pytest.approx(3, rel=0.02)


def test_the_bound_of_clusters_counts_clusters() -> None:
    clusters = [i // 4 for i in range(40)]
    none = rate_metric("r", [False] * 40, False, clusters=clusters, scale=100)
    assert none.bound == pytest.approx(100 * (1 - 0.05 ** (1 / 10)), rel=1e-9)
    assert none.n == 40
    every = rate_metric("r", [True] * 40, True, clusters=clusters, scale=100)
    assert (every.value, every.bound) == (100, pytest.approx(100 * 0.05 ** (1 / 10), rel=1e-9))


@pytest.mark.parametrize("clusters", [None, [0, 0, 1, 1]])
def test_a_rate_between_none_and_all_has_an_error_and_no_bound(clusters: list[int] | None) -> None:
    metric = rate_metric("r", [True, False, False, False], None, clusters=clusters, scale=100)
    assert (metric.value, metric.bound, metric.n, metric.higher_is_better) == (25, None, 4, None)
    assert metric.stderr == pytest.approx(25)  # of clusters too: their means are 1/2 and 0
    assert mean_metric("m", [0.0, 0.0], True).bound is None


def test_questions_of_one_kind_are_clusters_of_the_real_data(mirror: Path) -> None:
    benchmark = find_benchmark(shipped(), "alpaca_eval", None, {}, [])
    questions = data(benchmark, str(mirror)).questions  # type: ignore[arg-type]
    lengths = [float(len(question.more["reference_output"])) for question in questions]
    kinds = [question.more["reference_dataset"] for question in questions]
    assert len(set(kinds)) == 5
    mean = statistics.fmean(lengths)
    sums = [sum(v - mean for v, k in zip(lengths, kinds, strict=True) if k == kind) for kind in sorted(set(kinds))]
    expected = math.sqrt(5 / 4 * sum(s * s for s in sums)) / len(lengths)
    assert clustered_error(lengths, kinds) == pytest.approx(expected)
    assert expected > 2 * plain_error(lengths)  # instructions of one source are alike
