"""Submitting on a cluster that does not do what is hoped: all of the jobs or none, nothing twice, nothing forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sweeping import expand, finish_training, trained

from peft_align.errors import InputError
from peft_align.grid.planner import Planner
from peft_align.launch import queue
from peft_align.launch.slurm import SlurmLauncher, adopt
from peft_align.store.leases import hold
from peft_align.store.submissions import Submission, submissions

WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "peft=lora", "method=sft,dpo", "method.init=sft")
SLURM = (*WORDS, "evaluation.benchmarks=[everyday_mc]", "launcher=slurm")
# A cluster in a folder: `jobs` has a line JOB|NAME for each living job. What $REFUSED says of a script happens to it.
SBATCH = """#!/bin/sh
for script; do :; done
[ "$1" = --test-only ] && exit 0
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
case "$REFUSED" in *"$(basename "$script" .sbatch)":refuse*) echo "sbatch: error: no more jobs" >&2; exit 1;; esac
n=$(($(cat "$CLUSTER/last") + 1)); echo $n > "$CLUSTER/last"
echo "$n|$name" >> "$CLUSTER/jobs"
case "$REFUSED" in *"$(basename "$script" .sbatch)":hang*) exec sleep 60;; esac
echo $n
"""
SQUEUE = """#!/bin/sh
while IFS='|' read -r job name; do
  for index in 0 1 2 3; do echo "${job}_$index|PENDING|$name|Resources"; done
done < "$CLUSTER/jobs"
"""
SCANCEL = """#!/bin/sh
[ -n "$NO_CANCEL" ] && { echo "scancel: error: no answer" >&2; exit 1; }
for job; do sed -i "/^$job|/d" "$CLUSTER/jobs"; done
"""
SCONTROL = """#!/bin/sh
echo "MaxArraySize = 1001"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cluster; its commands are in the path."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "last").write_text("100\n", encoding="utf-8")
    (folder / "jobs").write_text("", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    queue.settings.cache_clear()
    return folder


def launcher(root: Path, *words: str, name: str = "one") -> SlurmLauncher:
    sweep = expand(*(words or SLURM))
    return SlurmLauncher(sweep, Planner(root, None), root / "sweeps" / name, SLURM)


def submit(launcher: SlurmLauncher) -> Submission | None:
    items = launcher.planner.plan(launcher.sweep.runs)
    return launcher.submit([item for item in items if not item.done])


def living(cluster: Path) -> list[str]:
    """The names of the living jobs' arrays."""
    return [line.rpartition(".")[2] for line in (cluster / "jobs").read_text().splitlines()]


def test_a_sweep_is_submitted_once_however_often_it_is_asked_for(tmp_path: Path, cluster: Path) -> None:
    assert submit(launcher(tmp_path)) is not None
    names = living(cluster)
    assert names[-1] == "report"
    assert submit(launcher(tmp_path)) is None
    assert living(cluster) == names


def test_where_one_script_is_refused_no_job_is_left(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "report:refuse")
    with pytest.raises(
        InputError, match=r"did not take report\.sbatch: no more jobs; the jobs submitted before it are"
    ):
        submit(launcher(tmp_path))
    assert living(cluster) == []
    (refused,) = submissions(tmp_path)
    assert refused.jobs == []
    assert refused.content["refused"] == ["no more jobs"]


@pytest.mark.parametrize("script", ["00-train", "report"])
def test_a_job_that_slurm_took_without_saying_so_in_time_is_cancelled_too(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(queue, "TIMEOUT", 2.0)
    monkeypatch.setenv("REFUSED", f"{script}:hang")
    with pytest.raises(InputError, match=rf"{script}\.sbatch: sbatch did not answer"):
        submit(launcher(tmp_path))
    assert living(cluster) == []


def test_jobs_that_cannot_be_cancelled_are_told_and_stay_known(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "report:refuse")
    monkeypatch.setenv("NO_CANCEL", "1")
    with pytest.raises(InputError, match=r"nor could those before it be cancelled \(.*no answer\): scancel 101"):
        submit(launcher(tmp_path))
    left = living(cluster)
    assert left
    assert submit(launcher(tmp_path)) is None, "what lives does the work"
    assert living(cluster) == left


def test_jobs_that_were_taken_before_a_login_node_died_are_found_by_their_names(tmp_path: Path, cluster: Path) -> None:
    made = submit(launcher(tmp_path))
    assert made is not None
    jobs = made.jobs
    made.content["arrays"][-1]["job"] = None  # it died before this was written
    made.save()
    assert submit(launcher(tmp_path)) is None
    (found,) = submissions(tmp_path)
    assert found.jobs == jobs


def test_what_was_never_taken_is_looked_for_once(tmp_path: Path, cluster: Path) -> None:
    made = submit(launcher(tmp_path))
    assert made is not None
    last = made.content["arrays"][-1]
    (cluster / "jobs").write_text("".join(
        line for line in (cluster / "jobs").read_text().splitlines(keepends=True) if last["name"] not in line
    ))  # fmt: skip
    last["job"] = None
    made.save()
    adopt(submissions(tmp_path))
    (found,) = submissions(tmp_path)
    assert found.content["refused"] == [last["name"]]
    assert found.jobs == made.jobs
    assert submit(launcher(tmp_path)) is not None, "it is missing"


def test_two_who_submit_at_once_do_not_both(tmp_path: Path, cluster: Path) -> None:
    with hold(tmp_path / "sweeps/one/submitting"):
        with hold(tmp_path / "sweeps/one/submitting") as second:
            assert not second
        with pytest.raises(InputError, match="another process is submitting one now"):
            submit(launcher(tmp_path))
    assert living(cluster) == []


def test_the_report_of_a_sweep_does_not_wait_for_jobs_of_another(tmp_path: Path, cluster: Path) -> None:
    other = submit(launcher(tmp_path, *SLURM, "seed=7", name="other"))
    assert other is not None
    mine = submit(launcher(tmp_path))
    assert mine is not None
    assert mine.content["others"] == []
    shared = submit(launcher(tmp_path, *SLURM, "seed=0,7", name="both"))
    assert shared is not None
    assert set(shared.content["others"]) <= {*other.jobs, *mine.jobs}
    assert shared.content["others"]


def test_a_training_that_keeps_fewer_checkpoints_is_not_the_one_that_is_asked_for(
    tmp_path: Path, cluster: Path
) -> None:
    assert submit(launcher(tmp_path, *SLURM, "train.checkpoint_steps=[4]", name="fewer")) is not None
    more = submit(launcher(tmp_path, *SLURM, "train.checkpoint_steps=[2,4]", name="more"))
    assert more is not None
    assert any("train" in array["stages"] for array in more.content["arrays"])
    fewer = submit(launcher(tmp_path, *SLURM, "train.checkpoint_steps=[2]", name="again"))
    assert fewer is not None
    assert not any("train" in array["stages"] for array in fewer.content["arrays"]), "that one keeps this too"


def test_a_job_of_another_name_with_a_recorded_number_is_not_taken_for_ours(tmp_path: Path, cluster: Path) -> None:
    made = submit(launcher(tmp_path))
    assert made is not None
    jobs = [line.partition("|")[0] for line in (cluster / "jobs").read_text().splitlines()]
    (cluster / "jobs").write_text("".join(f"{job}|somebody else's\n" for job in jobs))
    for run in trained(expand(*SLURM))[:1]:
        finish_training(tmp_path, run)
    assert submit(launcher(tmp_path)) is not None
