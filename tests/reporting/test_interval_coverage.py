"""The intervals that the report offers hold a known truth as often as they say; the percentile bootstrap does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from interval_coverage import CASES, Case, coverage

SIMULATIONS = 1000


OFFERED = [pytest.param(case, id=f"{case.name}, {case.drawn}") for case in CASES if case.offered]


@pytest.mark.parametrize("case", OFFERED)
def test_a_95_percent_interval_holds_the_truth_in_93_to_97_percent(case: Case) -> None:
    assert 0.93 <= coverage(case, SIMULATIONS) <= 0.97


@pytest.mark.parametrize(
    ("name", "drawn", "expected"),
    [("percentile bootstrap", "one cell, 5 seeds", 0.84), ("item error of one seed", "for training again too", 0.70)],
)
def test_what_the_report_does_not_use_holds_it_less_often(name: str, drawn: str, expected: float) -> None:
    (case,) = [case for case in CASES if (case.name, case.drawn) == (name, drawn)]
    assert coverage(case, SIMULATIONS) == pytest.approx(expected, abs=0.03)


def test_taking_all_answers_for_independent_is_far_from_95_percent() -> None:
    (case,) = [case for case in CASES if case.name == "all answers as independent"]
    assert coverage(case, SIMULATIONS) < 0.75
