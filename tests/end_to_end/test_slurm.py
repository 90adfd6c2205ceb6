"""Sweeps on a real Slurm: the same results as here, whatever the cluster does to the jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from slurm_cluster import (
    LONG,
    ON_SLURM,
    TINY,
    Cluster,
    Run,
    cluster,
    kinds,
    local,
    progress,
    rows,
    run_dirs,
    said_of,
    trajectory,
    verbs,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(shared: Path) -> Iterator[Cluster]:
    with cluster(shared, CPUS=16, NODES=2, PORT=17817) as running:
        yield running


@pytest.fixture
def on_slurm(slurm: Cluster, tmp_path: Path) -> Iterator[Run]:
    yield from verbs(slurm, tmp_path)


def test_twelve_runs_with_parents_give_the_same_table_as_on_this_machine(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    words = [
        *TINY, "method=sft,dpo", "method.init=sft", "peft=lora,qlora", "seed=0,1,2", "train.max_steps=3",
    ]  # fmt: skip
    local(tmp_path / "local", *words)
    done = on_slurm("sweep", *words, *ON_SLURM, "launcher.runs_per_task=3", "launcher.follow=true")
    assert "14 done" in done.stdout
    table = rows(tmp_path)
    assert len({row["run_id"] for row in table if row["kind"] == "train"}) == 12
    assert table == rows(tmp_path / "local")
    assert "14 runs, 14 done, 0 to do" in on_slurm("sweep", *words, *ON_SLURM).stdout
    assert not slurm.queue()


def test_whatever_the_cluster_does_is_recorded_and_the_same_command_completes_the_same_runs(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    sweep = [*LONG, "train.max_steps=400", "seed=range(0,4)"]
    words = [*sweep, "launcher.attempts=5", *ON_SLURM, "resources.partition=low"]
    local(tmp_path / "local", *sweep)
    on_slurm("sweep", *words)
    (job,) = {task.partition("_")[0] for task in slurm.queue() if "_" in task and task.endswith("_3")}
    runs = tmp_path / "outputs" / "runs"
    at: dict[int, Path] = {}

    def started() -> bool:
        for path in runs.iterdir() if runs.is_dir() else ():
            task = progress(path).get("task")
            if task and task.startswith(f"{job}_") and progress(path).get("step", 0) > 25:
                at[int(task.partition("_")[2])] = path
        return set(at) == set(range(4))

    slurm.wait(started, 300)
    # 0: queued again by an administrator; 1: its time limit comes near; 2: killed; 3: made to fail
    slurm.call("scontrol", "requeue", f"{job}_0")
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_1")
    os.kill(int(progress(at[2])["pid"]), signal.SIGKILL)
    (at[3] / "attempt").rename(tmp_path / "gone")  # what it writes its metrics into; at once, as it goes on writing
    slurm.wait(lambda: "killed" in said_of(on_slurm, words, at[2]), 120)
    slurm.wait(lambda: (at[3] / "failed.json").is_file(), 120)
    slurm.drained(600)
    again = on_slurm("sweep", *words, "launcher.follow=true")
    assert "5 done" in again.stdout
    assert "requeued" in kinds(at[0])
    assert "time_limit" in kinds(at[1])
    assert "killed" in kinds(at[2])
    assert "failed" in kinds(at[3])
    for run in run_dirs(tmp_path):
        assert trajectory(run) == trajectory(tmp_path / "local/outputs/runs" / run.name)


def test_cancel_ends_the_jobs_of_this_sweep_only_or_those_of_the_named_values(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    first = [*LONG, "train.max_steps=100001", *ON_SLURM]
    mine = [*LONG, "train.max_steps=100000", "seed=0,1,2", *ON_SLURM]
    on_slurm("sweep", *first)
    slurm.wait(lambda: "1 done" in on_slurm("status", *first).stdout, 120)  # the baseline's evaluation
    slurm.wait(lambda: len(slurm.queue()) == 2, 60)  # its task has ended too: the training and the report are left
    others = set(slurm.queue())
    on_slurm("sweep", *mine)
    assert len(slurm.queue()) == len(others) + 4  # three trainings and the report; the baseline is done
    slurm.wait(lambda: " 3 running" in on_slurm("status", *mine).stdout.replace(":", ""), 120)
    assert "1 tasks of 1 runs cancelled" in on_slurm("cancel", *LONG, "train.max_steps=100000", "seed=1").stdout
    slurm.wait(lambda: "Slurm says CANCELLED" in on_slurm("status", *mine).stdout, 60)
    assert "2 tasks of 2 runs cancelled" in on_slurm("cancel", *mine).stdout
    slurm.wait(lambda: set(slurm.queue()) <= others, 60)
    assert set(slurm.queue()) == others


def test_five_hundred_runs_are_submitted_with_one_call_for_each_stage(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    calls, shim = tmp_path / "calls", tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {shutil.which("sbatch")} "$@"\n')
    shim.chmod(0o755)
    words = [*TINY, "method=sft,dpo", "peft=lora", "train.max_steps=1", "seed=range(0,250)", *ON_SLURM]
    path = f"{shim.parent}:{slurm.env['PATH']}"
    begun = time.time()
    on_slurm("sweep", *words, "resources.extra=[--hold]", PATH=path)
    print(f"500 runs submitted in {time.time() - begun:.1f} s")
    submitted = [line for line in calls.read_text().splitlines() if "--test-only" not in line]
    # MaxArraySize is 100 here: six chunks of trainings, then the baseline's evaluation and the report
    assert len(submitted) == 8
    slurm.wait(lambda: len(slurm.queue()) == 502, 60)
    assert "nothing to submit" in on_slurm("sweep", *words, "resources.extra=[--hold]").stdout
    on_slurm("cancel", *words)
    slurm.drained(120)


def test_what_is_edited_after_submission_changes_no_job_that_waits(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("src", "conf", "slurm"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = [*TINY, "method=sft", "peft=lora", "train.max_steps=2", *ON_SLURM]
    on_slurm("sweep", *words, "resources.extra=[--hold]", PYTHONPATH=str(checkout / "src"))
    for path in (checkout / "src").rglob("*.py"):
        path.write_text("raise SystemExit('edited')\n")
    shutil.rmtree(checkout / "conf")
    slurm.call("scontrol", "release", *{task.partition("_")[0] for task in slurm.queue()})
    slurm.drained(180)
    (run,) = run_dirs(tmp_path)
    record = json.loads((run / "train.json").read_text())
    (submission,) = (tmp_path / "outputs/sweeps").glob("*/slurm/*/submission.json")
    assert record["provenance"]["code"] == json.loads(submission.read_text())["code"]
    assert rows(tmp_path)


def test_what_slurm_would_not_take_is_told_before_anything_is_submitted(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    words = [*TINY, "method=sft", "peft=lora", "train.max_steps=2", *ON_SLURM]
    done = on_slurm("sweep", *words, "resources.partition=nowhere", check=False)
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not slurm.queue()
    assert not (tmp_path / "outputs/runs").exists()


def test_if_slurm_refuses_a_later_script_the_jobs_before_it_are_cancelled(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    shim = tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    refusal = 'echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1'
    case = f'case "$*" in --test-only*) ;; *report.sbatch) {refusal};; esac'
    shim.write_text(f'#!/bin/sh\n{case}\nexec {shutil.which("sbatch")} "$@"\n')
    shim.chmod(0o755)
    words = [*TINY, "method=sft", "peft=lora", "train.max_steps=2", *ON_SLURM, "resources.extra=[--hold]"]
    done = on_slurm("sweep", *words, PATH=f"{shim.parent}:{slurm.env['PATH']}", check=False)
    assert done.returncode == 2
    assert "QOSMaxSubmitJobPerUserLimit; the jobs submitted before it are cancelled" in done.stderr
    slurm.drained(30)
    on_slurm("sweep", *words)  # nothing stands in the way of another try
    assert slurm.queue()


def test_an_array_by_hand_does_one_run_for_each_task(slurm: Cluster, on_slurm: Run, tmp_path: Path) -> None:
    words = [*TINY, "method=sft", "peft=lora,qlora", "train.max_steps=2"]
    env = {**slurm.env, "PATH": f"{Path(sys.executable).parent}:{slurm.env['PATH']}"}
    script = str(REPOSITORY / "slurm" / "array.sbatch")
    done = subprocess.run(
        ["sbatch", "--array=0-3", script, *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    slurm.drained(180)
    assert "4 runs, 4 done, 0 to do" in on_slurm("sweep", *words).stdout
