"""scripts/wandb_sync.py: which folders it takes, and how it goes on when an upload fails.

`wandb sync` itself needs a server, and none is to be had here: where an upload is tested, another program of that name
stands in for it, which marks folders as wandb does. The folders are real ones of wandb where the test says so.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from peft_align.config.schema import Wandb
from peft_align.store.leases import hold
from peft_align.training.tracking import tracking

SCRIPT = Path(__file__).parents[1] / "scripts" / "wandb_sync.py"


def later() -> float:
    """When nothing that is there was changed just now."""
    return time.time() + 1000


# Marks what it is given, notes each call, fails as it is told to: for a run's first N calls, or as one not logged in.
STAND_IN = """#!{python}
import os, pathlib, sys
assert sys.argv[1] == "sync", sys.argv
folders = [pathlib.Path(word) for word in sys.argv[2:]]
calls = pathlib.Path(os.environ["CALLS"])
with calls.open("a") as file:
    file.write(" ".join(folder.name for folder in folders) + "\\n")
if os.environ.get("NO_LOGIN"):
    print("wandb: Not authenticated.", file=sys.stderr)
    sys.exit(0)
for folder in folders:
    name = folder.name.rpartition("-")[2]
    if calls.read_text().count(name) <= int(os.environ.get(f"FAILS_{{name}}", 0)):
        print(f"wandb: ERROR cannot reach the server for {{name}}", file=sys.stderr)
        sys.exit(1)
    for log in folder.glob("*.wandb"):
        log.with_name(log.name + ".synced").touch()
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wandb_sync", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wandb_sync"] = module
    spec.loader.exec_module(module)
    return module


wandb_sync = load()


def offline_run(root: Path, run: str, second: int = 0, *, synced: bool = False, of: str = "runs/one") -> Path:
    """A folder as wandb leaves it."""
    folder = root / of / "tracking/wandb" / f"offline-run-20260101_0000{second:02d}-{run}"
    folder.mkdir(parents=True)
    (folder / f"run-{run}.wandb").write_bytes(b"log")
    if synced:
        (folder / f"run-{run}.wandb.synced").touch()
    return folder


def run_script(
    folder: Path, *words: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The script, with a stand-in for wandb first on the path."""
    program = folder / "bin/wandb"
    program.parent.mkdir(exist_ok=True)
    program.write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "CALLS": str(folder / "calls"), **(environment or {})}
    (folder / "calls").touch()
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=own, timeout=120)


def test_what_is_synced_or_no_offline_run_is_left_out_and_parts_of_a_run_stay_together(tmp_path: Path) -> None:
    late = offline_run(tmp_path, "a", 9, of="sweeps/s")
    early = offline_run(tmp_path, "a", 1, of="sweeps/s")
    other = offline_run(tmp_path, "b", 5)
    offline_run(tmp_path, "c", synced=True)
    online = tmp_path / "runs/two/tracking/wandb/run-20260101_000000-d"
    online.mkdir(parents=True)
    (online / "run-d.wandb").write_bytes(b"")
    found = wandb_sync.find(tmp_path, 60, later())
    assert found.runs == {"a": [early, late], "b": [other]}
    assert (found.synced, found.written) == (1, [])


def test_what_is_still_written_waits_and_so_does_the_rest_of_its_run(tmp_path: Path) -> None:
    old, fresh = offline_run(tmp_path, "a", 1), offline_run(tmp_path, "a", 2)
    other = offline_run(tmp_path, "b", 3)
    for folder in (old, other):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9, 1e9))
    found = wandb_sync.find(tmp_path, 60)
    assert found.runs == {"b": [other]}
    assert {folder for folder, _ in found.written} == {old, fresh}


def test_a_run_whose_training_is_at_work_waits_however_long_a_step_takes(tmp_path: Path) -> None:
    folder = offline_run(tmp_path, "a")
    with hold(tmp_path / "runs/one", None, None) as lease:
        assert lease is not None
        found = wandb_sync.find(tmp_path, 60, later())
        assert (found.runs, found.written) == ({}, [(folder, "its training is at work")])
    assert wandb_sync.find(tmp_path, 60, later()).runs == {"a": [folder]}


def test_real_offline_runs_of_a_training_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = Wandb(kind="wandb", project="p", entity=None, mode="offline")
    place = tmp_path / "outputs/runs/one/tracking"
    with tracking(tracker, group="s", name="one", axes={"seed": 0}, folder=place) as log:
        log({"loss": 0.5}, 1)
    found = wandb_sync.find(tmp_path / "outputs", 60, later())
    ((run, (folder,)),) = found.runs.items()
    assert folder.parent == place / "wandb"
    assert folder.name.startswith("offline-run-")
    assert folder.name.endswith(run)
    assert wandb_sync.find(tmp_path / "outputs", 1e6).runs == {}


def test_with_a_stand_in_for_wandb_each_run_is_uploaded_once_and_failures_are_tried_again(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    parts = [offline_run(root, "aa", second) for second in (1, 2)]
    fine, bad = offline_run(root, "bb", of="runs/two"), offline_run(root, "cc", of="runs/three")
    words = (str(root), "--quiet", "0", "--jobs", "2", "--retries", "1")
    done = run_script(tmp_path, *words, environment={"FAILS_aa": "2", "FAILS_cc": "9"})
    assert done.returncode == 1, done.stderr
    assert "2 runs uploaded, 1 failed, 0 were before, 0 still written" in done.stdout
    assert "failed: cc: wandb: ERROR cannot reach the server for cc" in done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(calls) == sorted([*2 * [f"{parts[0].name} {parts[1].name}"], fine.name, bad.name, bad.name])
    again = run_script(tmp_path, *words)
    assert (again.returncode, (tmp_path / "calls").read_text().splitlines()[len(calls) :]) == (0, [bad.name])
    assert "1 runs uploaded, 0 failed, 3 were before" in again.stdout


def test_with_a_stand_in_that_is_not_logged_in_success_is_not_believed_and_nothing_is_tried_again(
    tmp_path: Path,
) -> None:
    """`wandb sync` ends with 0 where nobody is logged in."""
    for i in range(6):
        offline_run(tmp_path / "outputs", f"r{i}", of=f"runs/{i}")
    words = (str(tmp_path / "outputs"), "--quiet", "0", "--jobs", "1")
    done = run_script(tmp_path, *words, environment={"NO_LOGIN": "1"})
    assert done.returncode == 1
    assert "set WANDB_API_KEY" in done.stderr
    assert "0 runs uploaded, 6 failed" in done.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) < 6


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    folder = offline_run(tmp_path / "outputs", "aa")
    done = run_script(tmp_path, str(tmp_path / "outputs"), "--quiet=0", "--dry-run")
    assert (done.returncode, (tmp_path / "calls").read_text()) == (0, "")
    assert f"would upload aa: {folder}" in done.stdout
    assert "1 runs would be uploaded" in done.stdout


def test_bad_words_end_with_2_and_help_has_three_examples(tmp_path: Path) -> None:
    for words in ([str(tmp_path / "nowhere")], [str(tmp_path), "--jobs", "0"]):
        assert run_script(tmp_path, *words).returncode == 2
    shown = run_script(tmp_path, "--help")
    assert shown.returncode == 0
    assert sum(line.strip().startswith("python scripts/wandb_sync.py") for line in shown.stdout.splitlines()) == 3
