"""The result table: its columns, its formats, and its summary over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained

from peft_align.grid.runs import Sweep
from peft_align.reporting.table import Row, columns, markdown, rows, write_csv, write_parquet

BASE = ("model=tiny", "dataset=everyday", "train.max_steps=4", "peft=lora")
MC = "evaluation.benchmarks=[everyday_mc]"
PAIRS = "evaluation.benchmarks=[preference]"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def table(root: Path, sweep: Sweep, values: Sequence[float] | None = None, **more: Any) -> list[Row]:
    """The rows of a sweep whose requests were all done, the i-th with the i-th value."""
    for run in trained(sweep):
        finish_training(root, run)
    requests = [request for item in plan(sweep, root) for request in item.requests]
    for i, request in enumerate(requests):
        name = "accuracy" if request.config.kind == "preference" else "acc"
        value = values[i] if values is not None else 0.1 * (i + 1)
        finish_evaluation(root, request, [metric(name, value, **more)])
    return rows(sweep, plan(sweep, root), root)


def lines_of(summary: str) -> list[dict[str, str]]:
    """The lines of a Markdown table, each by the names of its columns."""
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in body]


def shown(summary: str, *names: str) -> list[tuple[str, ...]]:
    """These columns of a Markdown table."""
    return [tuple(line[name] for name in names) for line in lines_of(summary)]


def test_the_columns_are_these_and_the_axes_stand_before_the_seed(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "peft.r=8,16", "train.learning_rate=1e-4,2e-4", "seed=0,1")
    write_csv(tmp_path / "results.csv", columns(sweep), [])
    expected = (
        "run_id,kind,dataset,preference,method,model,peft,base,peft.r,train.learning_rate,"
        "seed,step,samples,benchmark,judge,metric,value,stderr,bound,n,higher_is_better\n"
    )
    assert (tmp_path / "results.csv").read_text(encoding="utf-8") == expected


def test_without_further_axes_there_are_no_further_columns() -> None:
    assert ",".join(columns(expand("+grid=main"))) == (
        "run_id,kind,dataset,preference,method,model,peft,base,seed,step,samples,"
        "benchmark,judge,metric,value,stderr,bound,n,higher_is_better"
    )


def test_a_row_says_what_was_scored(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "peft.r=8,16", "method=dpo", "seed=3")
    row = table(tmp_path, sweep)[0]
    assert row == {
        "run_id": trained(sweep)[0].id,
        "kind": "train",
        "dataset": "everyday",
        "preference": "harmless",
        "method": "dpo",
        "model": "tiny",
        "peft": "lora",
        "base": "bf16",
        "peft.r": 8,
        "seed": 3,
        "step": 4,
        "samples": 64,
        "benchmark": "everyday_mc",
        "judge": None,
        "metric": "acc",
        "value": 0.1,
        "stderr": 0.125,
        "bound": None,
        "n": 16,
        "higher_is_better": True,
    }


def test_each_step_has_its_row(tmp_path: Path) -> None:
    found = table(tmp_path, expand(*BASE, MC, "train.checkpoint_steps=[1,2,4]"))
    assert [row["step"] for row in found if row["kind"] == "train"] == [1, 2, 4]


def test_a_part_is_named_behind_its_benchmark(tmp_path: Path) -> None:
    found = table(tmp_path, expand(*BASE, MC), part="easy")
    assert {row["benchmark"] for row in found} == {"everyday_mc/easy"}


def test_a_baseline_names_its_model_its_precision_and_its_held_out_set(tmp_path: Path) -> None:
    found = table(tmp_path, expand(*BASE, "evaluation.benchmarks=[preference,everyday_mc]", "peft.r=8,16"))
    pairs, mc = [row for row in found if row["kind"] == "baseline"]
    shared = {"model": "tiny", "peft": "bf16", "method": None, "seed": None, "step": 0, "peft.r": None}
    assert shared.items() <= pairs.items()
    assert shared.items() <= mc.items()
    assert (pairs["dataset"], pairs["preference"]) == ("everyday", "harmless")
    assert (mc["dataset"], mc["preference"]) == (None, None)


def test_what_is_not_done_and_what_is_only_a_parent_have_no_rows(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "method=dpo", "method.init=sft")
    found = table(tmp_path, sweep)
    assert {row["method"] for row in found if row["kind"] == "train"} == {"dpo"}
    run = trained(sweep)[0]
    next((tmp_path / "runs" / run.id / "evaluations").glob("*/samples.jsonl.gz")).unlink()
    assert {row["kind"] for row in rows(sweep, plan(sweep, tmp_path), tmp_path)} == {"baseline"}
    assert rows(sweep, plan(sweep, tmp_path / "empty"), tmp_path / "empty") == []


def test_numbers_keep_their_full_precision_in_csv(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "seed=0")
    value = 0.1 + 0.2
    found = table(tmp_path, sweep, [value, 1 / 3], stderr=None, higher_is_better=None)
    write_csv(tmp_path / "results.csv", columns(sweep), found)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [float(row["value"]) for row in read] == [value, 1 / 3]
    assert {(row["stderr"], row["higher_is_better"]) for row in read} == {("", "")}


def as_text(value: Any) -> str:
    """A value of the Parquet file as the CSV shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def same(cell: str, value: Any) -> bool:
    """Whether a cell of the CSV holds the value: numbers as numbers."""
    return float(cell) == value if isinstance(value, float) and cell else cell == as_text(value)


def test_parquet_equals_csv_and_is_typed(tmp_path: Path) -> None:
    sweep = expand(
        *BASE, MC, "peft.r=8,16", "train.schedule=linear,cosine", "peft.target_modules=[q_proj,v_proj],[k_proj]"
    )
    found, names = table(tmp_path, sweep), columns(sweep)
    write_csv(tmp_path / "results.csv", names, found)
    write_parquet(tmp_path / "results.parquet", names, found)
    typed = pq.read_table(tmp_path / "results.parquet")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        text = list(csv.DictReader(file))
    assert typed.column_names == names == list(text[0])
    assert typed.num_rows == len(text) == len(found) == 9
    for one, other in zip(text, typed.to_pylist(), strict=True):
        assert all(same(one[name], other[name]) for name in names), (one, other)
    types = {field.name: str(field.type) for field in typed.schema}
    assert (types["value"], types["n"], types["step"], types["higher_is_better"]) == (
        "double",
        "int64",
        "int64",
        "bool",
    )
    assert (types["peft.r"], types["train.schedule"], types["seed"]) == ("double", "string", "int64")
    assert {row["peft.target_modules"] for row in text} == {"q_proj,v_proj", "k_proj", ""}


def test_a_table_without_rows_can_be_written(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "peft.r=8,16")
    write_parquet(tmp_path / "results.parquet", columns(sweep), [])
    assert pq.read_table(tmp_path / "results.parquet").column_names == columns(sweep)
    assert markdown(sweep, []) == "No results yet.\n"


def test_the_summary_is_mean_and_t_interval_over_seeds(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "method=sft,dpo", "seed=0,1,2")
    # sft: 0.50 0.60 0.70; dpo: 0.61 0.61 0.61; baseline 0.25
    summary = markdown(sweep, table(tmp_path, sweep, [0.5, 0.6, 0.7, 0.61, 0.61, 0.61, 0.25]))
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert shown(summary, "method", "peft", "step", "everyday_mc acc ↑", "seeds") == [
        ("sft", "lora", "4", f"0.600 ± {half:.3f}", "3"),
        ("dpo", "lora", "4", "0.610 ± 0.000", "3"),
        ("baseline", "bf16", "0", "0.250", "1"),
    ]
    assert "± is the 95% t interval over seeds." in summary
    assert "model: tiny" in summary


def test_one_seed_is_shown_without_an_interval(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC)
    summary = markdown(sweep, table(tmp_path, sweep, [0.5, 0.25]))
    assert "±" not in summary
    assert shown(summary, "everyday_mc acc ↑", "seeds") == [("0.500", "1"), ("0.250", "1")]


def test_cells_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC, "peft.r=8,16", "seed=0,1")
    found = table(tmp_path, sweep, [0.1, 0.1, 0.3, 0.3, 0.5])
    by_rank = shown(markdown(sweep, found), "peft.r", "everyday_mc acc ↑")
    assert by_rank == [("8", "0.100 ± 0.000"), ("16", "0.300 ± 0.000"), ("", "0.500")]


def test_a_metric_that_the_benchmark_does_not_name_is_in_the_csv_alone(tmp_path: Path) -> None:
    sweep = expand(*BASE, MC)
    found = table(tmp_path, sweep)
    hidden = [row | {"metric": "acc_norm"} for row in found]
    lower = [row | {"higher_is_better": False} for row in found]
    assert markdown(sweep, [*found, *hidden]) == markdown(sweep, found)
    assert markdown(sweep, hidden) == "No results yet.\n"
    assert "everyday_mc acc ↓" in markdown(sweep, lower)


def test_a_baselines_general_scores_stand_beside_each_of_its_held_out_sets(tmp_path: Path) -> None:
    words = [w for w in BASE if not w.startswith("dataset")]
    sweep = expand(
        *words, "evaluation.benchmarks=[preference,everyday_mc]", "dataset=everyday", "preference=harmless,helpful"
    )
    baselines = [line for line in lines_of(markdown(sweep, table(tmp_path, sweep))) if line["method"] == "baseline"]
    assert sorted(line["preference"] for line in baselines) == ["harmless", "helpful"]
    assert len({line["everyday_mc acc ↑"] for line in baselines}) == 1
    assert all(line["everyday_mc acc ↑"] and line["preference accuracy ↑"] for line in baselines)


def test_a_row_with_a_column_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "some.csv", ["a", "b"], [{"a": 1}, {"b": True}])
    assert (tmp_path / "some.csv").read_text(encoding="utf-8") == "a,b\n1,\n,true\n"
    with pytest.raises(ValueError, match=r"some\.csv has no column c, d"):
        write_csv(tmp_path / "some.csv", ["a", "b"], [{"a": 1}, {"a": 1, "d": 2, "c": 3}])
