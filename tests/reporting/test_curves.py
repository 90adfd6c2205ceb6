"""Curves that are thinned out show what the whole curve shows: its ends, its spikes, where it is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from peft_align.reporting.curves import FEWEST, POINTS, Point, points_for, read_curves, thinned


def test_a_long_curve_keeps_its_ends_and_each_spike() -> None:
    values = [math.sin(i / 50) for i in range(5000)]
    values[1234], values[4001] = 90.0, -70.0
    curve: list[Point] = [[i, value] for i, value in enumerate(values)]
    kept = thinned(curve, 200)
    assert len(kept) <= 200
    assert (kept[0], kept[-1]) == (curve[0], curve[-1])
    assert [1234, 90.0] in kept
    assert [4001, -70.0] in kept
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})


@pytest.mark.parametrize("length", [0, 1, 2, 199, 200])
def test_a_short_curve_stays_as_it_is(length: int) -> None:
    curve: list[Point] = [[i, i] for i in range(length)]
    assert thinned(curve, 200) == curve


def test_a_value_that_is_no_number_stays_in_a_thinned_curve_beside_the_spikes() -> None:
    curve: list[Point] = [[i, 1.0] for i in range(1000)]
    curve[500][1], curve[501][1] = None, 50.0
    kept = thinned(curve, 50)
    assert len(kept) <= 50
    assert [500, None] in kept
    assert [501, 50.0] in kept


def test_a_curve_of_which_nothing_is_a_number_is_thinned_too() -> None:
    kept = thinned([[i, None] for i in range(1000)], 50)
    assert len(kept) <= 50
    assert kept[-1] == [999, None]


def test_curves_have_names_for_people_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {"step": 1, "loss": 0.7, "grad_norm": 2.0, "rewards/margins": 0.1, "rewards/accuracies": 1.0}
    more = {"rows": ['train:1", "rows": '], "row_tokens": [1], "row_losses": [0.7]}
    path.write_text(
        "".join(json.dumps(each) + "\n" for each in ({**line, **more}, line | {"step": 2, "loss": math.nan}))
    )
    curves, unread = read_curves(path)
    assert unread == 0
    assert curves == {
        "loss": [[1, 0.7], [2, None]],
        "reward margin": [[1, 0.1], [2, 0.1]],
        "reward accuracy": [[1, 1.0], [2, 1.0]],
        "grad_norm": [[1, 2.0], [2, 2.0]],
    }


def test_lines_that_are_damaged_are_counted_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole, cut = b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "lo\n\xff\xfe\n[1]\n'
    path.write_bytes(whole + cut + b'{"step": "4", "loss": 1}\n{"step": 5, "loss": 1.0}\n')
    assert read_curves(path) == ({"loss": [[1, 2.0], [5, 1.0]]}, 4)


def test_a_page_of_thousands_of_runs_has_fewer_points_a_curve() -> None:
    assert points_for(1) == points_for(320) == POINTS
    assert FEWEST <= points_for(5000) < POINTS
    assert points_for(10**9) == FEWEST
