"""A sweep that is killed at any moment, wholly or in part, is ended by the same command as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit import Fault
from disturbed import OUTCOMES, Disturbed, Outcome, changes_of, seed, sum_up
from sweeps import ENVIRONMENT, WORDS, differences, finished, prepare, touched

Disturb = Callable[..., Disturbed]
INSTANTS = 12  # for each of sweep, worker, both
ANY_CHANGE = int(os.environ.get("FAULTS_KILLS") or 40)  # kills at changes that are drawn


@pytest.mark.slow
def test_a_few_kills(disturb: Disturb, undisturbed: Path) -> None:
    """The cut of what follows."""
    sweep, draw, changes = disturb("kill at a change (cut)"), random.Random(seed()), changes_of(undisturbed)
    for do, who in (("kill_all", "worker"), ("kill", "sweep"), ("kill", "worker"), ("kill_parent", "worker")):
        sweep.command(Fault(at=changes_of(sweep.folder) + draw.randrange(changes // 4), do=do, who=(who,)))
        sweep.count += 1
    sweep.command(Fault(match=r"os\.rename .*/train\.json$", do="half"))
    sweep.count += 1
    sweep.end()


@pytest.mark.acceptance
@pytest.mark.parametrize("who", ["sweep", "worker", "both"])
def test_killed_at_any_instant(disturb: Disturb, who: str) -> None:
    sweep, draw = disturb(f"SIGKILL of {who} at an instant"), random.Random(seed())
    for _ in range(INSTANTS):
        sweep.killed_after(draw.uniform(0.2, 4.0), who)
    sweep.end()


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("do", "who"),
    [
        ("kill_all", ("worker",)),
        ("kill_parent", ("worker",)),
        ("kill", ("worker",)),
        ("kill", ("sweep",)),
        ("half", ()),
    ],
    ids=["both", "sweep by a worker's change", "worker", "sweep", "in the middle of a write"],
)
def test_killed_at_the_first_change_of_each_kind(disturb: Disturb, do: str, who: list[str], request: Any) -> None:
    sweep = disturb(f"SIGKILL at each kind of change: {request.node.callspec.id}")
    sweep.at_each_kind(do, tuple(who))
    sweep.end()


@pytest.mark.acceptance
def test_killed_at_changes_that_are_drawn(
    disturb: Disturb, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw, changes, since = random.Random(seed()), changes_of(undisturbed), len(OUTCOMES)
    for _ in range(ANY_CHANGE):
        at, do = draw.randrange(changes), draw.choice(["kill_all", "kill", "half"])
        sweep = disturb(f"{do} at change {at}", tmp_path_factory.mktemp("drawn"))
        sweep.command(Fault(at=at, do=do))
        sweep.count = 1
        sweep.end()
    sum_up("SIGKILL at changes that are drawn, each in a sweep of its own", since)


@pytest.mark.acceptance
def test_processes_that_are_started_as_people_start_them(reference: dict[str, Any], tmp_path: Path) -> None:
    """The same without forks of a process that has everything imported."""
    folder, found = prepare(tmp_path), []
    log = folder / "changes"

    def sweep(fault: Fault) -> subprocess.CompletedProcess[str]:
        fault.watch, fault.log = [str(folder / "outputs")], str(log)
        environment = {**os.environ, **ENVIRONMENT, "PEFT_ALIGN_CACHE": str(folder / "cache"), **fault.environment()}
        command = [sys.executable, "-m", "peft_align.sweep", *WORDS]
        kept = finished(folder / "outputs")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        time.sleep(1)  # a worker dies with its sweep
        found.extend(touched(folder / "outputs", kept))
        return done

    places = (r"os\.rename .*/state$", r"os\.rename .*/train\.json$", r"os\.rename .*/record\.json$")
    for place, do in zip(places, ("kill_all", "kill_parent", "kill"), strict=True):
        sweep(Fault(match=place, nth=2, do=do, who=("worker",)))
    done = sweep(Fault())
    found += differences(folder / "outputs", reference)
    OUTCOMES.append(Outcome("SIGKILL of processes of their own", 3, found))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert found == []
