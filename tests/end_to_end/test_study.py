"""The whole study in miniature, on real data: every block, a kill in the middle, then what follows from it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand

from peft_align.grid.runs import Run
from peft_align.store.records import read_json


def kinds(runs: list[Run]) -> dict[str, int]:
    return dict(Counter(run.kind for run in runs))


def records(folder: Path) -> dict[str, int]:
    """Every finished record with its time stamp."""
    names = ("train.json", "merge.json", "record.json")
    found = [path for name in names for path in (folder / "outputs/runs").rglob(name) if "attempt" not in path.parts]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def table(folder: Path, sweep: str) -> list[dict[str, str]]:
    (path,) = (folder / "outputs/sweeps").glob(f"{sweep}-*/results.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.acceptance
def test_the_study_in_miniature_killed_once_then_selection_then_sft_then_dpo(
    mirror: Path, smollm2: Path, verb: Any, tmp_path: Path
) -> None:
    words = ("+grid=study_small", f"hub.mirror={mirror}")
    runs = expand(*words).runs
    assert kinds(runs) == {"train": 116, "merge": 10, "baseline": 4}

    command = [sys.executable, "-m", "peft_align.sweep", *words]
    with (tmp_path / "first.log").open("wb") as log:
        sweep = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        while sum(name.endswith("train.json") for name in records(tmp_path)) < len(runs) // 3:
            assert sweep.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(1)
        os.kill(sweep.pid, signal.SIGKILL)
        sweep.wait()
    time.sleep(5)  # its workers end with it
    before = records(tmp_path)

    verb("sweep", *words, check=True, timeout=3600)
    after = records(tmp_path)
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "outputs/runs").glob("*/attempt"))
    assert "130 runs, 130 done, 0 to do" in verb("sweep", *words, check=True).stdout
    assert records(tmp_path) == after

    rows = table(tmp_path, "study_small")
    assert {row["run_id"] for row in rows} == {run.id for run in runs}
    assert all(row["value"] and row["n"] for row in rows)
    assert {row["base"] for row in rows if row["kind"] == "merge"} == {"nf4 dequantized"}
    steps = {(row["run_id"], row["step"]) for row in rows if row["kind"] == "train"}
    assert Counter(step for _, step in steps) == {"1": 8, "2": 116}  # `quantity` is evaluated along the way
    assert {(row["step"], row["samples"]) for row in rows if row["kind"] == "train"} == {("1", "4"), ("2", "8")}

    search = ("+grid=rank_small", f"hub.mirror={mirror}")
    chosen = verb("select", *search, "select.by=[method]", check=True).stdout
    assert chosen.count("best") == 2
    selected = tmp_path / "outputs/selected/rank_small.yaml"
    small = [
        *words[1:],
        "train.batch_size=4", "train.max_steps=2", "train.max_length=256", "evaluation.heldout=16",
        "evaluation.benchmarks=[preference]", "model=smollm2_135m,tiny", "dataset=beavertails", "seed=0",
        f"+selected={selected}",
    ]  # fmt: skip
    verb("sweep", "+grid=sft_then_dpo", *small, check=True, timeout=3600)
    again = table(tmp_path, "sft_then_dpo")
    then = [run for run in expand("+grid=sft_then_dpo", *small).runs if run.kind == "train" and not run.is_parent_only]
    assert len(then) == 4
    assert {row["run_id"] for row in again if row["kind"] == "train"} == {run.id for run in then}
    for run in then:
        record = read_json(tmp_path / "outputs/runs" / run.id / "train.json")
        assert record is not None
        assert list(record["parents"]) == list(run.parents)
        assert "-sft-" in run.parents[0]


@pytest.mark.slow
def test_a_cut_of_it_trains_merges_and_evaluates_along_the_way(
    mirror: Path, smollm2: Path, verb: Any, tmp_path: Path
) -> None:
    words = (
        "+grid=study_small", f"hub.mirror={mirror}", "model=smollm2_135m", "dataset=beavertails", "peft=qlora",
        "seed=0", "method=sft", "peft.alpha=16",
    )  # fmt: skip
    assert kinds(expand(*words).runs) == {"train": 5, "merge": 2, "baseline": 1}
    verb("sweep", *words, check=True, timeout=1200)
    rows = table(tmp_path, "study_small")
    merged = [row for row in rows if row["kind"] == "merge"]
    assert {row["merge"] for row in merged} == {"slerp", "dare_ties"}
    assert {row["benchmark"] for row in merged} == {"preference/harmless", "preference/helpful", "everyday_mc"}
    assert {row["inputs"] for row in merged} == {"sft_harmless+sft_helpful"}
    assert len({row["run_id"] for row in rows if row["step"] == "1"}) == 2
