"""`report` beyond one sweep of this root: several sweeps together, runs of several roots, tables alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sweeping import finish_evaluation, finish_training, metric, plan, shipped, trained

from peft_align.cli import Asked, ask
from peft_align.errors import InputError
from peft_align.report import verb, write_report
from peft_align.reported import wanted
from peft_align.reporting.latex import tables
from peft_align.reporting.published import as_results
from peft_align.store import records
from peft_align.store.sweeps import write_manifest

WORDS = ("model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]")
AXES = ("method=sft,dpo", "peft.r=4,8")
OF_RUNS = ("coverage.csv", "findings.md", "cost.csv", "failures.csv")  # what more is known of than a table says


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(records, "sync", lambda path: None)


def done(root: Path, *words: str) -> Asked:
    """A sweep that is done, with its manifest; DPO scores more than SFT, and each run differently."""
    asked = ask([*WORDS, *words, f"root={root}"])
    for run in trained(asked.sweep):
        finish_training(root, run)
    for item in plan(asked.sweep, root):
        for request in item.requests:
            of_method = 0.25 * (item.run.kind == "train" and item.run.choices["method"] == "dpo")
            own = item.run.config.seed / 64 + int(item.run.id[-2:], 16) / 2**14
            finish_evaluation(root, request, [metric("acc", 0.25 + of_method + own), metric("acc_norm", float("nan"))])
    write_manifest(asked.folder, asked.line.words, [], [run.id for run in asked.sweep.runs])
    return asked


def files(folder: Path, without: Sequence[str] = ()) -> dict[str, bytes]:
    """The tables and texts that were written."""
    found = (path for path in folder.rglob("*") if path.suffix in (".csv", ".md", ".tex") and path.name not in without)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def in_any_order(found: dict[str, bytes]) -> dict[str, list[str]]:
    """Lines in another order; sums in another order differ in their last digits."""

    def rounded(text: str) -> str:
        return re.sub(r"-?\d+\.\d{6,}(e-?\d+)?", lambda number: f"{float(number[0]):.9g}", text)

    return {name: sorted(rounded(content.decode()).splitlines()) for name, content in found.items()}


def told(*words: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        wanted(words).source.subject()
    return [str(fault) for fault in caught.value.faults]


def test_a_table_alone_shows_what_its_sweep_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = done(tmp_path / "outputs", *AXES, "seed=0,1,2")
    write_report(asked, asked.plan())
    here = files(asked.folder, OF_RUNS)
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    shutil.move(asked.folder / "results.parquet", alone)
    shutil.rmtree(tmp_path / "outputs")
    monkeypatch.chdir(alone)
    assert verb(["--from", "results.parquet"]) == 0
    assert files(alone / "results_report", OF_RUNS) == here
    sentences = (alone / "results_report/findings.md").read_text(encoding="utf-8")
    assert "13 runs have results in the table; what is missing, failed or was excluded, it does not say." in sentences
    assert "DPO against SFT, everyday_mc acc: higher (better)" in sentences
    assert verb(["--from", "results_report/results.parquet", "--to", "again"]) == 0
    assert files(alone / "again") == files(alone / "results_report")


def test_the_published_numbers_have_a_report_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert verb(["--published"]) == 0
    folder = tmp_path / "outputs/sweeps/reports/published"
    for name, text in tables(as_results(shipped())).items():
        assert (folder / "tables" / name).read_text(encoding="utf-8") == text
    sentences = (folder / "findings.md").read_text(encoding="utf-8")
    assert "These are the published numbers, so that there is nothing to set them against." in sentences
    assert "QLoRA and LoRA behave alike: **undecided** (of 4 parts 2 supported; cells only, no seeds" in sentences
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("; cells only, no seeds; not evaluated: red_instruct") == 2 * 6  # sentences, and the table
    for true in (
        "runs in the table",
        "A table alone does not say what failed.",
        '<th scope="col">published tables</th>',
    ):
        assert page.count(true) == 1
    for false in ("runs complete", "No run failed.", "opens what is behind it", "this sweep"):
        assert false not in page.partition("<script")[0]
    assert verb(["--from", str(folder / "results.parquet"), "--to", "again"]) == 0
    assert in_any_order(files(tmp_path / "again")) == in_any_order(files(folder))


def test_two_sweeps_together_show_what_one_sweep_of_both_grids_does(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    whole = done(root, *AXES, "seed=0,1,2")
    halves = [done(root, *AXES, "seed=0,1"), done(root, *AXES, "seed=1,2")]
    write_report(whole, whole.plan())
    to = tmp_path / "together"
    assert verb(["--sweeps", *(half.folder.name for half in halves), f"root={root}", "--to", str(to)]) == 0
    assert in_any_order(files(to, ["results.md"])) == in_any_order(files(whole.folder, ["results.md"]))


def test_of_a_run_under_two_roots_what_is_there_in_one_is_not_missing(tmp_path: Path) -> None:
    first, second = (done(tmp_path / name, *AXES, f"seed={seeds}") for name, seeds in (("a", "0,1"), ("b", "1,2")))
    twice = next(run for run in trained(first.sweep) if run.config.seed == 1)
    shutil.rmtree(first.root / "runs" / twice.id)
    subject = wanted(["--sweeps", str(first.folder), str(second.folder)]).source.subject()
    assert subject.covered.of() == {"done": 13}
    assert len(subject.table) == len({(row["run_id"], row["metric"]) for row in subject.table}) == 26
    assert subject.folder.parent == first.root / "sweeps/reports"


def test_two_tables_together_have_a_run_of_both_once(tmp_path: Path) -> None:
    paths = []
    for name, seeds in (("a", "0,1"), ("b", "1,2")):
        asked = done(tmp_path / name, *AXES, f"seed={seeds}")
        write_report(asked, asked.plan())
        paths.append(str(asked.folder / "results.parquet"))
    subject = wanted(["--from", *paths, "--to", str(tmp_path / "to")]).source.subject()
    assert (len(subject.table), len(subject.frame.runs)) == (26, 13)
    assert {type(row["peft.r"]) for row in subject.table if row["kind"] == "train"} == {int}


def test_all_faults_of_a_table_are_told_at_once(tmp_path: Path) -> None:
    asked = done(tmp_path / "outputs", *AXES)
    write_report(asked, asked.plan())
    good = pq.read_table(asked.folder / "results.parquet")
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    names = [name for name in good.column_names if name not in ("metric", "n")]
    text = pa.array(["high"] * good.num_rows)
    pq.write_table(good.select(names).set_column(names.index("value"), "value", text), one)
    other = pa.array([float("inf"), *good["stderr"].to_pylist()[1:]])
    runs = pa.array([None, "nobody", *good["run_id"].to_pylist()[2:]])
    changed = good.set_column(good.column_names.index("stderr"), "stderr", other)
    pq.write_table(changed.set_column(0, "run_id", runs), two)
    found = told("--from", str(one), str(two), str(tmp_path / "none.parquet"), str(asked.folder / "results.csv"))
    assert [fault.split(": ", 1)[1].split(" (")[0] for fault in found] == [
        "lacks columns: metric, n",
        "value: is string, not float64",
        "run_id: is empty in 1 rows, counted from 0: 0",
        "stderr: is not finite in 1 rows, counted from 0: 0",
        "run_id: is no run of the sweep that the file is of in 1 rows, counted from 0: 1",
        "there is no such file",
        "is a CSV: it has no types, and does not say what the sweep was",
    ]


def test_the_folder_of_a_sweep_is_never_written_over(tmp_path: Path) -> None:
    asked = done(tmp_path / "outputs", *AXES)
    (fault,) = told(f"root={tmp_path / 'outputs'}", "--to", str(asked.folder))
    assert "is the folder of a sweep" in fault
