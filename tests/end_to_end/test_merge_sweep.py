"""Merges in a sweep, on the tiny model: made after their inputs, looked at again with them, saved beside the recipe."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from peft_align.store.records import read_json

GRID = """
blocks:
  - name: merges
    kind: merge
    axes: {merge: [linear, dare_ties]}
    inputs:
      - [{method: sft, preference: harmless}, {method: dpo, preference: helpful}]
    set:
      model: tiny
      dataset: everyday
      peft: qlora
      train.max_steps: 2
      train.batch_size: 2
      train.max_length: 200
      evaluation.benchmarks: [preference, everyday_mc]
      evaluation.heldout: 4
      evaluation.limit: 3
"""


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    """The command line of a grid of two merges of two runs."""
    (tmp_path / "mine/grid").mkdir(parents=True)
    (tmp_path / "mine/grid/merges.yaml").write_text(GRID)
    return ("--config-dir", "mine", "+grid=merges", "launcher.threads=1")


def records(folder: Path, name: str) -> dict[str, Any]:
    """The records of this name by run."""
    found = {path.parent.name: read_json(path) for path in sorted((folder / "outputs/runs").glob(f"*/{name}"))}
    assert all(found.values())
    return found


@pytest.mark.slow
def test_merges_follow_their_inputs(verb: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    verb("sweep", *words, "launcher.workers=2", check=True)
    before = records(tmp_path, "merge.json")
    assert len(before) == 2
    with next((tmp_path / "outputs/sweeps").glob("*/results.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"merge", "baseline"}
    assert {row["inputs"] for row in rows if row["kind"] == "merge"} == {"sft_harmless+dpo_helpful"}
    assert {row["base"] for row in rows} == {"nf4 dequantized", "nf4"}
    told = {row["benchmark"] for row in rows if row["kind"] == "merge"}
    assert told == {"preference/harmless", "preference/helpful", "everyday_mc"}

    # A damaged input: the merge that would read it fails, the next command trains the input again and merges anew.
    (parent, *_) = next(iter(before.values()))["parents"]
    weights = tmp_path / "outputs/runs" / parent / "adapter/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    for copy in (weights, tmp_path / "outputs/runs" / parent / "checkpoints/step-000002" / weights.name):
        copy.unlink()  # two names of one file
        copy.write_bytes(content)
    assert verb("sweep", *words, "evaluation.limit=2").returncode == 1
    again = verb("sweep", *words, "evaluation.limit=2", check=True).stdout
    assert "2 merge" not in again
    assert records(tmp_path, "train.json")[parent]["finished"]
    assert set(records(tmp_path, "merge.json")) == set(before)
    status = verb("status", *words, "evaluation.limit=2", check=True).stdout
    assert "5 done" in status


@pytest.mark.slow
def test_a_merge_is_looked_at_again_when_one_of_its_inputs_is_made_again(
    verb: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    verb("sweep", *words, check=True)
    before = records(tmp_path, "merge.json")
    (parent, *_) = next(iter(before.values()))["parents"]
    (tmp_path / "outputs/runs" / parent / "adapter/adapter_config.json").unlink()
    known = set((tmp_path / "outputs/sweeps").glob("*/jobs/*.json"))
    assert "4 done, 1 to do" in verb("sweep", *words, check=True).stdout
    jobs = [read_json(path) or {} for path in set((tmp_path / "outputs/sweeps").glob("*/jobs/*.json")) - known]
    assert {run["id"] for job in jobs for run in job["runs"]} == {parent, *before}
    assert records(tmp_path, "merge.json") == before  # the same adapter came of it: the merges stand
    assert "5 done, 0 to do" in verb("sweep", *words, check=True).stdout


@pytest.mark.slow
def test_what_is_saved_of_a_merge_lies_beside_its_recipe_and_is_not_made_twice(
    here: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    words = (*(word for word in words if not word.startswith("launcher.")), "launcher=debug")
    linear = (*words, "merge=linear")
    here("sweep", *linear, "merge.save=adapter", check=True)
    here("sweep", *linear, "merge.save=full", check=True)
    (record,) = records(tmp_path, "merge.json").values()
    assert set(record["saved"]) == {"adapter", "full"}
    (run,) = records(tmp_path, "merge.json")
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "outputs/runs" / run / "merged").rglob("*"))]
    for form in ("adapter", "full"):
        assert ", 0 to do" in here("sweep", *linear, f"merge.save={form}", check=True).stdout
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "outputs/runs" / run / "merged").rglob("*"))]
    assert again == stamps

    refused = here("sweep", *words, "merge=dare_ties", "merge.save=adapter", "merge.save_rank=2")
    assert refused.returncode == 1
    assert "merge.save=full keeps all of it" in refused.stdout
    rows = (next((tmp_path / "outputs/sweeps").glob("*/results.csv")).parent.parent).glob("*/results.csv")
    assert any("dare_ties" in path.read_text() for path in rows)  # it is scored all the same
