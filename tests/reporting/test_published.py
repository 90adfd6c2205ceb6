"""The published numbers: as shipped, as a sweep, as LaTeX tables, and beside a sweep's own."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measured import noise, results
from scipy.special import stdtrit
from sweeping import expand, shipped, write_option

from peft_align.config.compose import ConfigSpace, config_dir
from peft_align.grid.runs import Run
from peft_align.reporting.cells import Results
from peft_align.reporting.latex import escape, tables
from peft_align.reporting.published import COLUMNS, NUMBERS, as_results, beside, entries, read, summary

PLAIN = {r"\_": "_", "$-$": "-", r"\%": "%"}


def parsed(text: str) -> list[dict[str, str]]:
    """The lines of a LaTeX table, each by the names of its columns, without escapes."""
    for escaped, plain in PLAIN.items():
        text = text.replace(escaped, plain)
    head, body = text.split(r"\toprule")[1].split(r"\bottomrule")[0].split(r"\midrule")
    names = head.strip().removesuffix(r"\\").strip().split(" & ")
    lines = [line.strip().removesuffix(r"\\").strip().split(" & ") for line in body.strip().splitlines()]
    return [dict(zip(names, line, strict=True)) for line in lines]


def as_published(name: str, table: str) -> list[dict[str, str]]:
    """The rows of a table in the CSV files, as LaTeX shows them."""
    return [{k: v or "--" for k, v in row.items() if k != "table"} for row in read(name) if row["table"] == table]


def test_the_shipped_files_are_the_shared_ones(shared: Path) -> None:
    for name in ("results", "merges"):
        own = config_dir() / "report" / "published" / f"{name}.csv"
        assert own.read_text(encoding="utf-8") == (shared / "paper" / f"published_{name}.csv").read_text(
            encoding="utf-8"
        )


def test_the_published_numbers_as_a_sweep_make_the_published_tables() -> None:
    found = tables(as_results(shipped()))
    assert sorted(found) == [f"table{n}.tex" for n in (2, 3, 4, 5)]
    for number in ("2", "4", "5"):
        assert parsed(found[f"table{number}.tex"]) == as_published("results", number)
    assert parsed(found["table3.tex"]) == as_published("merges", "3")
    lines = [line for text in found.values() for line in parsed(text)]
    counted = sum(cell != "--" for line in lines for key, cell in line.items() if key in NUMBERS)
    assert counted == sum(len(numbers) for *_, numbers in entries()) == 240


def test_merges_know_the_published_numbers_of_their_inputs() -> None:
    numbers = as_results(shipped())
    known = {value.run_id for values in numbers.values.values() for value in values}
    assert len(numbers.parents) == 10
    assert all(parent in known for parents in numbers.parents.values() for parent in parents)
    assert {len(parents) for parents in numbers.parents.values()} == {2, 4}


def test_each_published_number_is_beside_itself_without_difference_or_interval() -> None:
    rows = beside(as_results(shipped()))
    assert len(rows) == 240
    assert all(set(row) == set(COLUMNS) for row in rows)
    assert {row["difference"] for row in rows} == {0.0}
    assert {(row["seeds"], row["inside_interval"], row["inside_rerun"]) for row in rows} == {(1, None, None)}


def study(offset: float = 0.0, spread: float = 0.01, words: tuple[str, ...] = ()) -> tuple[Any, Results]:
    """Five seeds of two cells of table 4, near what was published of them, and their bases."""
    sweep = expand("+grid=main", "model=mistral_7b", "dataset=beavertails", "peft=qlora", "preference=harmless", *words)
    wanted = {"kind": "train", "preference": "harmless", "model": "mistral_7b", "dataset": "beavertails"}
    numbers = {
        place["method"]: found for table, place, found in entries() if table == "4" and wanted.items() <= place.items()
    }

    def give(run: Run, benchmark: str, step: int) -> float | None:
        if run.kind != "train" or benchmark not in NUMBERS:
            return None
        return numbers[run.choices["method"]][benchmark] + offset + noise(run, benchmark, spread=spread)

    return sweep, results(sweep, give)


def test_a_measured_cell_stands_beside_the_published_one_with_both_intervals() -> None:
    rows = [row for row in beside(study()[1]) if row["measured"] is not None]
    assert len(rows) == 8
    for row in rows:
        assert (row["seeds"], row["interval_over"], row["table"]) == (5, "seeds", "4")
        assert row["difference"] == pytest.approx(row["measured"] - row["published"])
        assert row["inside_interval"] == (row["low"] <= row["published"] <= row["high"])
        # t(4) × s × sqrt(1/5 + 1/5), against t(4) × s × sqrt(1/5)
        assert row["rerun_high"] - row["measured"] == pytest.approx(2**0.5 * (row["high"] - row["measured"]))
        assert row["inside_rerun"] == (row["rerun_low"] <= row["published"] <= row["rerun_high"])
    assert summary(beside(study()[1])).startswith("of the 240 published numbers 8 are measured, ")


def test_a_cell_that_is_far_off_is_outside() -> None:
    rows = [row for row in beside(study(offset=0.5)[1]) if row["measured"] is not None]
    assert {(row["inside_interval"], row["inside_rerun"]) for row in rows} == {(False, False)}
    assert "8 are measured, 0 of 8 inside the 95% interval, 0 of 8 inside that of a rerun" in summary(rows)


def test_the_interval_of_a_rerun_holds_the_mean_of_five_other_seeds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 1, (4000, 5)), rng.normal(0, 1, (4000, 5)).mean(axis=1)
    half = stdtrit(4, 0.975) * ours.std(axis=1, ddof=1) * np.sqrt(1 / 5 + 1 / 5)
    assert (abs(ours.mean(axis=1) - theirs) <= half).mean() == pytest.approx(0.95, abs=0.012)


def test_further_axes_of_a_sweep_are_named_and_not_mixed() -> None:
    rows = beside(study(words=("peft.r=8,16",))[1])
    cells = {row["cell"] for row in rows if row["measured"] is not None}
    assert cells == {"peft.r=8", "peft.r=16"}


def test_nothing_measured_is_told_so() -> None:
    assert summary(beside(Results())) == "of the 240 published numbers none is measured"


# --- LaTeX


def test_a_sweeps_table_has_means_with_their_intervals_and_the_seeds_in_the_caption() -> None:
    sweep, measured = study()
    found = tables(measured, sweep)
    assert sorted(found) == ["table4.tex"]
    lines = parsed(found["table4.tex"])
    assert [line["method"] for line in lines] == ["sft", "dpo"]
    assert all(re.fullmatch(r"-?\d\.\d{3} \$\\pm\$ 0\.\d{3}", lines[0][column]) for column in NUMBERS), lines[0]
    assert "5 seeds" in found["table4.tex"]


def test_a_cell_that_was_asked_for_and_is_not_there_has_its_line() -> None:
    sweep, _ = study()
    measured = results(sweep, lambda run, b, s: 0.5 if run.choices["method"] == "sft" and b == "mmlu" else None)
    lines = parsed(tables(measured, sweep)["table4.tex"])
    assert [(line["method"], line["mmlu"], line["bbh"]) for line in lines] == [
        ("sft", "0.500 $\\pm$ 0.000", "--"),
        ("dpo", "--", "--"),
    ]


def test_a_further_axis_has_its_column() -> None:
    sweep, measured = study(words=("peft.r=8,16",))
    lines = parsed(tables(measured, sweep)["table4.tex"])
    assert [(line["method"], line["peft.r"]) for line in lines] == [
        ("sft", "8"),
        ("sft", "16"),
        ("dpo", "8"),
        ("dpo", "16"),
    ]


def test_ranks_that_both_methods_are_to_have_stand_in_the_table_while_some_are_missing() -> None:
    words = ("+grid=main", "model=mistral_7b", "dataset=beavertails", "peft=qlora", "preference=harmless", "seed=0")
    sweep = expand(*words, "peft.r=8,16")
    there = {("sft", 8), ("dpo", 16)}
    measured = results(
        sweep, lambda run, b, s: 0.5 if (run.choices.get("method"), run.config.peft.r) in there else None
    )
    lines = parsed(tables(measured, sweep)["table4.tex"])
    assert [(line["method"], line["peft.r"]) for line in lines] == [("sft", "8"), ("dpo", "16")]


def test_the_whole_studys_tables_have_the_published_columns_though_each_method_has_its_own_rank() -> None:
    sweep = expand("+grid=full", "model=mistral_7b,mistral_7b_instruct")
    found = tables(results(sweep, lambda run, b, s: 0.5), sweep)
    for number in ("2", "4", "5"):
        assert list(parsed(found[f"table{number}.tex"])[0]) == list(as_published("results", number)[0])
    assert list(parsed(found["table3.tex"])[0]) == list(as_published("merges", "3")[0])


def test_the_judge_is_named_in_the_caption(tmp_path: Path) -> None:
    sweep, _ = study()
    judges = {"alpaca_eval": ["gpt4/gpt_4"]}
    measured = results(sweep, lambda run, b, s: 5.0 if run.kind == "train" else None, judges=judges)
    assert r"alpaca\_eval judged by gpt4/gpt\_4." in tables(measured, sweep)["table4.tex"]


def test_a_sweep_of_something_else_has_no_tables() -> None:
    sweep = expand("model=tiny", "dataset=everyday", "evaluation.benchmarks=[everyday_mc]", "seed=0,1")
    assert tables(results(sweep, lambda run, b, s: 0.5), sweep) == {}


def test_what_is_special_in_latex_is_escaped() -> None:
    assert escape(r"a_b & 50% #1 $x$ {y} ~ ^ \z") == (
        r"a\_b \& 50\% \#1 \$x\$ \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z"
    )


def test_an_option_of_a_users_own_that_needs_escapes_can_be_in_a_table(tmp_path: Path) -> None:
    text = (config_dir() / "model/mistral_7b.yaml").read_text(encoding="utf-8")
    write_option(tmp_path, "model/my_model_100", text)
    words = ("model=my_model_100", "dataset=beavertails", "peft=qlora", "evaluation.benchmarks=[mmlu]", "seed=0,1")
    sweep = expand(*words, space=ConfigSpace([tmp_path]))
    text = tables(results(sweep, lambda run, b, s: 0.5), sweep)["table4.tex"]
    assert r"my\_model\_100" in text
    assert not re.search(r"(?<!\\)[_%&#](?![ \n])", text.split(r"\midrule")[1].split(r"\bottomrule")[0])


def test_the_files_are_well_formed() -> None:
    for name, columns in (("results", 10), ("merges", 8)):
        path = config_dir() / "report" / "published" / f"{name}.csv"
        with path.open(newline="", encoding="utf-8") as file:
            assert {len(row) for row in csv.reader(file)} == {columns}
