"""What `report` writes and shows beside the table: of a whole sweep, of one in progress, of one that went badly."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from measured import done, noise, table
from sweeping import expand, finish_evaluation, finish_training, metric, plan, shipped, trained, write_option

from peft_align.cli import ask
from peft_align.errors import InputError
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run, Sweep
from peft_align.report import write_report
from peft_align.reporting import findings
from peft_align.store.runs import RunDir

WORDS = ["model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]"]
AXES = ["method=sft,dpo", "preference=harmless,helpful", "seed=0,1,2,3,4,5"]
Study = tuple[Sweep, findings.Findings]
Verb = Callable[..., "subprocess.CompletedProcess[str]"]
FILES = {
    *("cells.csv", "claims.csv", "comparisons.csv", "cost.csv", "coverage.csv", "failures.csv", "findings.md"),
    *("front.csv", "published.csv", "report.html"),
    *("results.csv", "results.md", "results.parquet", "variance.csv"),
}
LOADED = """
import sys
from peft_align import VERB
sys.argv = sys.argv[1:]
code = VERB.main()
unwanted = ("torch", "pandas", "scipy", "matplotlib", "wandb")
print("loaded:", *(name for name in unwanted if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def on_disk(root: Path, sweep: Sweep, fate: Callable[[Run], str]) -> None:
    """Every run done, failed or never begun; DPO scores 0.2 more than SFT."""
    for run in trained(sweep):
        if fate(run) == "done":
            finish_training(root, run)
        elif fate(run) == "failed":
            RunDir(root, run.id).fail("train", "OutOfMemoryError: too much", "out_of_memory")
    for item in plan(sweep, root):
        for request in item.requests:
            if request.key is not None:
                is_dpo = item.run.kind == "train" and item.run.choices["method"] == "dpo"
                value = 0.5 + 0.2 * is_dpo + noise(item.run, spread=0.01)
                finish_evaluation(root, request, [metric("acc", value)])


def a_third_gone(run: Run) -> str:
    """Of 24 training runs four failed and four never began."""
    if run.config.seed in (2, 4):
        return {"sft": "failed", "dpo": "missing"}[run.choices["method"]]
    return "done"


def shown(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def disturbed(tmp_path: Path) -> tuple[Path, str]:
    """The folder and the text of the report of a sweep of which a third is missing or failed."""
    asked = ask([*WORDS, *AXES, f"root={tmp_path}"])
    on_disk(tmp_path, asked.sweep, a_third_gone)
    text = write_report(asked, asked.plan())
    return asked.folder, text


def test_the_files_stand_beside_the_table(disturbed: tuple[Path, str]) -> None:
    folder, _ = disturbed
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES


def test_a_sweep_of_which_a_third_is_gone_is_told_honestly(disturbed: tuple[Path, str]) -> None:
    folder, text = disturbed
    assert "17 of 25 runs are complete, 4 failed, 4 are missing." in text
    assert "failed: 4 × train: OutOfMemoryError: too much" in text
    assert "least complete: seed=2 (0 of 4), seed=4 (0 of 4)" in text
    (compared,) = [row for row in shown(folder, "comparisons.csv") if row["comparison"] == "DPO against SFT"]
    assert (compared["cells"], compared["seeds_min"], compared["seeds_max"], compared["runs"]) == ("2", "4", "4", "16")
    assert compared["result"] == "higher"
    assert float(compared["low"]) < 0.2 < float(compared["high"])
    states = {
        (row["state"], row["reason"]): row["runs"] for row in shown(folder, "coverage.csv") if row["axis"] == "all"
    }
    assert states == {
        ("done", ""): "17",
        ("failed", "train: OutOfMemoryError: too much"): "4",
        ("missing", "train; evaluate everyday_mc"): "4",
    }
    assert {row["seeds"] for row in shown(folder, "cells.csv") if row["kind"] == "train"} == {"4"}
    sentences = (folder / "findings.md").read_text(encoding="utf-8")
    assert "- DPO against SFT, everyday_mc acc: higher (better) by 0." in sentences
    assert "(2 pairs of cells, 4 seeds, 16 runs)" in sentences
    assert "- QLoRA against LoRA: not enough runs (no pair of cells)." in sentences


def test_what_has_too_few_runs_is_not_told_as_a_finding(tmp_path: Path) -> None:
    asked = ask([*WORDS, *AXES, f"root={tmp_path}"])
    one_pair = lambda run: run.config.seed == 0 and run.choices["preference"] == "helpful"  # noqa: E731
    on_disk(tmp_path, asked.sweep, lambda run: "done" if one_pair(run) else "missing")
    text = write_report(asked, asked.plan())
    assert "0 differences shown" in text
    sentences = (asked.folder / "findings.md").read_text(encoding="utf-8")
    assert "DPO against SFT: not enough runs on everyday_mc acc (1 pair of cells, no second seed, 2 runs)" in sentences
    assert "higher" not in sentences.split("## Claims")[0]


def test_a_sweep_of_which_nothing_is_done_has_a_report(tmp_path: Path) -> None:
    asked = ask([*WORDS, *AXES, f"root={tmp_path}"])
    text = write_report(asked, asked.plan())
    assert "No results yet." in text
    assert "0 of 25 runs are complete, 25 are missing." in text
    assert "Not enough runs for 8 of 8 claims." in text
    assert shown(asked.folder, "cells.csv") == []


def test_a_claim_of_ones_own_is_in_the_report_of_the_sweep_that_was_started_last(tmp_path: Path, verb: Verb) -> None:
    """Without naming the sweep again: --config-dir adds to what the sweep was started with."""
    from peft_align.store.sweeps import write_manifest

    asked = ask([*WORDS, *AXES, f"root={tmp_path / 'outputs'}"])
    on_disk(tmp_path / "outputs", asked.sweep, lambda run: "done")
    write_manifest(asked.folder, asked.line.words, [], [run.id for run in asked.sweep.runs])
    contrast = "{cells: {method: dpo}, against: {method: sft}, benchmarks: everyday_mc, expect: better}"
    write_option(tmp_path / "mine", "report/claims/mine", f"dpo_wins: {{says: DPO wins, contrasts: [{contrast}]}}")
    found = verb("report", "--config-dir", "mine", check=True)
    assert "Claim dpo_wins: supported (of 1 parts 1 supported; published tables: not enough runs)." in found.stdout
    rows = [row for row in shown(asked.folder, "claims.csv") if row["claim"] == "dpo_wins"]
    assert [(row["results"], row["verdict"]) for row in rows] == [
        ("sweep", "supported"),
        ("published tables", "not enough runs"),
    ]
    assert "DPO wins: **supported**" in (asked.folder / "findings.md").read_text(encoding="utf-8")


def test_a_fault_of_a_claim_is_told_before_a_sweep_starts(tmp_path: Path, verb: Verb) -> None:
    write_option(tmp_path / "mine", "report/claims/mine", "wrong: {says: so, contrasts: [{cells: {metod: dpo}}]}")
    for name in ("sweep", "report"):
        found = verb(name, *WORDS, "--config-dir", "mine")
        assert found.returncode == 2
        assert "mine.yaml: wrong.contrasts[0].cells.metod" in found.stderr
        assert "did you mean 'method'?" in found.stderr
    assert not (tmp_path / "outputs").exists()


def test_tables_of_an_earlier_state_do_not_stay(tmp_path: Path) -> None:
    words = ["model=tiny", "dataset=beavertails", "peft=qlora", "evaluation.benchmarks=[mmlu]", "seed=0,1"]
    sweep = expand(*words)
    questions, rows = findings.load_questions(shipped()), table(sweep, lambda *_: 0.5)
    found = findings.find(shipped(), questions, sweep, done(sweep), rows)
    findings.write(found, tmp_path)
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["table4.tex"]
    nothing = findings.find(shipped(), questions, sweep, done(sweep), [])
    findings.write(nothing, tmp_path)
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(("name", "unwanted"), [("status", "scipy"), ("plan", "scipy"), ("report", "torch")])
def test_verbs_that_only_look_load_no_more_than_they_need(tmp_path: Path, name: str, unwanted: str) -> None:
    if name != "plan":  # which looks for how long like runs took
        on_disk(tmp_path / "outputs", expand(*WORDS, *AXES), a_third_gone)
    command = [sys.executable, "-c", LOADED.replace("VERB", name), name, *WORDS, *AXES]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    loaded = found.stderr.splitlines()[-1].split()
    assert not {unwanted, "wandb"} & set(loaded)
    assert name == "report" or loaded == ["loaded:"]


# --- a whole study


def effects(run: Run, benchmark: str, step: int) -> float:
    """The study's second finding, drawn: DPO helps instruction-tuned models and hurts the others."""
    level, spread = {"mmlu": (0.5, 0.005), "bbh": (0.4, 0.005)}.get(benchmark, (5.0, 0.1))
    if run.kind == "train" and run.choices["method"] == "dpo":
        level += spread * (4 if run.config.model.instruction_tuned else -4)
    return level + noise(run, benchmark, step, spread=spread)


@pytest.fixture(scope="module")
def study() -> Study:
    """The method grid, all of it, and what it shows."""
    sweep = expand("+grid=method")
    rows, questions = table(sweep, effects), findings.load_questions(shipped())
    return sweep, findings.find(shipped(), questions, sweep, done(sweep), rows)


def test_a_known_effect_is_supported_and_what_was_not_drawn_is_not(study: Study) -> None:
    verdicts = {verdict.claim.name: verdict.verdict for verdict in study[1].claims}
    assert verdicts["method_by_base"] == "supported"
    assert verdicts["better_data"] == "undecided"
    assert verdicts["lora_and_qlora"] == verdicts["mixture"] == verdicts["merging"] == "not enough runs"
    told = {(one.contrast.name, one.measure.benchmark): one for one in study[1].compared}
    assert {told["DPO against SFT", b].result for b in ("mmlu", "bbh", "alpaca_eval")} == {"no difference shown"}
    assert {told["BeaverTails against HH-RLHF", b].result for b in ("mmlu", "bbh")} == {"no difference shown"}


def test_the_variance_is_the_methods_and_the_models_together(study: Study) -> None:
    of_mmlu = {row["term"]: row for row in study[1].variance if row["benchmark"] == "mmlu"}
    assert of_mmlu["method × model"]["share"] == pytest.approx(of_mmlu["model"]["share"], abs=0.1)  # DPO alone has it
    assert of_mmlu["method × model"]["share"] + of_mmlu["model"]["share"] > 0.9
    assert of_mmlu["method × model"]["runs"] == 160
    assert of_mmlu["seeds"]["df"] == 128
    assert of_mmlu["dataset"]["p"] > 0.001


def test_the_front_is_within_each_model_and_over_all(study: Study) -> None:
    rows = [row for row in study[1].fronts if row["first"] == "mmlu acc" and row["second"] == "real_toxicity score"]
    assert {row["among"] for row in rows} == {"all", "llama_7b", "vicuna_7b", "mistral_7b", "mistral_7b_instruct"}
    own = [row for row in rows if row["among"] == "vicuna_7b" and row["kind"] == "train"]
    assert {row["cells"] for row in own} == {9}  # eight and their base
    assert all(row["probability"] == 0 for row in own if row["method"] == "sft")
    assert sum(row["probability"] for row in own if row["method"] == "dpo") >= 1


def test_the_summary_is_not_more_than_a_screen(study: Study) -> None:
    lines = findings.summary(study[1]).splitlines()
    assert len(lines) <= 24
    assert lines[0] == "164 of 164 runs are complete."


def test_every_sentence_of_a_comparison_says_what_it_rests_on(study: Study) -> None:
    text = findings.markdown(study[1]).split("## Comparisons")[1].split("Means over cells")[0]
    sentences = [line for line in text.splitlines() if line.startswith("- ")]
    assert sentences
    assert all("runs)" in line or "no pair of cells" in line for line in sentences)
    assert all("95% interval [" in line for line in sentences if "pairs of cells" in line)


def test_a_refused_report_says_what_is_wrong(tmp_path: Path) -> None:
    write_option(tmp_path / "mine", "report/comparisons/mine", "mine: {cells: {method: dpo}, against: parent}")
    asked = ask([*WORDS, "--config-dir", str(tmp_path / "mine"), f"root={tmp_path}"])
    with pytest.raises(InputError, match="did you mean 'parents'"):
        write_report(asked, [Item(run) for run in asked.sweep.runs])
