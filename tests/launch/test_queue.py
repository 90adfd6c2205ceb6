"""What Slurm's commands print, read; a Slurm that does not answer is told with its reason."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_align.errors import InputError
from peft_align.launch import queue
from peft_align.launch.queue import End, SlurmError, Task
from peft_align.store.runs import COUNTED, STOPS

Command = Callable[..., Path]
CONFIG = """Configuration data as of 2026-11-23T23:00:00
AccountingStorageType   = accounting_storage/slurmdbd
MaxArraySize            = 501
SLURM_CONF              = /etc/slurm/slurm.conf

Slurmctld(primary) at head is UP
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What is remembered of a cluster is that of one test."""

    def forget() -> None:
        queue.settings.cache_clear()
        queue.has_accounting.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Write an executable that stands in for a command of Slurm; returns the log of its calls, a line each."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, output: str = "", *, code: int = 0, error: str = "", when: str = "") -> Path:
        """`when`: shell lines before, which may end it."""
        log, said, told = tmp_path / f"{name}.log", tmp_path / f"{name}.out", tmp_path / f"{name}.err"
        said.write_text(output, encoding="utf-8")
        told.write_text(error, encoding="utf-8")
        path = folder / name
        note = f"printf '%s\\n' \"$*\" >> {shlex.quote(str(log))}"
        text = f"#!/bin/sh\n{note}\n{when}\ncat {said}\ncat {told} >&2\nexit {code}\n"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return log

    return write


@pytest.fixture
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Slurm."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


# --- the living


def test_the_living_tasks_of_the_asked_jobs_are_told_with_why_they_wait(command: Command) -> None:
    log = command(
        "squeue",
        "17_0|RUNNING|a|None\n17_1|PENDING|a|Resources\n17_2|PENDING|a|Dependency\n18|CONFIGURING|b|None\n"
        "19_0|PENDING|c|QOSMaxJobsPerUserLimit (see | the manual)\n170_0|RUNNING|a|None\n",
    )
    found = queue.live_tasks({"17": "a", "18": "b", "19": None})
    assert found == {
        "17_0": Task("17_0", "RUNNING", "a", "None"),
        "17_1": Task("17_1", "PENDING", "a", "Resources"),
        "17_2": Task("17_2", "PENDING", "a", "Dependency"),
        "18": Task("18", "CONFIGURING", "b", "None"),
        "19_0": Task("19_0", "PENDING", "c", "QOSMaxJobsPerUserLimit (see | the manual)"),
    }
    assert {task.id for task in found.values() if task.waits} == {"17_1", "17_2", "19_0"}
    assert len(log.read_text().splitlines()) == 1


def test_what_has_ended_and_is_still_listed_does_not_live(command: Command) -> None:
    ended = (*queue.ENDED, "COMPLETED")
    command(
        "squeue", "".join(f"17_{i}|{state}|a|None\n" for i, state in enumerate(ended)) + "17_99|COMPLETING|a|None\n"
    )
    assert list(queue.live_tasks({"17": None})) == ["17_99"]


def test_a_job_of_another_name_has_only_got_the_number_since(command: Command) -> None:
    command("squeue", "17_0|RUNNING|main.1.00-train|None\n18_0|RUNNING|somebody-else|None\n")
    assert list(queue.live_tasks({"17": "main.1.00-train", "18": "main.1.01-train"})) == ["17_0"]
    assert queue.jobs_named({"main.1.00-train", "main.1.02-train"}) == {"main.1.00-train": "17"}


def test_the_jobs_of_all_who_submitted_are_looked_for(command: Command) -> None:
    log = command("squeue", "17_0|RUNNING|a|None\n")
    queue.live_tasks({"17": "a"}, {"ute", "jo"})
    queue.live_tasks({"17": "a"})
    first, second = log.read_text().splitlines()
    assert "--user=jo,ute" in first
    assert "--me" in second


def test_a_users_own_defaults_of_slurm_do_not_hold(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_JOB_NAME", "SBATCH_NO_REQUEUE", "SQUEUE_FORMAT", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("SLURM_CONF", "/kept")
    command(
        "sbatch", when="env | grep -c -E '^(SBATCH|SQUEUE|SACCT)_' >&2; test $SLURM_CONF = /kept && echo 4711; exit 0"
    )
    assert queue.submit("/x.sbatch", []) == "4711"
    assert queue.call("sbatch").strip() == "4711"


def test_an_empty_queue_has_no_tasks(command: Command) -> None:
    command("squeue", "")
    assert queue.live_tasks({"17": None}) == {}


def test_where_no_job_is_asked_for_slurm_is_not_asked(nothing_there: None) -> None:
    assert queue.live_tasks({}) == {}
    assert queue.ends_of([]) == {}


# --- the dead


@pytest.mark.parametrize(
    ("state", "code", "kind"),
    [
        ("OUT_OF_MEMORY", "0:125", "out_of_memory"),
        ("NODE_FAIL", "0:0", "node_failure"),
        ("BOOT_FAIL", "0:0", "node_failure"),
        ("TIMEOUT", "0:0", "time_limit"),
        ("DEADLINE", "0:0", "time_limit"),
        ("PREEMPTED", "0:15", "preempted"),
        ("CANCELLED by 1000", "0:15", "cancelled"),
        ("CANCELLED", "0:0", "cancelled"),
        ("FAILED", "0:9", "killed"),
        ("FAILED", "137:0", "killed"),
        ("FAILED", "1:0", "failed"),
        ("FAILED", "143:0", "failed"),
        ("COMPLETED", "0:0", "lost"),
        ("SOMETHING_NEW", "0:0", "lost"),
    ],
)
def test_how_a_task_ended_has_a_name_that_the_record_knows(command: Command, state: str, code: str, kind: str) -> None:
    command("scontrol", CONFIG)
    command("sacct", f"17_3|{state}|{code}\n")
    end = queue.ends_of(["17_3"])["17_3"]
    assert end.kind == kind
    assert kind in STOPS
    assert end.told


def test_of_what_the_cluster_did_nothing_is_counted_against_a_run() -> None:
    for state in ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "CANCELLED", "REVOKED"):
        assert End(state).kind not in COUNTED
    for end in (End("OUT_OF_MEMORY"), End("TIMEOUT"), End("FAILED", 1), End("FAILED", 0, 9), End("FAILED", 137)):
        assert end.kind in COUNTED


def test_people_are_told_state_code_and_signal() -> None:
    assert End("FAILED", 1).told == "Slurm says FAILED, exit code 1"
    assert End("PREEMPTED", 0, 15).told == "Slurm says PREEMPTED, signal 15"
    assert End("TIMEOUT").told == "Slurm says TIMEOUT"
    assert "memory" in End("FAILED", 0, 9).told
    assert "memory" in End("FAILED", 137).told


def test_accounting_is_asked_for_all_jobs_at_once_and_only_what_was_asked_is_told(command: Command) -> None:
    command("scontrol", CONFIG)
    log = command(
        "sacct", "17_0|FAILED|1:0\n17_1|RUNNING|0:0\n17_2|PENDING|0:0\n17_[3-9]|PENDING|0:0\n18|TIMEOUT|0:0\n"
    )
    assert queue.ends_of(["18", "17_0", "17_1", "17_2"]) == {"17_0": End("FAILED", 1), "18": End("TIMEOUT")}
    (words,) = (line.split() for line in log.read_text().splitlines())
    assert words[words.index("-j") + 1] == "17,18"


def test_of_a_task_that_was_queued_again_the_last_end_counts(command: Command) -> None:
    command("scontrol", CONFIG)
    command("sacct", "17_0|PREEMPTED|0:0\n17_0|NODE_FAIL|0:0\n17_0|OUT_OF_MEMORY|0:125\n")
    assert queue.ends_of(["17_0"])["17_0"].kind == "out_of_memory"


RECORD = (
    "JobId=21 ArrayJobId=17 ArrayTaskId=0 JobName=a b UserId=me(1000) JobState=OUT_OF_MEMORY Reason=OutOfMemory "
    "Requeue=1 Restarts=0 ExitCode=0:125 DerivedExitCode=0:0 Comment=JobState=fine\n"
    "JobId=17 ArrayJobId=17 ArrayTaskId=4-6,9%2 JobName=x JobState=PENDING Reason=Dependency ExitCode=0:0\n"
    "JobId=22 ArrayJobId=17 ArrayTaskId=1 JobName=x JobState=FAILED Reason=NonZeroExitCode ExitCode=3:0\n"
)


def test_without_accounting_the_controller_is_asked_for_what_it_still_knows(command: Command) -> None:
    lines = 'case "$*" in *config*) echo "AccountingStorageType = accounting_storage/none"; exit 0;; '
    lines += '*18*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;; esac'
    command("scontrol", RECORD, when=lines)
    accounting = command("sacct", "17_0|COMPLETED|0:0\n")
    found = queue.ends_of(["17_0", "17_1", "17_4", "17_9", "18", "17_77"])
    assert {task: (end.state, end.code, end.signal) for task, end in found.items()} == {
        "17_0": ("OUT_OF_MEMORY", 0, 125),
        "17_1": ("FAILED", 3, 0),
    }
    assert not accounting.exists()


@pytest.mark.parametrize(
    ("text", "indices"),
    [("3", [3]), ("1,4-6", [1, 4, 5, 6]), ("0-7%2", list(range(8))), ("0-8:2", [0, 2, 4, 6, 8]), ("1,3,...", [1, 3])],
)
def test_every_form_of_a_list_of_indices_is_read(command: Command, text: str, indices: list[int]) -> None:
    config = 'case "$*" in *config*) echo "AccountingStorageType = accounting_storage/none"; exit 0;; esac'
    command("scontrol", f"JobId=9 ArrayJobId=9 ArrayTaskId={text} JobState=CANCELLED ExitCode=0:0\n", when=config)
    assert list(queue.ends_of([f"9_{i}" for i in range(10)])) == [f"9_{i}" for i in indices]


def test_what_accounting_has_not_heard_yet_the_controller_says(command: Command) -> None:
    config = f'case "$*" in *config*) printf %s {shlex.quote(CONFIG)}; exit 0;; esac'
    command("scontrol", "JobId=17 ArrayJobId=17 ArrayTaskId=0 JobState=OUT_OF_MEMORY ExitCode=0:125\n", when=config)
    command("sacct", "a message of the day\n17_0|RUNNING|0:0\n")
    assert queue.ends_of(["17_0"])["17_0"].kind == "out_of_memory"


def test_a_slurm_that_does_not_answer_is_not_one_that_knows_nothing(command: Command) -> None:
    config = f'case "$*" in *config*) printf %s {shlex.quote(CONFIG)}; exit 0;; esac'
    command("sacct", "17_0|FAILED|1:0\n")
    command("scontrol", code=1, error="slurm_load_jobs error: Unable to contact slurm controller\n", when=config)
    with pytest.raises(SlurmError, match="Unable to contact"):
        queue.ends_of(["17_0", "17_1"])
    assert queue.ends_of(["17_0"])["17_0"].kind == "failed"


def test_a_job_without_an_array_is_known_by_its_own_number(command: Command) -> None:
    config = 'case "$*" in *config*) echo "AccountingStorageType = (null)"; exit 0;; esac'
    command("scontrol", "JobId=31 JobName=report JobState=TIMEOUT ExitCode=0:0\n", when=config)
    command("sacct", "", code=1, error="Slurm accounting storage is disabled\n")
    assert queue.ends_of(["31"]) == {"31": End("TIMEOUT")}


def test_what_accounting_does_not_know_the_controller_may(command: Command) -> None:
    config = f'case "$*" in *config*) printf %s {shlex.quote(CONFIG)}; exit 0;; esac'
    command("scontrol", RECORD, when=config)
    command("sacct", "17_1|FAILED|1:0\n")
    found = queue.ends_of(["17_0", "17_1"])
    assert {task: end.kind for task, end in found.items()} == {"17_0": "out_of_memory", "17_1": "failed"}


def test_a_very_long_list_of_jobs_is_asked_for_in_parts(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "AT_A_TIME", 5)
    command("scontrol", CONFIG)
    assert queue.has_accounting()
    command("scontrol", code=1, error="slurm_load_jobs error: Invalid job id specified\n")
    log = command("sacct", "")
    tasks = [f"{job}_0" for job in range(1, 2 * queue.AT_A_TIME + 2)]
    queue.ends_of(tasks)
    assert len(log.read_text().splitlines()) == 3


# --- the cluster


def test_the_largest_array_is_the_clusters(command: Command) -> None:
    command("scontrol", CONFIG)
    assert queue.largest_array() == 500
    assert queue.has_accounting()
    assert queue.answers()
    assert queue.settings()["SLURM_CONF"] == "/etc/slurm/slurm.conf"


def test_the_cluster_is_asked_once(command: Command) -> None:
    log = command("scontrol", CONFIG)
    for _ in range(3):
        queue.largest_array()
        queue.has_accounting()
    assert len(log.read_text().splitlines()) == 1


def test_a_slurm_that_does_not_answer_gives_its_reason(command: Command) -> None:
    error = "squeue: error: Unable to contact slurm controller (connect failure)\n\n"
    command("squeue", code=1, error=error)
    command("scontrol", code=1, error="slurm_load_ctl_conf error: Unable to contact slurm controller\n")
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        queue.live_tasks({"17": None})
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        queue.settings()
    assert not queue.answers()
    with pytest.raises(SlurmError):
        queue.has_accounting()


def test_it_is_asked_again_after_it_did_not_answer(command: Command) -> None:
    command("scontrol", code=1, error="slurm_load_ctl_conf error\n")
    assert not queue.answers()
    command("scontrol", CONFIG)
    assert queue.answers()
    assert queue.has_accounting()


def test_a_slurm_that_says_nothing_at_all_is_told_by_its_exit_code(command: Command) -> None:
    command("squeue", code=7)
    with pytest.raises(SlurmError, match="exit code 7"):
        queue.live_tasks({"17": None})


def test_a_slurm_that_hangs_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "TIMEOUT", 0.2)
    command("squeue", when="exec sleep 60")
    with pytest.raises(SlurmError, match="squeue did not answer"):
        queue.live_tasks({"17": None})


def test_a_machine_without_slurm_is_told(nothing_there: None) -> None:
    assert not queue.is_there()
    assert not queue.answers()
    with pytest.raises(SlurmError, match="squeue is not on this machine"):
        queue.live_tasks({"17": None})
    with pytest.raises(InputError, match=r"launcher=slurm: sbatch is not on this machine.*launcher\.dry_run"):
        queue.need_slurm()


def test_a_line_that_is_no_task_is_passed_over(command: Command) -> None:
    command("squeue", "a message of the day\n17_0|RUNNING|a|None\n")
    assert list(queue.live_tasks({"17": None})) == ["17_0"]


# --- submitting


def test_a_job_is_submitted_after_others_whatever_their_end(command: Command) -> None:
    log = command("sbatch", "4711;cluster\n")
    assert queue.submit("/a b/x.sbatch", ["17", "18"]) == "4711"
    assert queue.submit("/x.sbatch", []) == "4711"
    first, second = log.read_text().splitlines()
    assert first == "--parsable --dependency=afterany:17:18 /a b/x.sbatch"
    assert second == "--parsable /x.sbatch"


def test_a_refusal_is_slurms_own_word(command: Command) -> None:
    error = "sbatch: error: invalid partition specified: gpuu\nsbatch: error: Batch job submission failed: Invalid\n"
    command("sbatch", code=1, error=error)
    with pytest.raises(SlurmError, match=r"^invalid partition specified: gpuu; Batch job submission failed: Invalid$"):
        queue.submit("/x.sbatch", [])
    assert queue.check_script("/x.sbatch") == "invalid partition specified: gpuu; Batch job submission failed: Invalid"


def test_a_script_that_slurm_takes_has_nothing_wrong(command: Command) -> None:
    log = command("sbatch", error="sbatch: Job 17 to start at 2026-11-24T00:00:00 using 1 processors\n")
    assert queue.check_script("/x.sbatch") is None
    assert log.read_text() == "--test-only /x.sbatch\n"


def test_jobs_are_cancelled_in_parts_and_none_of_none(command: Command) -> None:
    log = command("scancel")
    queue.cancel([])
    assert not log.exists()
    queue.cancel([f"17_{i}" for i in range(queue.AT_A_TIME + 1)])
    assert [len(line.split()) for line in log.read_text().splitlines()] == [queue.AT_A_TIME, 1]


def test_a_task_is_queued_again_by_its_name(command: Command) -> None:
    log = command("scontrol")
    queue.requeue("17_3")
    assert log.read_text() == "requeue 17_3\n"
