"""What a cluster does to jobs on its own account: preemption, time limits, lost nodes, many tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
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
    run_dirs,
    said_of,
    trajectory,
    verbs,
)

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def slurm(shared: Path) -> Iterator[Cluster]:
    with cluster(shared, CPUS=4, NODES=2, PORT=18817, GRACE=20) as running:
        yield running


@pytest.fixture
def on_slurm(slurm: Cluster, tmp_path: Path) -> Iterator[Run]:
    yield from verbs(slurm, tmp_path)


def test_preempted_out_of_time_and_without_a_node_the_runs_end_as_undisturbed_ones(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    sweep = [*LONG, "train.max_steps=1500", "seed=range(0,3)"]
    words = [*sweep, "launcher=slurm", "launcher.signal_before=60", "resources.partition=low"]
    local(tmp_path / "local", *sweep)
    on_slurm("sweep", *words)
    runs = tmp_path / "outputs" / "runs"

    def at_work() -> dict[int, Path]:
        found = {}
        for path in runs.iterdir() if runs.is_dir() else ():
            task = progress(path).get("task")
            if task and "_" in task and progress(path).get("step", 0) > 25:
                found[int(task.partition("_")[2])] = path
        return found

    slurm.wait(lambda: set(at_work()) == {0, 1, 2}, 300)
    at = at_work()
    job = progress(at[0])["task"].partition("_")[0]
    # its time limit is moved to the next minute: Slurm sends USR1 before
    slurm.call("scontrol", "update", f"jobid={job}_0", "EndTime=now+1minute")
    slurm.wait(lambda: "time_limit" in kinds(at[0]), 180)
    # somebody important takes all of both nodes
    important = slurm.call(
        "sbatch", "--parsable", "--exclusive", "--nodes=2", "--partition=main", "--output=/dev/null", "--wrap=sleep 20"
    ).strip()
    slurm.wait(lambda: slurm.queue().get(important) == "RUNNING", 180)
    slurm.wait(lambda: important not in slurm.queue(), 180)
    slurm.wait(lambda: len(at_work()) >= 1, 300)
    assert sum("stopped" in kinds(path) for path in at.values()) >= 1
    # a node is lost with what runs on it
    task = next(progress(path)["task"] for path in at_work().values())
    node = slurm.call("squeue", "-h", "-j", task, "-o", "%N").strip()
    lost = [path for path in at_work().values() if slurm_node(slurm, progress(path)["task"]) == node]
    slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(5)
    if "down" in slurm.call("sinfo", "-h", "-N", "-n", node, "-o", "%T"):  # it may have come back by itself
        slurm.call("scontrol", "update", f"nodename={node}", "state=resume")
    slurm.drained(900)
    on_slurm("sweep", *words, "launcher.follow=true")
    told = {path.name: kinds(path) for path in run_dirs(tmp_path)}
    print(json.dumps(told, indent=1))
    assert any("preempted" in each for each in told.values())
    assert all("node_failure" in told[path.name] for path in lost)
    assert all(each[-1] == "done" for each in told.values() if each)
    for run in run_dirs(tmp_path):
        assert trajectory(run) == trajectory(tmp_path / "local/outputs/runs" / run.name)


def slurm_node(slurm: Cluster, task: str) -> str:
    return slurm.call("squeue", "-h", "-j", task, "-o", "%N").strip()


def test_a_hundred_and_fifty_runs_are_two_chunks_and_never_more_than_the_throttle_at_a_time(
    slurm: Cluster, on_slurm: Run, tmp_path: Path
) -> None:
    words = [
        *TINY[:-3], "launcher.threads=1", "evaluation.benchmarks=[everyday_mc]", "evaluation.limit=1", "method=sft",
        "peft=lora", "train.max_steps=1", "seed=range(0,150)", *ON_SLURM, "launcher.throttle=3",
    ]  # fmt: skip
    on_slurm("sweep", *words)
    (path,) = (tmp_path / "outputs/sweeps").glob("*/slurm/*/submission.json")
    arrays = json.loads(path.read_text())["arrays"]
    assert [len(array["tasks"]) for array in arrays] == [99, 51, 1]
    chunks = {array["job"] for array in arrays[:2]}
    most = 0

    def done() -> bool:
        nonlocal most
        running = [t for t, s in slurm.queue().items() if s == "RUNNING" and t.partition("_")[0] in chunks]
        most = max(most, len(running))
        return not slurm.queue()

    slurm.wait(done, 3000)
    assert most == 3
    assert "151 runs, 151 done, 0 to do" in on_slurm("sweep", *words).stdout


@pytest.mark.parametrize("accounting", [0, 1])
def test_status_tells_how_a_task_ended_with_and_without_accounting(
    accounting: int, shared: Path, tmp_path: Path
) -> None:
    with cluster(shared, CPUS=16, PORT=19817 + 100 * accounting, DBD=accounting) as own:
        (on_slurm,) = [next(each) for each in [verbs(own, tmp_path)]]
        words = [*LONG, "train.max_steps=20000", "seed=0,1", *ON_SLURM]
        on_slurm("sweep", *words)
        runs = tmp_path / "outputs/runs"
        own.wait(lambda: runs.is_dir() and sum("task" in progress(path) for path in run_dirs(tmp_path)) == 2, 120)
        paths = sorted(run_dirs(tmp_path))
        own.call("scancel", str(progress(paths[0])["task"]))
        own.wait(lambda: "Slurm says CANCELLED" in said_of(on_slurm, words, paths[0]), 60)
        assert "running" in said_of(on_slurm, words, paths[1])
        own.wait(lambda: "step" in on_slurm("status", *words).stdout, 120)
