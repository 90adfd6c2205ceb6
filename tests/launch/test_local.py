"""Workers on this machine: one failed run never stops the others, a dead worker is told, nothing goes on unseen."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_judgement, finish_training, metric, plan, trained

from peft_align.grid.order import order
from peft_align.grid.planner import Planner
from peft_align.launch.local import Job, LocalLauncher, _startable, visible_gpus
from peft_align.launch.process import DISK
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir
from peft_align.store.sweeps import write_manifest

SMALL = (
    "model=tiny", "dataset=everyday", "train.max_steps=2", "train.batch_size=2", "train.max_length=200",
    "evaluation.benchmarks=[preference]", "evaluation.heldout=4", "launcher.threads=1",
)  # fmt: skip


def ids(plan: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(plan.stdout)["run_list"]
    return listed


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.05)


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "peft_align.sweep", *words],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        # where the tests themselves run in a shell's background, an interrupt would be ignored by their children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def progress_of(root: Path) -> list[dict[str, Any]]:
    found = [read_json(path) for path in (root / "runs").glob("*/progress.json")]
    return [progress for progress in found if progress]


def test_a_failed_run_stops_no_other_and_is_told_with_the_end_of_its_log(verb: Any, here: Any, tmp_path: Path) -> None:
    done = here("sweep", *SMALL, "method=sft", "peft=lora", "train.learning_rate=1e-4,1e30", "train.max_grad_norm=1e30",
                "train.max_steps=4", "train.optimizer=adamw_torch")  # fmt: skip
    words = [word for word in SMALL if word != "train.max_steps=2"]
    assert done.returncode == 2, "a key given twice is refused"
    done = verb("sweep", *words, "method=sft", "peft=lora", "train.learning_rate=1e-4,1e30", "train.max_grad_norm=1e30",
                "train.max_steps=4", "train.optimizer=adamw_torch")  # fmt: skip
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "the loss is nan" in done.stdout
    assert "TrainingFailed" in done.stdout.partition("the end of")[2]
    assert "1 of 3 runs are not done" in done.stdout
    rows = (next((tmp_path / "outputs/sweeps").glob("*/results.csv"))).read_text().splitlines()
    assert len(rows) == 1 + 4 + 2  # the other run's four metrics, the baseline's two


def test_a_worker_killed_in_the_middle_fails_its_run_only(tmp_path: Path) -> None:
    words = [*(word for word in SMALL if "max_steps" not in word), "train.max_steps=400", "seed=0,1", "peft=lora"]
    root = tmp_path / "outputs"
    sweep = start(tmp_path, *words)
    try:
        wait_for(lambda: any(p.get("stage") == "train" and p.get("step", 0) > 3 for p in progress_of(root)))
        victim = next(p["pid"] for p in progress_of(root))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: any((root / "runs").glob("*/failed.json")))
        wait_for(lambda: any(p.get("stage") == "train" and p["pid"] != victim for p in progress_of(root)))
    finally:
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    failures = [read_json(path) or {} for path in (root / "runs").glob("*/failed.json")]
    assert [failure["reason"] for failure in failures] == ["the worker died: signal SIGKILL"]


def test_no_worker_outlives_a_killed_sweep_and_status_says_that_the_run_is_lost(here: Any, tmp_path: Path) -> None:
    words = [*(word for word in SMALL if "max_steps" not in word), "train.max_steps=400", "peft=lora"]
    root = tmp_path / "outputs"
    sweep = start(tmp_path, *words)
    wait_for(lambda: any(p.get("step", 0) > 3 for p in progress_of(root)))
    worker = progress_of(root)[0]["pid"]
    running = json.loads(here("status", *words, "--json").stdout)
    assert running["counts"]["running"] == 1
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text())

    def lost() -> list[str]:
        return [run["run_id"] for run in json.loads(here("status", "--json").stdout)["runs"] if run["state"] == "lost"]

    wait_for(lambda: len(lost()) == 1)  # for a moment, a process that is dead and not yet buried has its locks
    assert RunDir(root, lost()[0]).train_record() is None


def test_an_interrupt_stops_the_workers_and_the_sweep(tmp_path: Path) -> None:
    words = [*(word for word in SMALL if "max_steps" not in word), "train.max_steps=400", "peft=lora"]
    sweep = start(tmp_path, *words)
    wait_for(lambda: any(p.get("step", 0) > 3 for p in progress_of(tmp_path / "outputs")))
    worker = progress_of(tmp_path / "outputs")[0]["pid"]
    os.kill(sweep.pid, signal.SIGINT)
    assert sweep.wait(timeout=30) == 130
    assert not Path(f"/proc/{worker}").exists()
    assert list((tmp_path / "outputs/runs").glob("*/progress.json")) == []


@pytest.mark.slow
def test_two_sweeps_of_the_same_runs_at_once_do_none_twice(verb: Any, tmp_path: Path) -> None:
    words = (*SMALL, "method=sft,dpo", "peft=lora")
    other = start(tmp_path, *words)
    done = verb("sweep", *words)
    assert other.wait(timeout=120) == 0
    assert done.returncode == 0, done.stdout + done.stderr
    for log in (tmp_path / "outputs/runs").glob("*/train.log"):
        assert log.read_text().count("'train_runtime'") <= 1


@pytest.mark.slow
def test_two_workers_share_the_runs_of_one_base(verb: Any, tmp_path: Path) -> None:
    words = [word for word in SMALL if "threads" not in word]
    verb("sweep", *words, "seed=0,1", "peft=lora", "launcher.workers=2", check=True)
    assert len(list((tmp_path / "outputs/sweeps").glob("*/jobs/*.json"))) == 2


def test_visible_gpus_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert visible_gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def buried(root: Path, code: int, *words: str) -> tuple[LocalLauncher, Job, Callable[[], list[Job]]]:
    """A launcher, a job of its whose worker ended with a code, and what burying it returns."""
    launcher = launcher_of(root, *words)
    (job, *_) = launcher._jobs(launcher.planner.plan(launcher.sweep.runs), 1)
    ended = subprocess.Popen([sys.executable, "-c", f"import os, signal; os._exit({code})"])
    ended.wait()
    job.process, job.log = ended, root / "job.log"
    return launcher, job, lambda: launcher._bury(job)


def test_a_worker_whose_disk_takes_nothing_ends_the_sweep_with_the_disks_reason(
    own_cache: None, tmp_path: Path
) -> None:
    _, job, bury = buried(tmp_path, DISK + errno.ENOSPC, *SMALL)
    with pytest.raises(OSError, match="No space left") as caught:
        bury()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert [RunDir(tmp_path, item.run.id).failure() for item in job.items] == [None, None]


def test_a_worker_that_never_came_to_a_run_fails_them_all(own_cache: None, tmp_path: Path) -> None:
    _, job, bury = buried(tmp_path, 1, *SMALL)
    assert bury() == []
    failures = [RunDir(tmp_path, item.run.id).failure() or {} for item in job.items]
    assert [failure["reason"] for failure in failures] == ["the worker died: exit code 1"] * 2


def test_a_run_that_another_sweep_took_over_from_a_dead_worker_is_left_to_it(own_cache: None, tmp_path: Path) -> None:
    _, job, bury = buried(tmp_path, 1, *SMALL)
    first = RunDir(tmp_path, job.items[0].run.id)
    with first.lock() as mine:
        assert mine
        first.report_progress(stage="train", step=1)
        (again,) = bury()
        assert first.progress() is not None
    assert [item.run.id for item in again.items] == [item.run.id for item in job.items]
    assert [RunDir(tmp_path, item.run.id).failure() for item in job.items] == [None, None]


# --- judges, planned without starting anything


JUDGED = (
    "model=tiny", "dataset=everyday", "train.max_steps=2", "judge=gpt4", "benchmark.real_toxicity.judge=profanity",
    "evaluation.benchmarks=[everyday_mc,alpaca_eval,red_instruct,real_toxicity]",
)  # fmt: skip
MAKING = ("train", "merge", "evaluate")


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def launcher_of(root: Path, *words: str, stages: tuple[str, ...] = (*MAKING, "judge")) -> LocalLauncher:
    return LocalLauncher(expand(*words), Planner(root, None), root / "sweeps/one", stages)


def jobs_of(root: Path, *words: str, stages: tuple[str, ...] = (*MAKING, "judge"), workers: int = 1) -> list[Job]:
    launcher = launcher_of(root, *words, stages=stages)
    items = [item for item in order(launcher.planner.plan(launcher.sweep.runs)) if not item.done]
    return launcher._jobs(items, workers)


def shown(jobs: list[Job]) -> list[tuple[Any, ...]]:
    """Kinds of the runs, stages, judges, and whether it needs a device."""
    return [(sorted(i.run.kind for i in job.items), job.stages, job.judges, job.device) for job in jobs]


def leave_texts(root: Path, *words: str, benchmarks: tuple[str, ...] = ()) -> None:
    """Have the runs trained, and these benchmarks evaluated (all of them if none is named)."""
    for run in trained(expand(*words)):
        finish_training(root, run)
    for item in plan(expand(*words), root):
        for request in item.requests:
            if not benchmarks or request.benchmark in benchmarks:
                finish_evaluation(root, request, [metric("acc", 0.5)])


def test_each_judge_has_a_job_of_its_own_after_the_job_that_makes_its_texts(own_cache: None, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, *JUDGED)
    runs = ["baseline", "train"]
    assert shown(jobs) == [
        (runs, MAKING, None, True),
        (runs, ("judge",), ("gpt4",), False),
        (runs, ("judge",), ("profanity",), True),
    ]
    making, *judging = jobs
    assert all(job.after == {item.run.id for item in making.items} for job in judging)
    assert _startable(jobs, [], free=True) is making
    assert _startable(jobs, [], free=False) is None
    assert _startable(judging, [making], free=True) is None  # their texts are being made
    assert _startable(judging, [making], free=False) is None


def test_a_judge_behind_an_api_waits_for_no_device_and_only_one_is_asked_at_a_time(
    own_cache: None, tmp_path: Path
) -> None:
    words = (*JUDGED, "peft=lora,qlora", "benchmark.red_instruct.judge=endpoint")
    leave_texts(tmp_path, *words)
    jobs = jobs_of(tmp_path, *words)
    assert {job.stages for job in jobs} == {("judge",)}
    by_judge = {(job.judges or ("",))[0]: job for job in jobs}
    assert {name: job.device for name, job in by_judge.items()} == {
        "gpt4": False,
        "endpoint": False,
        "profanity": True,
    }
    gpt4, endpoint, profanity = (by_judge[name] for name in ("gpt4", "endpoint", "profanity"))
    asking = _startable(jobs, [], free=False)
    assert asking in (gpt4, endpoint)
    assert _startable([gpt4, endpoint, profanity], [], free=False) is gpt4
    assert _startable([endpoint, profanity], [gpt4], free=False) is None
    assert _startable([endpoint, profanity], [gpt4], free=True) is profanity
    assert _startable([endpoint], [profanity], free=False) is endpoint


def test_texts_are_judged_while_others_are_made(own_cache: None, tmp_path: Path) -> None:
    words = (*JUDGED[:4], "peft=lora,qlora", "evaluation.benchmarks=[alpaca_eval]")
    jobs = jobs_of(tmp_path, *words, workers=2)
    first, second = (job for job in jobs if job.stages != ("judge",))
    ours, theirs = (job for job in jobs if job.stages == ("judge",))
    assert (ours.after, theirs.after) == tuple({item.run.id for item in job.items} for job in (first, second))
    assert ours.after.isdisjoint(theirs.after)
    assert _startable([ours, theirs], [first, second], free=True) is None
    assert _startable([ours, theirs], [second], free=False) is ours
    assert _startable([ours, theirs], [first], free=False) is theirs
    assert _startable([theirs], [ours], free=True) is None  # the API has one limit


def test_only_what_is_not_judged_is_given_to_a_judge(own_cache: None, tmp_path: Path) -> None:
    def given() -> dict[str, list[str]]:
        jobs = jobs_of(tmp_path, *JUDGED, stages=("judge",))
        return {judge: [item.run.kind for item in job.items] for job in jobs for judge in job.judges or ()}

    leave_texts(tmp_path, *JUDGED)
    assert given() == {"gpt4": ["train", "baseline"], "profanity": ["train", "baseline"]}
    train, baseline = plan(expand(*JUDGED), tmp_path)
    for judgement in train.to_judge:
        if judgement.option == "gpt4":
            finish_judgement(tmp_path, judgement, [metric("win_rate", 50)])
    finish_judgement(tmp_path, baseline.to_judge[0], [metric("win_rate", 50)])
    assert given() == {"gpt4": ["baseline"], "profanity": ["train", "baseline"]}
    for item in plan(expand(*JUDGED), tmp_path):
        for judgement in item.to_judge:
            finish_judgement(tmp_path, judgement, [metric("win_rate", 50)])
    assert given() == {}


def test_without_the_stage_judge_nothing_is_judged_and_with_it_alone_nothing_is_made(
    own_cache: None, tmp_path: Path
) -> None:
    assert shown(jobs_of(tmp_path, *JUDGED, stages=MAKING)) == [(["baseline", "train"], MAKING, None, True)]
    leave_texts(tmp_path, *JUDGED, benchmarks=("alpaca_eval",))
    assert {job.stages for job in jobs_of(tmp_path, *JUDGED, stages=("judge",))} == {("judge",)}


class Started:
    """What stands for a process that is started: its command and environment."""

    def __init__(self, command: list[str], env: dict[str, str], **more: Any) -> None:
        self.command, self.env = command, env


def test_a_key_is_in_no_file_that_a_sweep_writes_and_a_judge_behind_an_api_sees_no_device(
    own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-a-secret-that-is-nowhere"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    monkeypatch.setattr("peft_align.launch.local.subprocess.Popen", Started)
    launcher = launcher_of(tmp_path, *JUDGED)
    write_manifest(launcher.folder, JUDGED, [], [run.id for run in launcher.sweep.runs])
    jobs = launcher._jobs(launcher.planner.plan(launcher.sweep.runs), 1)
    for job in jobs:
        job.slot = 0 if job.device else None
        launcher._start(job, ["GPU-7"], 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".json"]) == 1 + len(jobs)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert all("OPENAI_API_KEY" in path.read_text() for path in (launcher.folder / "jobs").glob("*.json"))  # its name
    environments = [job.process.env for job in jobs if isinstance(job.process, Started)]
    assert {environment["OPENAI_API_KEY"] for environment in environments} == {secret}  # whoever asks has it
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["GPU-7", "", "GPU-7"]
