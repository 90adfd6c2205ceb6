"""The benchmarks run, in small, from a copy of their own: what they measure then is worth nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The benchmarks beside an empty page."""
    shutil.copytree(REPOSITORY / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/performance.md").write_text("# Performance\n", encoding="utf-8")
    return tmp_path


def result(copy: Path, name: str, *words: str) -> tuple[dict[str, object], str]:
    """The JSON that a benchmark leaves, and the page."""
    command = [sys.executable, str(copy / "benchmarks" / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (copy / "benchmarks/results").glob("*.json")
    return json.loads(path.read_text(encoding="utf-8")), (copy / "docs/performance.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_dpo_vs_trl_trains_the_same_steps_by_both_engines(copy: Path, mirror: Path) -> None:
    words = ("--model", "tiny", "--dtype", "fp32", "--batch", "2", "--steps", "2", "--rounds", "1")
    found, page = result(copy, "dpo_vs_trl", "--mirror", str(mirror), *words)
    rounds = found["rounds"]
    assert isinstance(rounds, dict)
    ours, theirs = rounds["packed"][0], rounds["trl 1"][0]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], abs=1e-4)
    assert [step["gradient"] for step in ours] == pytest.approx([step["gradient"] for step in theirs], rel=1e-3)
    assert "| TRL, micro-batch 1 |" in page


@pytest.mark.slow
def test_step_profile_accounts_for_the_whole_step(copy: Path, mirror: Path) -> None:
    found, page = result(copy, "step_profile", "--mirror", str(mirror), "--model", "tiny", "--batch", "2")
    parts = found["parts"]
    assert isinstance(parts, dict)
    assert sum(parts.values()) == pytest.approx(found["seconds"])
    assert all(parts[name] > 0 for name in ("linear layers with LoRA", "attention", "norms", "optimizer"))
    assert "| attention |" in page


@pytest.mark.acceptance
def test_a_sweep_and_a_loop_of_scripts_come_to_the_same_numbers(copy: Path, mirror: Path) -> None:
    words = ("--model", "tiny", "--dtype", "fp32", "--ranks", "4", "--seeds", "0", "--steps", "2", "--batch", "4")
    more = ("--micro-batch", "2", "--subjects", "anatomy", "--limit", "4")
    found, page = result(copy, "sweep_vs_scripts", "--mirror", str(mirror), *words, *more)
    rounds = found["rounds"]
    assert isinstance(rounds, dict)
    ours, theirs = rounds["sweep"][0]["runs"], rounds["scripts"][0]["runs"]
    assert ours.keys() == theirs.keys() == {"sft-r4-s0", "dpo-r4-s0"}
    for name, run in ours.items():
        assert run["losses"] == pytest.approx(theirs[name]["losses"], abs=1e-4)
        assert run["scores"] == theirs[name]["scores"]
    assert "2 of 2 accuracies are equal" in page


def test_interval_coverage_writes_its_table_into_the_page_of_the_results(copy: Path) -> None:
    page = copy / "docs/results.md"
    marks = "<!-- interval_coverage -->\n<!-- end of interval_coverage -->"
    page.write_text(f"# Results\n\n{marks}\n\nMore.\n", encoding="utf-8")
    command = [sys.executable, str(copy / "benchmarks/interval_coverage.py"), "--simulations", "4"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    text = page.read_text(encoding="utf-8")
    assert text.endswith("--simulations 4`\n\n<!-- end of interval_coverage -->\n\nMore.\n")
    assert "| t over seeds | one cell, 5 seeds | " in text
    assert "| percentile bootstrap | one cell, 5 seeds | " in text
