"""What people wait for is linear in the number of runs: no verb opens more files for each run where there are more."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained

from peft_align import clean, report, status, sweep
from peft_align import plan as planning
from peft_align.grid.planner import Planner
from peft_align.launch.local import LocalLauncher
from peft_align.launch.watch import observe
from peft_align.store import records
from peft_align.store.runs import RunDir

WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "evaluation.benchmarks=[preference,everyday_mc]")
SIZES = (20, 40, 80)  # of more than 12 runs, samples of 12 are shown
# Records of training, of a failure, and of two evaluations, which the table reads once more.
OF_THE_SWEEP = 60  # its manifest; the report's tables and charts; the samples that it shows
MOST = {"status": 6, "plan": 6, "report": 8, "sweep": 8, "clean": 1}
VERBS: dict[str, Callable[[list[str]], int]] = {
    "status": status.verb,
    "plan": planning.verb,
    "report": report.verb,
    "sweep": sweep.verb,
    "clean": clean.verb,
}
_opened: list[str] | None = None  # what is opened while one counts


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        _opened.append(str(arguments[0]))


@functools.cache
def _watch() -> None:
    """For good, and thus not before it is needed: every test after it is a little slower."""
    sys.addaudithook(_hook)


@contextmanager
def opened(root: Path) -> Iterator[list[str]]:
    """The files under a root that are opened meanwhile, whether they are there or not; complete at the end."""
    global _opened
    _watch()
    found: list[str] = []
    _opened = []
    try:
        yield found
    finally:
        found += [path for path in _opened if path.startswith(str(root))]
        _opened = None


def words(root: Path, size: int) -> list[str]:
    return [*WORDS, f"seed=range({size})", f"root={root}"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Finished sweeps of several sizes, each in a root of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(records, "sync", lambda path: None)  # nothing is lost here that matters
        found = {}
        for size in SIZES:
            found[size] = root = tmp_path_factory.mktemp(f"of_{size}")
            asked = expand(*words(root, size))
            for run in trained(asked):
                finish_training(root, run, samples=8, tokens=800, seconds_per_step=1.0, seconds={"total": 1.0},
                                peak_memory_bytes={"resident": 1, "gpu": None})  # fmt: skip
            for item in plan(asked, root):
                for request in item.requests:
                    finish_evaluation(root, request, [metric("acc", 0.5)])
        yield found


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_opens_as_many_files_for_each_run_however_many_there_are(
    name: str, roots: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for size, root in roots.items():
        asked = [f"root={root}"] if name == "clean" else words(root, size)
        with opened(root) as found:
            assert VERBS[name](asked) == 0
        counts.append(len(found))
    more = [(counts[i + 1] - counts[i]) / (SIZES[i + 1] - SIZES[i]) for i in (0, 1)]
    assert more[0] == more[1]
    assert more[0] <= MOST[name]
    assert counts[0] <= MOST[name] * SIZES[0] + OF_THE_SWEEP
    assert f"{SIZES[-1] + 1} runs, {SIZES[-1] + 1} done" in capsys.readouterr().out or name != "sweep"


def test_runs_at_which_nothing_happens_are_not_read_again_and_again(tmp_path: Path) -> None:
    asked = expand(*WORDS, "seed=range(20)")
    items = plan(asked, tmp_path)
    for item in items:
        RunDir(tmp_path, item.run.id).path.mkdir(parents=True)
    launcher = LocalLauncher(asked, Planner(tmp_path, None), tmp_path / "sweeps/s")
    look = launcher._observe
    with opened(tmp_path) as found:
        launcher._states = look(items, None)
    assert len(found) >= len(items)
    everyone = {item.run.id for item in items}
    for only in (everyone, None):
        with opened(tmp_path) as found:
            assert look(items, only) == launcher._states
        assert found == []
    first, second = (RunDir(tmp_path, run.id) for run in trained(asked)[:2])
    finish_training(tmp_path, trained(asked)[0])
    second.fail("train", "RuntimeError: no")
    launcher._states = look(items, everyone)
    states = {state.run_id: state.state for state in launcher._states}
    assert states.pop(second.id) == "failed"
    assert set(states.values()) == {"waiting"}
    told = {state.run_id: state.detail for state in launcher._states}
    assert told[first.id].startswith("evaluate ")


def test_a_run_that_was_running_is_looked_at_whatever_its_folder_says(tmp_path: Path) -> None:
    asked = expand(*WORDS)
    items, (run,) = plan(asked, tmp_path), trained(asked)
    launcher = LocalLauncher(asked, Planner(tmp_path, None), tmp_path / "sweeps/s")
    directory = RunDir(tmp_path, run.id)
    with directory.lock() as mine:
        assert mine
        directory.report_progress(stage="train", step=1, of=4)
        launcher._states = launcher._observe(items, None)
    assert [state.state for state in launcher._states if state.run_id == run.id] == ["running"]
    assert [s.state for s in launcher._observe(items, None) if s.run_id == run.id] == ["lost"]  # its lock was let go


def test_status_reads_a_run_that_is_not_done_once(tmp_path: Path) -> None:
    asked = expand(*WORDS)
    item = plan(asked, tmp_path)[0]
    planner = Planner(tmp_path, None)
    with opened(tmp_path) as once:
        observe(planner, item, item)
    with opened(tmp_path) as twice:
        observe(planner, item)
    assert len(once) < len(twice)
