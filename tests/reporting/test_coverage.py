"""What of a sweep is there: counts by axis, value, state and reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sweeping import expand, write_option

from peft_align.config.compose import ConfigSpace
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run, Sweep
from peft_align.reporting.coverage import COLUMNS, Coverage, coverage

TINY = ("model=tiny", "dataset=everyday", "peft=lora", "evaluation.benchmarks=[everyday_mc]")
GRID = """
blocks:
  - name: main
    axes: {dataset: [everyday, beavertails], preference: [harmless, mixture], method: [sft, dpo], seed: [0, 1, 2]}
    exclude:
      - {where: {dataset: everyday, preference: mixture}, reason: it has no mixture}
    set: {model: tiny, peft: lora, evaluation.benchmarks: [everyday_mc]}
"""


def items(sweep: Sweep, state: Callable[[Run], str]) -> list[Item]:
    """The sweep's runs, each done, failed for a reason, or missing."""
    found = []
    for run in sweep.runs:
        is_in = state(run)
        failed = None if is_in in ("done", "missing") else f"train: {is_in}"
        found.append(Item(run, to_make=None if is_in == "done" else "train", failure=failed))
    return found


def grid(folder: Path) -> Sweep:
    write_option(folder, "grid/mine", GRID)
    return expand("+grid=mine", space=ConfigSpace([folder]))


def disturbed(run: Run) -> str:
    """DPO ran out of memory for two of three seeds, and one is not begun."""
    if run.kind == "baseline" or run.choices["method"] == "sft":
        return "done"
    return {0: "missing", 1: "out of memory", 2: "out of memory"}[run.config.seed]


def test_every_run_is_counted_once_with_its_state_and_reason(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    found = coverage(sweep, items(sweep, disturbed))
    assert found.of() == {"done": 10, "failed": 6, "missing": 3, "excluded": 6}
    assert found.of("kind", "train") == {"done": 9, "failed": 6, "missing": 3}
    assert found.of("kind", "baseline") == {"done": 1}
    assert found.reasons("failed") == {"train: out of memory": 6}
    assert found.reasons("missing") == {"train": 3}
    assert found.reasons("excluded") == {"it has no mixture": 6}


def test_the_axes_that_vary_have_counts_of_their_own(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    found = coverage(sweep, items(sweep, disturbed))
    assert found.of("method", "dpo") == {"failed": 6, "missing": 3, "excluded": 3}
    assert found.of("method", "sft") == {"done": 9, "excluded": 3}
    assert found.of("dataset", "everyday") == {"done": 3, "failed": 2, "missing": 1, "excluded": 6}
    assert found.of("seed", "1") == {"done": 3, "failed": 3, "excluded": 2}
    assert {axis for axis, *_ in found.counts} == {"all", "kind", "dataset", "preference", "method", "seed"}


def test_rows_are_long_and_have_the_columns_of_the_file(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    rows = coverage(sweep, items(sweep, disturbed)).rows()
    assert all(list(row) == COLUMNS for row in rows)
    assert rows[0] == {"axis": "all", "value": "", "state": "done", "reason": "", "runs": 10}
    for axis in ("dataset", "preference", "method", "seed"):
        counted = sum(row["runs"] for row in rows if row["axis"] == axis and row["state"] != "excluded")
        assert counted == 18, axis


def test_the_text_says_how_much_is_there_why_the_rest_is_not_and_where_most_is_lacking(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    assert coverage(sweep, items(sweep, disturbed)).text() == (
        "10 of 19 runs are complete, 6 failed, 3 are missing; 6 cells are excluded.\n"
        "  failed: 6 × train: out of memory\n"
        "  missing: 3 × train\n"
        "  excluded: 6 × it has no mixture\n"
        "  least complete: method=dpo (0 of 9)\n"
    )


def test_a_sweep_that_is_done_says_only_that(tmp_path: Path) -> None:
    sweep = expand(*TINY, "seed=0,1")
    assert coverage(sweep, items(sweep, lambda run: "done")).text() == "3 of 3 runs are complete.\n"


def test_many_reasons_are_cut_short() -> None:
    sweep = expand(*TINY, "seed=range(0,6)")
    found = coverage(sweep, items(sweep, lambda run: f"reason {run.config.seed}"))
    (line,) = [line for line in found.text().splitlines() if "failed:" in line]
    assert line.count("reason ") == 3
    assert line.endswith("3 further reasons")


def test_parents_that_a_sweep_only_needs_are_not_its_runs() -> None:
    sweep = expand(*TINY, "method=dpo", "method.init=sft", "seed=0")
    assert [run.is_parent_only for run in sweep.runs if run.kind == "train"] == [True, False]
    assert coverage(sweep, items(sweep, lambda run: "done")).of() == {"done": 2}


def test_nothing_planned_is_no_division_by_nothing() -> None:
    assert Coverage({}).text() == "0 of 0 runs are complete.\n"
