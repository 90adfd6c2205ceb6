"""What Slurm says of jobs, in few calls: squeue for the living; sacct, or scontrol without accounting, for the dead.

Text formats, not JSON, whose schema varies from version to version (22.05 and later).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft_align.errors import Fault, InputError

TIMEOUT = 60.0  # seconds for one answer
AT_A_TIME = 400  # job ids in one call
ENDED = {  # states of ended jobs -> why a run stopped (store/runs.py, STOPS)
    "OUT_OF_MEMORY": "out_of_memory",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "TIMEOUT": "time_limit",
    "DEADLINE": "time_limit",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "FAILED": "failed",
}


@dataclass(frozen=True)
class Task:
    """A task that Slurm has not ended: its id as JOB_INDEX, its state, and why it waits."""

    id: str
    state: str
    reason: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True)
class End:
    """How a task ended: the state, the exit code and the signal that ended it."""

    state: str
    code: int = 0
    signal: int = 0

    @property
    def kind(self) -> str:
        """As the record of a run names it."""
        if self.signal == 9 and self.state == "FAILED":
            return "killed"
        if self.code == 137 and self.state == "FAILED":  # a shell's word for signal 9
            return "killed"
        return ENDED.get(self.state, "lost")

    @property
    def told(self) -> str:
        """For people."""
        if self.kind == "killed":
            return "killed with signal 9, as happens when a node's memory runs out"
        more = f", exit code {self.code}" if self.code else (f", signal {self.signal}" if self.signal else "")
        return f"Slurm says {self.state}{more}"


class SlurmError(RuntimeError):
    """A Slurm command failed; the message is its own."""


def is_there() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def answers() -> bool:
    """Whether there is a Slurm that answers."""
    try:
        return bool(settings())
    except SlurmError:
        return False


def call(*words: str) -> str:
    """The output of a Slurm command. Raises SlurmError."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} did not answer within {TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise SlurmError("; ".join(line.removeprefix("sbatch: error: ") for line in lines)[:500])
    return done.stdout


def live_tasks(jobs: Iterable[str]) -> dict[str, Task]:
    """Of these jobs, the tasks that wait or run, by their ids. Raises SlurmError if Slurm does not answer."""
    wanted = set(jobs)
    if not wanted:
        return {}
    # All of the user's, filtered here: -j of a job that is forgotten is an error.
    listed = call("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r")
    found = {}
    for line in listed.splitlines():
        if line.count("|") < 2:
            continue  # a site's message of the day
        task, state, reason = line.strip().split("|", 2)
        if task.partition("_")[0] in wanted and state not in (*ENDED, "COMPLETED"):
            found[task] = Task(task, state, reason)
    return found


def ends_of(tasks: Sequence[str]) -> dict[str, End]:
    """How tasks ended, as far as anyone still knows; the last attempt of each counts."""
    found: dict[str, End] = {}
    for ask in (_from_accounting, _from_controller):
        left = [task for task in tasks if task not in found]
        if left:
            known = ask(sorted({task.partition("_")[0] for task in left}))
            found |= {task: known[task] for task in left if task in known}
    return {task: end for task, end in found.items() if end.state not in ("RUNNING", "PENDING", "COMPLETING")}


def _from_accounting(jobs: Sequence[str]) -> dict[str, End]:
    if not has_accounting():
        return {}
    found: dict[str, End] = {}
    for batch in _batches(jobs):
        try:
            listed = call("sacct", "-n", "-P", "-X", "-j", ",".join(batch), "-o", "JobID,State,ExitCode")
        except SlurmError:
            return {}
        for line in listed.splitlines():
            task, state, code = line.split("|")
            found[task] = _end(state.split()[0], code)  # "CANCELLED by 1000"
    return found


def _from_controller(jobs: Sequence[str]) -> dict[str, End]:
    found: dict[str, End] = {}
    for job in jobs:
        try:
            listed = call("scontrol", "show", "job", "-o", job)
        except SlurmError:
            continue  # forgotten
        for line in listed.splitlines():
            fields = dict(field.partition("=")[::2] for field in line.split(" ") if "=" in field)
            if "JobId" not in fields or "JobState" not in fields:
                continue
            index = fields.get("ArrayTaskId")
            names = [fields["JobId"]] if index is None else [f"{fields['ArrayJobId']}_{i}" for i in _indices(index)]
            found |= dict.fromkeys(names, _end(fields["JobState"], fields["ExitCode"]))
    return found


def _end(state: str, exit_code: str) -> End:
    code, _, signal = exit_code.partition(":")
    return End(state, int(code), int(signal or 0))


def _indices(text: str) -> Iterator[int]:
    """The indices of '3', '1,4-6' or '0-7%2'."""
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


@functools.cache
def has_accounting() -> bool:
    """Whether sacct answers on this cluster."""
    try:
        return "accounting_storage/none" not in settings().get("AccountingStorageType", "")
    except SlurmError:
        return False


@functools.cache
def settings() -> Mapping[str, str]:
    """The cluster's configuration. Raises SlurmError."""
    pairs = (line.partition("=") for line in call("scontrol", "show", "config").splitlines())
    return {key.strip(): text.strip() for key, _, text in pairs if text}


def largest_array() -> int:
    """The number of tasks that an array may have: indices end at MaxArraySize - 1."""
    return max(1, int(settings().get("MaxArraySize", "1001")) - 1)


def check_script(script: str) -> str | None:
    """Why Slurm would not take a script, or None."""
    try:
        call("sbatch", "--test-only", script)
    except SlurmError as error:
        return str(error)
    return None


def submit(script: str, after: Sequence[str]) -> str:
    """Submit a script to start when these jobs have ended, however; returns the job's id. Raises SlurmError."""
    hang = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    return call("sbatch", "--parsable", *hang, script).strip().partition(";")[0]


def cancel(tasks: Sequence[str]) -> None:
    """Cancel jobs, or tasks of arrays; those that have ended are passed over. Raises SlurmError."""
    for batch in _batches(tasks):
        call("scancel", *batch)


def requeue(task: str) -> None:
    """Have a task start again. Raises SlurmError."""
    call("scontrol", "requeue", task)


def need_slurm() -> None:
    """Raise InputError where there is no Slurm."""
    if not is_there():
        what = "sbatch is not on this machine: jobs are submitted from a login node of a Slurm cluster"
        raise InputError([Fault("launcher=slurm", what, "or launcher=local; launcher.dry_run=true writes the scripts")])


def _batches(words: Sequence[str]) -> Iterator[Sequence[str]]:
    for i in range(0, len(words), AT_A_TIME):
        yield words[i : i + AT_A_TIME]
