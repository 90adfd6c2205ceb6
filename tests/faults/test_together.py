"""Several sweeps of one root at once: each run is trained once, all of them end complete."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from audit import changes_in
from disturbed import Disturbed
from sweeps import WORDS, Started

from peft_align.store.runs import RunDir

Disturb = Callable[..., Disturbed]
SHARING = """
blocks:
  - axes: {method: [sft], preference: [harmless, helpful]}
    set: {model: tiny, dataset: everyday, peft: lora}
"""


def start(sweep: Disturbed, count: int, words: tuple[str, ...] = WORDS) -> list[Started]:
    begun = len(list(sweep.folder.glob("told-*")))
    return [sweep.server.start(sweep.folder, "sweep", *words, output=f"told-{begun + i}") for i in range(count)]


def trained_once(sweep: Disturbed) -> list[str]:
    """Runs whose training was put in its place more than once."""
    places = re.compile(re.escape(str(sweep.root)) + r"/runs/([^/]+)/train\.json")
    renamed = [found[1] for _, event, path in changes_in(sweep.folder / "changes") if event == "os.rename"
               and (found := places.fullmatch(path))]  # fmt: skip
    return [f"double: {run} was trained {n} times" for run, n in Counter(renamed).items() if n > 1]


def all_complete(sweep: Disturbed, started: list[Started]) -> None:
    for each in started:
        ended = each.wait()
        assert ended.code == 0, ended.told[-3000:]
    sweep.found += trained_once(sweep)


@pytest.mark.acceptance
@pytest.mark.parametrize("count", [2, 5])
def test_at_once(disturb: Disturb, count: int) -> None:
    sweep = disturb(f"{count} sweeps at once")
    all_complete(sweep, start(sweep, count))
    sweep.count = count
    sweep.end()


@pytest.mark.acceptance
@pytest.mark.parametrize("seconds", [1.0, 2.5, 5.0])
def test_one_of_them_is_killed(disturb: Disturb, seconds: float) -> None:
    sweep = disturb(f"3 sweeps at once, one killed after {seconds} s")
    first, *others = start(sweep, 3)
    time.sleep(seconds)
    first.kill("both")
    sweep.count = 1
    all_complete(sweep, others)
    first.wait()
    sweep.end()


@pytest.mark.acceptance
def test_two_grids_that_share_runs(disturb: Disturb) -> None:
    sweep = disturb("two grids that share runs, at once")
    (sweep.folder / "mine/grid/sharing.yaml").write_text(SHARING)
    other = tuple("+grid=sharing" if word == "+grid=faulty" else word for word in WORDS)
    all_complete(sweep, [*start(sweep, 1), *start(sweep, 1, other)])
    sweep.count = 2
    (folder,) = (sweep.root / "sweeps").glob("sharing-*")
    assert (folder / "results.csv").is_file()
    folder.rename(sweep.folder / "elsewhere")
    sweep.end()


def fake_stale_holder(root: Path, run_id: str) -> None:
    """Leave what a worker of another machine leaves that lost its power in the middle of a run."""
    directory = RunDir(root, run_id)
    directory.report_progress(stage="train", step=1, of=3)
    progress = json.loads((directory.path / "progress.json").read_text())
    progress |= {"pid": 4_000_000, "host": "another-machine", "time": time.time() - 86400}
    del progress["seal"]
    (directory.path / "progress.json").write_text(json.dumps(progress))
    (directory.path / "lock").touch()


@pytest.mark.acceptance
def test_what_a_dead_worker_of_another_machine_left(disturb: Disturb, reference: dict[str, object]) -> None:
    sweep = disturb("a run that a dead machine held")
    for run_id in sorted({name.split("/")[1] for name in reference if name.startswith("runs/")}):
        fake_stale_holder(sweep.root, run_id)
        sweep.count += 1
    sweep.end()
