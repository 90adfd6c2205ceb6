"""Judges in the result table: whose figures they are, that they are never mixed, and what has no figure."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sweeping import expand, finish_evaluation, finish_judgement, finish_training, metric, plan, trained, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.evaluation import red_instruct
from peft_align.grid.planner import Judgement
from peft_align.grid.runs import Sweep
from peft_align.reporting.table import Row, columns, markdown, rows, write_csv, write_parquet
from peft_align.store.records import Digests, inventory, read_json, write_json
from peft_align.store.runs import RunDir

TINY = ("model=tiny", "dataset=everyday", "train.max_steps=4", "peft=lora")
ALPACA = "evaluation.benchmarks=[alpaca_eval]"
RED = "evaluation.benchmarks=[red_instruct]"
Metrics = Sequence[Mapping[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def table(root: Path, sweep: Sweep, judged: Callable[[Judgement], Metrics], words: float = 8) -> list[Row]:
    """The rows of a sweep whose texts were all generated, and judged so."""
    for run in trained(sweep):
        finish_training(root, run)
    for item in plan(sweep, root):
        for request in item.requests:
            finish_evaluation(root, request, [metric("response_words", words, higher_is_better=None)])
    for item in plan(sweep, root):
        for judgement in item.to_judge:
            finish_judgement(root, judgement, judged(judgement))
    items = plan(sweep, root)
    assert all(item.done for item in items)
    return rows(sweep, items, root)


def win_rate(value: float) -> Metrics:
    return [metric("win_rate", value)]


def lines_of(summary: str) -> list[dict[str, str]]:
    """The lines of a Markdown table, each by the names of its columns."""
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in body]


def two_judges(folder: Path, one: str, other: str) -> Sweep:
    """Two seeds of one cell, their texts judged by two judges."""
    text = f"blocks: [{{set: {{seed: 0, {one}}}}}, {{set: {{seed: 1, {other}}}}}]\nbaselines: false"
    write_option(folder, "grid/mine", text)
    return expand("+grid=mine", *TINY, ALPACA, space=ConfigSpace([folder]))


def test_a_judges_row_names_it_and_the_row_of_the_texts_names_none(tmp_path: Path) -> None:
    found = table(tmp_path, expand(*TINY, ALPACA, "judge=gpt4", "judge.model=gpt-4o"), lambda judgement: win_rate(50))
    assert [(row["kind"], row["metric"], row["judge"], row["value"]) for row in found] == [
        ("train", "response_words", None, 8),
        ("train", "win_rate", "gpt4/gpt-4o", 50),
        ("baseline", "response_words", None, 8),
        ("baseline", "win_rate", "gpt4/gpt-4o", 50),
    ]
    assert {row["benchmark"] for row in found} == {"alpaca_eval"}
    assert [(row["step"], row["base"]) for row in found] == [(4, "bf16")] * 2 + [(0, "bf16")] * 2


def test_one_judge_is_told_in_the_caption_and_has_no_column(tmp_path: Path) -> None:
    sweep = expand(*TINY, ALPACA, "judge=gpt4", "seed=0,1")
    values = iter([40.0, 60.0, 30.0])
    summary = markdown(sweep, table(tmp_path, sweep, lambda judgement: win_rate(next(values))))
    assert "Judged: alpaca_eval by gpt4/gpt-4." in summary
    lines = lines_of(summary)
    assert [line["alpaca_eval win_rate ↑"].split(" ± ")[0] for line in lines] == ["50.000", "30.000"]
    assert [line["seeds"] for line in lines] == ["2", "1"]


def test_the_judges_of_several_benchmarks_are_told_each_with_its_own(tmp_path: Path) -> None:
    words = ("evaluation.benchmarks=[alpaca_eval,real_toxicity]", "judge=gpt4")
    sweep = expand(*TINY, *words, "benchmark.real_toxicity.judge=profanity")
    scores = {"alpaca_eval": win_rate(50), "real_toxicity": [metric("score", 0.5)]}
    summary = markdown(sweep, table(tmp_path, sweep, lambda judgement: scores[judgement.request.benchmark]))
    assert "Judged: alpaca_eval by gpt4/gpt-4, real_toxicity by profanity." in summary


def test_texts_that_nobody_judged_have_no_judge_in_the_caption(tmp_path: Path) -> None:
    sweep = expand(*TINY, ALPACA)
    summary = markdown(sweep, table(tmp_path, sweep, lambda judgement: []))
    assert "Judged" not in summary
    assert "alpaca_eval response_words" in summary


def test_two_judges_of_one_benchmark_are_two_columns_and_never_a_mean(tmp_path: Path) -> None:
    sweep = two_judges(tmp_path / "conf", "judge: gpt4", "judge: endpoint")
    values = {"gpt4": 40.0, "endpoint": 60.0}
    found = table(tmp_path, sweep, lambda judgement: win_rate(values[judgement.option]))
    (line,) = lines_of(markdown(sweep, found))
    assert line["alpaca_eval (gpt4/gpt-4) win_rate ↑"] == "40.000"
    assert line["alpaca_eval (endpoint/default) win_rate ↑"] == "60.000"
    assert "alpaca_eval win_rate ↑" not in line
    assert line["alpaca_eval response_words"] == "8.000 ± 0.000"  # the texts' own figures are of one kind
    assert {row["benchmark"] for row in found} == {"alpaca_eval"}  # in the CSV it is the judge's column


def test_where_two_judged_the_caption_does_not_name_one_of_them_alone(tmp_path: Path) -> None:
    sweep = two_judges(tmp_path / "conf", "judge: gpt4", "judge: endpoint")
    summary = markdown(sweep, table(tmp_path, sweep, lambda judgement: win_rate(50)))
    caption = summary.rpartition("|\n")[2]
    assert ("gpt4/gpt-4" in caption) == ("endpoint/default" in caption), caption


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("judge: gpt4", "judge: gpt4, judge.model: gpt-4o"),
        ("judge: gpt4", "judge: gpt4, judge.version: june"),
        ("judge: local_lm, judge.hub_id: one/judge", "judge: local_lm, judge.hub_id: two/judge"),
    ],
    ids=["models", "versions", "repositories"],
)
def test_judges_that_share_an_option_are_not_averaged_either(tmp_path: Path, one: str, other: str) -> None:
    sweep = two_judges(tmp_path / "conf", one, other)
    found = table(tmp_path, sweep, lambda judgement: win_rate(40.0 if "s0" in judgement.request.run_id else 60.0))
    cells = {cell for line in lines_of(markdown(sweep, found)) for name, cell in line.items() if "win_rate" in name}
    assert cells - {""} == {"40.000", "60.000"}


def test_a_rate_without_spread_has_its_bound_in_the_files(tmp_path: Path) -> None:
    sweep = expand(*TINY, RED, "judge=gpt4")
    harmless = [asdict(each) for each in red_instruct.metrics(["not harmful"] * 200, [str(i) for i in range(200)])]
    found = table(tmp_path, sweep, lambda judgement: harmless)
    write_csv(tmp_path / "results.csv", columns(sweep), found)
    write_parquet(tmp_path / "results.parquet", columns(sweep), found)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        read = {row["metric"]: row for row in csv.DictReader(file) if row["kind"] == "train"}
    assert float(read["attack_success_rate"]["bound"]) == pytest.approx(100 * (1 - 0.05 ** (1 / 200)))
    assert float(read["attack_success_rate"]["bound"]) == pytest.approx(1.5, abs=0.02)  # the rule of three
    assert float(read["safety"]["bound"]) == pytest.approx(100 - float(read["attack_success_rate"]["bound"]))
    assert float(read["safety"]["value"]) == 100
    assert read["response_words"]["bound"] == ""
    assert {row["judge"] for row in read.values()} == {"gpt4/gpt-4", ""}
    typed = pq.read_table(tmp_path / "results.parquet")
    assert (str(typed.schema.field("bound").type), str(typed.schema.field("judge").type)) == ("double", "string")
    assert {row["bound"] for row in typed.to_pylist() if row["metric"] == "response_words"} == {None}


def test_answers_that_are_all_unlabelled_leave_safety_empty_and_say_so(tmp_path: Path) -> None:
    sweep = expand(*TINY, RED, "judge=gpt4")
    labels: dict[bool, list[str | None]] = {True: [None] * 4, False: ["harmful", "not harmful", "not harmful", None]}

    def judged(judgement: Judgement) -> Metrics:
        found = labels[judgement.request.step == 4]
        return [asdict(each) for each in red_instruct.metrics(found, ["0", "1", "2", "3"])]

    found = table(tmp_path, sweep, judged)
    trained_line, baseline = lines_of(markdown(sweep, found))
    assert trained_line["red_instruct safety ↑"] == trained_line["red_instruct attack_success_rate ↓"] == ""
    assert trained_line["red_instruct unlabelled_rate ↓"] == "100.000"
    assert baseline["red_instruct safety ↑"] == f"{200 / 3:.3f}"
    assert baseline["red_instruct unlabelled_rate ↓"] == "25.000"
    assert [(row["metric"], row["n"]) for row in found if row["kind"] == "train" and row["judge"]] == [
        ("unlabelled_rate", 4)
    ]
    assert {row["metric"]: row["n"] for row in found if row["kind"] == "baseline" and row["judge"]} == {
        "safety": 3,
        "attack_success_rate": 3,
        "unlabelled_rate": 4,
    }


def test_texts_that_were_generated_again_lose_their_judges_rows(tmp_path: Path) -> None:
    sweep = expand(*TINY, ALPACA, "judge=gpt4")
    table(tmp_path, sweep, lambda judgement: win_rate(50))
    folder = RunDir(tmp_path, trained(sweep)[0].id).evaluation(plan(sweep, tmp_path)[0].requests[0].name)
    (folder / "samples.jsonl.gz").write_bytes(b"other texts")
    record = read_json(folder / "record.json") or {}
    write_json(folder / "record.json", record | {"files": inventory(folder, ["samples.jsonl.gz"], Digests())})
    found = rows(sweep, plan(sweep, tmp_path), tmp_path)
    assert [row["metric"] for row in found if row["kind"] == "train"] == ["response_words"]
    assert [row["metric"] for row in found if row["kind"] == "baseline"] == ["response_words", "win_rate"]


def test_another_judges_figures_of_the_same_texts_are_not_shown_as_this_ones(tmp_path: Path) -> None:
    table(tmp_path, expand(*TINY, ALPACA, "judge=gpt4"), lambda judgement: win_rate(50))
    other = expand(*TINY, ALPACA, "judge=endpoint")
    items = plan(other, tmp_path)
    assert {item.why for item in items} == {"judge alpaca_eval by endpoint"}
    assert {row["judge"] for row in rows(other, items, tmp_path)} == {None}


def test_a_record_from_before_there_were_bounds_and_bases_stops_no_table(tmp_path: Path) -> None:
    sweep = expand(*TINY, "evaluation.benchmarks=[everyday_mc]")
    finish_training(tmp_path, trained(sweep)[0])
    for item in plan(sweep, tmp_path):
        folder = finish_evaluation(tmp_path, item.requests[0], [metric("acc", 0.5)])
        record = read_json(folder / "record.json") or {}
        del record["base"], record["metrics"][0]["bound"]
        write_json(folder / "record.json", record)
    found = rows(sweep, plan(sweep, tmp_path), tmp_path)  # scored again, or shown with what it has
    assert all(row["base"] in ("bf16", None) for row in found)
