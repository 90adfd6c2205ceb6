"""The page's tables: what stands in a cell, what it is sorted by, and what is left out."""

from __future__ import annotations

import math

import pytest
from page_material import content

from peft_align.reporting import page_tables
from peft_align.reporting.page_tables import EMPTY, PageTable


def texts(table: PageTable, head: str) -> list[str]:
    place = table.heads.index(head)
    return [row[place].text for row in table.rows]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (-2.5, "−2.5"), (12345, "12,345"), (1.5e-7, "1.500e-07"), (0.0, "0"), (math.nan, "nan")],
)
def test_numbers_have_four_digits_and_a_real_minus(value: float, text: str) -> None:
    assert page_tables.cell(value).text == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.5"), (-0.5, "−0.5"), (0.0, "0"), (-0.0, "0"), (3, "+3"), (0, "0")]
)
def test_a_difference_has_a_sign_unless_it_is_none(value: float, text: str) -> None:
    assert page_tables.cell(value, sign=True).text == text


def test_a_cell_is_sorted_by_its_value_and_not_by_its_text() -> None:
    assert page_tables.cell(1e-7).sort == 1e-7
    assert page_tables.interval(0.25, 0.5).sort == 0.25
    assert page_tables.probability(0.0002).text == "< 0.001"
    assert page_tables.probability(0.0002).sort == 0.0002
    assert page_tables.cell(math.inf).sort is None
    for nothing in (page_tables.cell(None), page_tables.interval(None, 1.0), page_tables.probability(None)):
        assert (nothing.text, nothing.sort) == (EMPTY, None)


def test_columns_without_a_value_are_left_out_and_runs_that_are_known_are_led_to() -> None:
    rows = [{"run_id": "a", "peak_memory_gb": 1.5, "task": None}, {"run_id": "b", "peak_memory_gb": None, "task": ""}]
    table = page_tables.from_rows("Cost", rows, {"a": "the first"})
    assert table.heads == ["run", "peak memory GB"]
    assert texts(table, "run") == ["the first", "b"]
    assert [row[0].run for row in table.rows] == ["a", None]


def test_what_the_name_of_a_run_says_is_not_said_again_in_its_cost() -> None:
    small = content()
    table = page_tables.cost(small.cost, {run_id: told["label"] for run_id, told in small.details.items()})
    assert table.heads == ["run", "device", "packed with", "train hours", "peak memory GB", "memory of",
                           "tokens per second"]  # fmt: skip
    assert len(table.rows) == len(small.cost)


def test_the_cheapest_points_come_first_and_no_gain_has_no_price() -> None:
    rows = content().per_point
    table = page_tables.per_point([rows[1], rows[0]])
    assert texts(table, "hours per point") == ["0.893", EMPTY]
    assert texts(table, "points gained") == ["+1.4", "−0.2"]
    assert texts(table, "cell") == ["beavertails sft nf4", "beavertails dpo nf4"]


def test_every_comparison_with_a_pair_has_a_row() -> None:
    found = content().found
    table = page_tables.comparisons(found.compared)
    assert len(table.rows) == sum(one.effect.cells > 0 for one in found.compared) < len(found.compared)
    (own,) = [row for row in table.rows if row[0].text == "DPO against SFT"]
    told = dict(zip(table.heads, own, strict=True))
    assert (told["result"].text, told["result"].shape, told["which is"].text) == ("higher", "▲", "better")
    assert (told["runs"].text, told["pairs of cells"].text, told["seeds"].text) == ("16", "2", "4")


def test_every_run_is_listed_with_its_last_score() -> None:
    small = content(done=0.5)
    table = page_tables.runs(small.found, small.details)
    assert [row[0].run for row in table.rows] == list(small.details)
    scores = dict(zip(texts(table, "state"), texts(table, "everyday_mc acc"), strict=True))
    assert scores["missing"] == scores["failed"] == EMPTY
    assert scores["done"] != EMPTY


def test_coverage_counts_all_states_of_each_value() -> None:
    table = page_tables.coverage_axes(content(done=0.5).found.coverage)
    kinds = [[cell.text for cell in row] for row in table.rows if row[0].text == "kind"]
    assert [sum(map(int, row[2:])) for row in kinds] == [1, 16]
