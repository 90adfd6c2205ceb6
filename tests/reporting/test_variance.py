"""Shares of the variance, against textbook sums and statsmodels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from peft_align.reporting.variance import OTHER, SEEDS, Share, shares

# of methods, models and scores, unequally many
UNBALANCED = [
    *[("sft", "a", 1.0), ("sft", "a", 1.3), ("sft", "a", 0.8), ("sft", "b", 2.1), ("sft", "b", 2.6), ("sft", "c", 1.9)],
    *[("dpo", "a", 1.7), ("dpo", "b", 2.2), ("dpo", "b", 2.9), ("dpo", "b", 2.4), ("dpo", "c", 3.6), ("dpo", "c", 3.1)],
]


def by_term(found: list[Share]) -> dict[str, Share]:
    return {share.term: share for share in found}


def balanced(seeds: int, *axes: int) -> tuple[list[dict[str, Any]], list[float]]:
    """A table with every combination of levels, with effects and noise."""
    rng = np.random.default_rng(len(axes))
    names = [f"axis{i}" for i in range(len(axes))]
    effects = [rng.normal(0, 1, n) for n in axes]
    places, values = [], []
    for levels in itertools.product(*map(range, axes)):
        for _ in range(seeds):
            places.append(dict(zip(names, levels, strict=True)))
            mean = sum(effect[level] for effect, level in zip(effects, levels, strict=True))
            values.append(float(mean + math.prod(levels) + rng.normal(0, 0.5)))
    return places, values


def test_a_balanced_table_is_the_textbooks_analysis() -> None:
    places, values = balanced(3, 2, 4)
    found = by_term(shares(places, values, ["axis0", "axis1"]))
    y = np.array(values).reshape(2, 4, 3)
    mean = y.mean()
    squares = {
        "axis0": 12 * ((y.mean(axis=(1, 2)) - mean) ** 2).sum(),
        "axis1": 6 * ((y.mean(axis=(0, 2)) - mean) ** 2).sum(),
        SEEDS: ((y - y.mean(axis=2, keepdims=True)) ** 2).sum(),
    }
    squares["axis0 × axis1"] = 3 * ((y.mean(axis=2) - mean) ** 2).sum() - squares["axis0"] - squares["axis1"]
    assert {term: share.squares for term, share in found.items()} == pytest.approx(squares)
    assert {term: share.df for term, share in found.items()} == {"axis0": 1, "axis1": 3, "axis0 × axis1": 3, SEEDS: 16}
    assert sum(share.share for share in found.values()) == pytest.approx(1)
    assert {share.runs for share in found.values()} == {24}


def test_an_unbalanced_table_is_statsmodels_type_ii() -> None:
    # anova_lm(ols("y ~ C(method) * C(model)", data).fit(), typ=2) of statsmodels 0.15
    found = shares(
        [{"method": a, "model": b} for a, b, _ in UNBALANCED], [y for *_, y in UNBALANCED], ["method", "model"]
    )
    assert [(share.term, share.df) for share in found] == [
        ("method", 1),
        ("model", 2),
        ("method × model", 2),
        (SEEDS, 6),
    ]
    expected = [1.036246285, 3.400912951, 0.725753715, 0.636666667]
    assert [share.squares for share in found] == pytest.approx(expected, abs=1e-8)
    assert [share.f for share in found[:3]] == pytest.approx([9.765671791, 16.025244273, 3.419781905])
    assert [share.p for share in found[:3]] == pytest.approx([0.020454116, 0.003920785, 0.102047634], abs=1e-8)
    assert (found[3].f, found[3].p) == (None, None)


def test_what_three_axes_do_together_is_told_by_itself() -> None:
    places, values = balanced(2, 2, 3, 2)
    found = by_term(shares(places, values, ["axis0", "axis1", "axis2"]))
    assert (found[OTHER].df, found[SEEDS].df) == (2, 12)
    assert sum(share.share for share in found.values()) == pytest.approx(1)


def test_without_seeds_there_is_no_test() -> None:
    places, values = balanced(1, 3, 3)
    found = shares(places, values, ["axis0", "axis1"])
    assert [share.term for share in found] == ["axis0", "axis1", "axis0 × axis1"]
    assert {share.p for share in found} == {None}


def test_of_two_axes_that_tell_the_same_the_first_stands_for_both() -> None:
    places = [{"method": m, "peft.r": r} for m, r in (("sft", 64), ("dpo", 16)) for _ in range(3)]
    found = shares(places, [1.0, 1.1, 0.9, 2.0, 2.1, 1.9], ["method", "peft.r"])
    assert [(share.term, share.df) for share in found] == [("method", 1), (SEEDS, 4)]
    assert [share.share for share in found] == pytest.approx([1.5 / 1.54, 0.04 / 1.54])


def test_ranks_that_only_one_method_has_leave_the_method_its_share() -> None:
    """A nested table: between methods, and between ranks within each method."""
    ranks = (("sft", 32), ("sft", 64), ("dpo", 8), ("dpo", 16))
    places = [{"method": m, "peft.r": r} for m, r in ranks for _ in range(2)]
    found = shares(places, [1.0, 1.2, 2.0, 2.2, 5.0, 5.2, 7.0, 7.2], ["method", "peft.r"])
    assert [(share.term, share.df) for share in found] == [("method", 1), ("peft.r", 2), (SEEDS, 4)]
    # means 1.1, 2.1, 5.1, 7.1: methods 1.6 and 6.1
    assert [share.squares for share in found] == pytest.approx([8 * 2.25**2, 2 * 2 * (0.5**2 + 1), 4 * 2 * 0.1**2])


def test_nothing_varies_nothing_is_told() -> None:
    assert shares([{"a": 1}, {"a": 1}], [1.0, 2.0], ["a"]) == []
    assert shares([{"a": 1}, {"a": 2}], [1.0, 1.0], ["a"]) == []
    assert shares([], [], ["a"]) == []
