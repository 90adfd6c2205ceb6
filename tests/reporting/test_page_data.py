"""The page's data: whole, readable whatever it holds, and small."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from page_material import HOSTILE, content

from peft_align.reporting import page_data


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_are_not_finite_leave_the_data_readable(value: float) -> None:
    assert json.loads(page_data.embedded({"a": [value, np.float32(0.5), np.int64(3), True]})) == {
        "a": [None, 0.5, 3, True]
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_data_cannot_end_its_element_and_reads_as_it_was(text: str) -> None:
    embedded = page_data.embedded({text: [text]})
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", embedded)
    assert json.loads(embedded) == {text: [text]}
    embedded.encode("utf-8")


def test_what_runs_have_in_common_is_told_once() -> None:
    small = content()
    compact = page_data.compact_details(small.details)
    for run_id, told in small.details.items():
        own = compact["runs"][run_id]
        assert dict(compact["settings"][i] for i in own["config"]) == told["config"]
        for name, points in told["curves"].items():
            steps, values = own["curves"][name]
            assert [s for s, _ in points] == compact["steps"][steps]
            assert values == pytest.approx([v for _, v in points], rel=1e-4)
        scores = [[s, *compact["names"][i], value, error, n] for s, i, value, error, n in own["scores"]]
        assert scores == [[s, name, metric, judge, pytest.approx(value, rel=1e-4), error, n]
                          for s, name, metric, value, error, n, judge in told["scores"]]  # fmt: skip
    assert len(page_data.embedded(compact)) < 0.6 * len(page_data.embedded(small.details))


def test_secrets_in_a_runs_settings_are_taken_out() -> None:
    key = "hf_" + "a1B2" * 9
    told = {"label": "a run", "config": {"hub.token": key, "names": [key]}, "reason": f"refused {key}"}
    assert key not in json.dumps(page_data.compact_details({"run": told}))


def test_a_run_of_which_nothing_is_known_is_there() -> None:
    compact = page_data.compact_details({"run": {"label": "a run", "kind": "train", "state": "missing"}})
    own = compact["runs"]["run"]
    assert (own["label"], own["config"], own["curves"], own["scores"]) == ("a run", [], {}, [])


def test_gaps_of_a_curve_stay_gaps() -> None:
    points = [[0, 1.0], [1, None], [2, math.nan], [3, 0.5]]
    compact = page_data.compact_details({"run": {"label": "a run", "curves": {"loss": points, "none": []}}})
    found = json.loads(page_data.embedded(compact))
    assert found["runs"]["run"]["curves"] == {"loss": [0, [1.0, None, None, 0.5]]}
    assert found["steps"] == [[0, 1, 2, 3]]


def test_answers_name_their_runs_once() -> None:
    answers = content().answers
    compact = page_data.compact_answers(answers)
    assert len(compact["runs"]) == 6
    for one, kept in zip(answers, compact["prompts"], strict=True):
        told = [[own["run_id"], own["label"], own["text"], own["cut"], own["scores"]] for own in one["answers"]]
        assert [[*compact["runs"][run], text, cut, scores] for run, text, cut, scores in kept["answers"]] == told
        assert {key: kept[key] for key in one if key != "answers"} == {key: one[key] for key in one if key != "answers"}
