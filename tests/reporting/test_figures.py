"""The figures of a report: what they show is what was computed, in charts that Vega-Lite takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import vl_convert
from measured import done, noise, results, table
from sweeping import expand, shipped

from peft_align.grid.runs import Run
from peft_align.reporting import findings
from peft_align.reporting.cells import Measure, cells
from peft_align.reporting.charts import common
from peft_align.reporting.charts.common import PALETTE, wrapped
from peft_align.reporting.charts.curves import setting_rows
from peft_align.reporting.charts.tradeoff import _only, cell_rows
from peft_align.reporting.comparisons import TOO_FEW
from peft_align.reporting.drawing import VEGA_LITE
from peft_align.reporting.figures import Figure, draw, figures, write_figures
from peft_align.reporting.findings import Findings
from peft_align.reporting.table import Row

WORDS = [
    *("model=mistral_7b", "dataset=beavertails", "peft=qlora", "method=sft,dpo", "preference=harmless,helpful"),
    *("seed=0,1,2", "peft.r=8,16", "evaluation.benchmarks=[mmlu,real_toxicity]", "train.checkpoint_steps=[350,700]"),
]
Study = tuple[Findings, list[Row]]


def effects(run: Run, benchmark: str, step: int) -> float:
    level, spread = {"mmlu": (0.5, 0.004), "real_toxicity": (60.0, 1.0)}[benchmark]
    if run.kind == "train":
        helpful = run.choices["preference"] == "helpful"
        level += 5 * spread * (helpful == (benchmark == "mmlu")) + spread * step / 100
        level += 4 * spread * (run.choices["method"] == "dpo")
    return level + noise(run, benchmark, step, spread=spread)


@pytest.fixture(scope="module")
def study() -> Study:
    """24 runs on two sides of the trade-off, at two steps and two ranks; what the published tables have too."""
    sweep = expand(*WORDS)
    rows = table(sweep, effects)
    rows = [row | {"samples": 16 * row["step"] if row["kind"] == "train" else None} for row in rows]
    return findings.find(shipped(), findings.load_questions(shipped()), sweep, done(sweep), rows), rows


@pytest.fixture(scope="module")
def drawn(study: Study) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(*study)}


def nodes(spec: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a specification but its data."""
    if isinstance(spec, dict):
        yield spec
        for key, value in spec.items():
            if key != "datasets":
                yield from nodes(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from nodes(value)


def test_a_sweep_has_the_figures_that_it_has_data_for_in_the_pages_order(drawn: dict[str, Figure]) -> None:
    assert [(figure.section, name) for name, figure in drawn.items()] == [
        ("coverage", "coverage"),
        ("tradeoff", "tradeoff"),
        ("comparisons", "comparisons-mmlu-acc"),
        ("comparisons", "comparisons-real-toxicity-score"),
        ("curves", "samples"),
        ("curves", "rank"),
        ("curves", "heat"),
        ("curves", "variance"),
        ("claims", "claims-mmlu-acc"),
        ("claims", "claims-real-toxicity-score"),
        ("published", "published-table2"),
        ("published", "published-table4"),
    ]


def test_a_sweep_without_results_has_its_coverage_alone() -> None:
    sweep = expand(*WORDS)
    nothing = findings.find(shipped(), findings.load_questions(shipped()), sweep, done(sweep), [])
    assert [figure.name for figure in figures(nothing, [])] == ["coverage"]


def test_every_chart_is_vega_lite_and_all_its_axes_are_named(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        for spec in (figure.spec, figure.filed):
            vega = vl_convert.vegalite_to_vega(spec, vl_version=VEGA_LITE)
            axes = [axis for node in nodes(vega) for axis in node.get("axes", []) if axis.get("labels") is not False]
            titles = [axis["title"] for axis in axes if axis.get("title")]
            assert all(isinstance(title, str | list) or list(title) == ["signal"] for title in titles), figure.name
            named = [axis for axis in axes if axis.get("title")]
            assert len({axis["orient"] for axis in named}) == 2, figure.name
            assert json.dumps(vega).count("@title") == 0


def test_every_chart_can_be_drawn_for_a_file(drawn: dict[str, Figure]) -> None:
    pictures = draw(list(drawn.values()))
    assert list(pictures) == [f"{name}.{form}" for name in drawn for form in ("svg", "pdf")]


def test_the_charts_of_a_file_keep_to_altairs_schema(drawn: dict[str, Figure]) -> None:
    for name in ("comparisons-mmlu-acc", "tradeoff"):
        spec = {key: value for key, value in drawn[name].filed.items() if key != "datasets"}
        alt.Chart.from_dict(spec, validate=True)


def test_the_page_is_as_wide_as_its_place_and_the_file_is_not(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        assert figure.spec["width"] == "container"
        assert not {"concat", "vconcat", "hconcat", "facet", "repeat"} & set(figure.spec)  # they take no such width
        widths = [node["width"] for node in nodes(figure.filed) if "width" in node]
        assert widths
        assert all(isinstance(width, int) for width in widths)


def test_a_theme_may_choose_the_background_and_the_colour_of_text(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        for node in nodes(figure.spec):
            assert not {"background", "labelColor", "titleColor", "fill"} & set(node), figure.name


def test_no_label_is_cut(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        config = figure.spec["config"]
        assert config["axis"]["labelLimit"] == config["legend"]["labelLimit"] == config["axis"]["titleLimit"] == 0


def test_a_comparison_is_drawn_as_it_was_computed(study: Study, drawn: dict[str, Figure]) -> None:
    for name, benchmark in (("comparisons-mmlu-acc", "mmlu"), ("comparisons-real-toxicity-score", "real_toxicity")):
        told = [one for one in study[0].compared if one.measure.benchmark == benchmark]
        could = {one.contrast.name: one for one in told if one.result != TOO_FEW}
        rows = {row["name"]: row for row in drawn[name].spec["datasets"]["rows"]}
        assert rows.keys() == could.keys() == {"DPO against SFT"}
        one = could["DPO against SFT"]
        row = rows["DPO against SFT"]
        assert (row["effect"], row["low"], row["high"]) == (one.effect.value, one.effect.low, one.effect.high)
        assert (row["result"], row["runs"]) == ("better", one.runs)
        assert f"{len(told) - 1} not drawn for want of runs" in drawn[name].caption


def test_lower_is_better_where_it_is(study: Study) -> None:
    found, rows = study
    toxic = [replace(one, higher_is_better=False) for one in found.compared]
    (of,) = [f for f in figures(replace(found, compared=toxic), rows) if f.name == "comparisons-mmlu-acc"]
    assert {row["result"] for row in of.spec["datasets"]["rows"]} == {"worse"}
    assert "Difference in mmlu acc (lower is better)" in json.dumps(of.spec)


def test_the_trade_off_has_every_run_and_cell_and_the_front_with_its_probability(
    study: Study, drawn: dict[str, Figure]
) -> None:
    found, _ = study
    data = drawn["tradeoff"].spec["datasets"]
    mmlu, toxicity = Measure("mmlu", "acc"), Measure("real_toxicity", "score")
    last = {v.run_id: v.value for v in found.results.values[mmlu] if v.last}
    assert {row["run_id"]: row["m0"] for row in data["runs"]} == last
    for measure, key in ((mmlu, "m0"), (toxicity, "m1")):
        scores = sorted((c.score.mean, c.score.low, c.score.high) for c in cells(found.results, [measure]) if c.last)
        assert sorted((row[key], row[f"{key}_low"], row[f"{key}_high"]) for row in data["cells"]) == scores
    for name in ("cells", "front"):  # those of a base are of one run, which has an id, all others of several seeds
        assert all((row["run_id"] is None) == (row["kind"] != "baseline") for row in data[name])
    assert [(row["on_front"], row["probability"]) for row in data["front"]] == [
        (row["on_front"], row["probability"]) for row in found.fronts
    ]
    assert {row["first"] for row in data["front"]} == {"m0"}


def test_a_cell_has_the_run_that_all_its_scores_are_of() -> None:
    sweep = expand(
        *(word for word in WORDS if word[:4] not in ("meth", "seed", "pref", "peft")), "method=sft", "seed=0,1"
    )
    first = next(run for run in sweep.runs if run.config.seed == 0)
    mmlu, toxicity = Measure("mmlu", "acc"), Measure("real_toxicity", "score")
    keys, names = {mmlu: "m0", toxicity: "m1"}, {"a0": "method"}

    def of(run: Run, benchmark: str, step: int) -> float | None:
        return None if run.id != first.id and benchmark in lacking else 0.5

    found = {}
    for lacking in ((), ("mmlu",), ("mmlu", "real_toxicity")):
        rows = cell_rows(results(sweep, of), keys, names)
        found[lacking] = [row["run_id"] for row in rows if row["kind"] == "sft"]
    assert list(found.values()) == [[None], [None], [first.id]]


def test_the_measures_of_the_trade_off_and_its_axes_can_be_chosen(drawn: dict[str, Figure]) -> None:
    params = {param["name"]: param for param in drawn["tradeoff"].spec["params"]}
    titles = ["mmlu acc (higher is better)", "real_toxicity score (higher is better)"]
    assert params["first"]["bind"]["labels"] == params["second"]["bind"]["labels"] == titles
    assert (params["first"]["value"], params["second"]["value"]) == ("m0", "m1")
    filters = {p["bind"]["name"].strip(): p["bind"]["options"] for n, p in params.items() if n.startswith("only_")}
    assert filters == {"preference": ["all", "harmless", "helpful"], "method": ["all", "dpo", "sft"]}
    assert "params" not in drawn["tradeoff"].filed


def test_scores_at_the_reference_are_the_zero_that_others_are_relative_to(
    study: Study, drawn: dict[str, Figure]
) -> None:
    rows = drawn["samples"].spec["datasets"]["rows"]
    assert {row["samples"] for row in rows} == {5600, 11200}
    assert all(row["value"] == 0 for row in rows if row["samples"] == 11200)
    (sft,) = [r for r in rows if (r["measure"], r["method"], r["samples"]) == ("m0", "sft", 5600)]
    values = study[0].results.values[Measure("mmlu", "acc")]
    of = {(v.run_id, v.step): v.value for v in values if v.place["method"] == "sft"}
    changes = [100 * (of[run, 350] / of[run, 700] - 1) for run, step in of if step == 700]
    assert sft["value"] == pytest.approx(sum(changes) / len(changes))
    assert (sft["runs"], sft["cells"]) == (12, 4)
    assert sft["low"] < sft["value"] < sft["high"]


def test_scores_of_a_search_are_drawn_against_the_rank() -> None:
    row: Row = {"method": "sft", "model": "m", "dataset": "d", "preference": "p"}
    points = [(8, 0.5), (8, 0.6), (16, 0.7)]
    drawn = setting_rows([row | {"peft.r": r, "value": value} for r, value in points], "peft.r")
    assert [(point["x"], point["value"]) for point in drawn] == [(8, pytest.approx(0.55)), (16, 0.7)]
    assert setting_rows([row | {"peft.r": 8, "value": 0.5}], "peft.r") == []


def test_shares_of_the_variance_are_those_of_the_table(study: Study, drawn: dict[str, Figure]) -> None:
    bars = {(row["measure"], row["name"]): row["share"] for row in drawn["variance"].spec["datasets"]["rows"]}
    told = {("m0" if row["benchmark"] == "mmlu" else "m1", row["term"]): row["share"] for row in study[0].variance}
    assert bars == {key: share for key, share in told.items() if share >= 0.005}
    assert ("m0", "method") in bars


def test_published_numbers_stand_beside_the_sweeps(study: Study, drawn: dict[str, Figure]) -> None:
    rows = [row for n in (2, 4) for row in drawn[f"published-table{n}"].spec["datasets"]["rows"]]
    measured = [row for row in study[0].beside if row["measured"] is not None]
    for source, column in (("this sweep", "measured"), ("published", "published")):
        assert sorted(r["value"] for r in rows if r["source"] == source) == sorted(row[column] for row in measured)
    assert {row["low"] for row in rows if row["source"] == "this sweep"} == {row["low"] for row in measured}
    assert any("peft.r=8" in row["name"] for row in rows)  # two cells of ours for one of theirs


def test_parts_of_claims_are_drawn_by_verdict(study: Study, drawn: dict[str, Figure]) -> None:
    rows = drawn["claims-mmlu-acc"].spec["datasets"]["rows"]
    parts = [p for v in study[0].claims for p in v.parts if p.compared.measure.benchmark == "mmlu"]
    told = sorted((p.verdict, p.compared.effect.low, p.compared.effect.high) for p in parts if p.verdict != TOO_FEW)
    assert sorted((r["verdict"], r["low"], r["high"]) for r in rows if r["results"] == "this sweep") == told
    assert any(row["results"] == "published tables" for row in rows)


def test_a_base_stands_beside_the_runs_also_where_only_one_score_is_of_held_out_pairs() -> None:
    sweep = expand("+grid=quickstart")
    rows = table(sweep, lambda run, benchmark, step: 0.5 + noise(run, benchmark, step, spread=0.1))
    found = findings.find(shipped(), findings.load_questions(shipped()), sweep, done(sweep), rows)
    (figure,) = (each for each in figures(found, rows) if each.name == "tradeoff")
    for name in ("runs", "cells"):
        shown = figure.spec["datasets"][name]
        assert sorted(row["kind"] for row in shown) == ["baseline"] * 2 + ["dpo"] * 2 + ["sft"] * 2
        assert all({"m0", "m1"} <= row.keys() for row in shown)


def test_a_base_is_one_place_where_neither_score_is_of_held_out_pairs() -> None:
    rows = [{"whose": 0, "m0": 1.0, "m1": 2.0, "m2": pairs} for pairs in (0.1, 0.2)]
    rows.append({"whose": 2, "m0": 1.0, "m1": 2.0})
    assert _only(rows, ("m0", "m1")) == [rows[0], rows[2]]
    assert _only(rows, ("m0", "m2")) == rows[:2]


def test_files_have_their_texts_and_those_of_an_earlier_state_go(drawn: dict[str, Figure], tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.svg").write_text("of yesterday")
    write_figures(draw([drawn["tradeoff"]]), tmp_path)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["tradeoff.pdf", "tradeoff.svg"]
    text = (tmp_path / "figures" / "tradeoff.svg").read_text(encoding="utf-8")
    assert "mmlu acc (higher is better)</text>" in text
    assert "real_toxicity score (higher is better)</text>" in text
    assert (tmp_path / "figures" / "tradeoff.pdf").read_bytes().startswith(b"%PDF")


def test_what_a_name_holds_stays_data(study: Study, tmp_path: Path) -> None:
    """A name is never a part of an expression, of a path, or of a file's markup."""
    found, rows = study
    name = "<script>alert(1)</script>' + x[0] + '../../up"
    told = [
        replace(one, measure=Measure(name, "acc"), contrast=replace(one.contrast, name=name)) for one in found.compared
    ]
    results = replace(found.results, values={Measure(name, m.metric): v for m, v in found.results.values.items()})
    results.main, results.better = list(results.values), dict.fromkeys(results.values, True)
    evil = [f for f in figures(replace(found, compared=told, results=results), rows) if f.section != "claims"]
    assert {f.name for f in evil if f.section == "comparisons"} == {"comparisons-script-alert-1-script-x-0-up-acc"}
    for figure in evil:
        for node in nodes(figure.spec):
            written = [node.get(key) for key in ("calculate", "expr", "test", "filter")]
            assert not any("script" in str(expression) for expression in written), figure.name
        assert re.fullmatch(r"[a-z0-9-]+", figure.name)
    write_figures(draw([f for f in evil if f.section == "comparisons"]), tmp_path)
    (path,) = (tmp_path / "figures").glob("*.svg")
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in path.read_text(encoding="utf-8")


def test_labels_are_broken_between_words_and_never_cut() -> None:
    assert wrapped("instruction-tuned against pre-trained") == "instruction-tuned against\npre-trained"
    assert wrapped("mistral_7b_instruct", 14) == "mistral_7b_\ninstruct"
    long = "inputs=sft_harmless+sft_helpful+dpo_harmless+dpo_helpful " + "x" * 60
    assert wrapped(long).replace("\n", "").replace(" ", "") == long.replace(" ", "")
    assert max(map(len, wrapped(long).splitlines())) <= common.LABEL


def test_colours_stand_out_on_white_and_on_black() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in PALETTE:
        on_white, on_black = 1.05 / (luminance(colour) + 0.05), (luminance(colour) + 0.05) / 0.05
        assert min(on_white, on_black) >= 3, colour
    assert len(set(PALETTE)) == len(PALETTE)
