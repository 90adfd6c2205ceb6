"""What Slurm says of jobs, in few calls: squeue for the living; sacct, or scontrol without accounting, for the dead.

Text formats, not JSON, whose schema varies from version to version (22.05 and later).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft_align.errors import Fault, InputError

TIMEOUT = 60.0  # seconds for one answer
AT_A_TIME = 400  # job ids in one call
# A user's own defaults would win over what a script says, or hide jobs.
DEFAULTS = ("SBATCH_", "SQUEUE_", "SCANCEL_", "SACCT_")
UNKNOWN = "Invalid job id"  # what scontrol says of a job that is forgotten
UNFINISHED = ("RUNNING", "PENDING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "CONFIGURING")
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
    """A task that Slurm has not ended: its id as JOB_INDEX, its state, its job's name, and why it waits."""

    id: str
    state: str
    name: str
    reason: str

    @property
    def job(self) -> str:
        return self.id.partition("_")[0]

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
    environment = {name: given for name, given in os.environ.items() if not name.startswith(DEFAULTS)}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, "SLURM_BITSTR_LEN": "0"},  # indices of arrays whole, not cut to 64 characters
            start_new_session=True,  # Ctrl-C is for us to hear: a submission is whole or not at all
        )
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} did not answer within {TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise SlurmError("; ".join(line.removeprefix("sbatch: error: ") for line in lines)[:500])
    return done.stdout


def live_tasks(jobs: Mapping[str, str | None], users: Collection[str] = ()) -> dict[str, Task]:
    """Of these jobs, the tasks that wait or run, by their ids. Raises SlurmError if Slurm does not answer.

    Args:
        jobs: their ids, and their names: a job of another name has got the id since; None: whatever its name.
        users: whose they are; none: this one.
    """
    if not jobs:
        return {}
    return {t.id: t for t in _listed(users) if t.job in jobs and jobs[t.job] in (None, t.name)}


def jobs_named(names: Collection[str]) -> dict[str, str]:
    """Of this user, the living jobs of these names: name -> id. Raises SlurmError if Slurm does not answer."""
    return {task.name: task.job for task in _listed() if task.name in names} if names else {}


def _listed(users: Collection[str] = ()) -> Iterator[Task]:
    # All of the users', to be filtered: -j of a job that is forgotten is an error.
    whose = f"--user={','.join(sorted(users))}" if users else "--me"
    for line in call("squeue", whose, "--noheader", "--array", "--states=all", "--format=%i|%T|%j|%r").splitlines():
        if line.count("|") < 3:
            continue  # a site's message of the day
        task = Task(*line.strip().split("|", 3))
        if task.state not in (*ENDED, "COMPLETED"):
            yield task


def ends_of(tasks: Sequence[str]) -> dict[str, End]:
    """How tasks ended, as far as anyone still knows; the last attempt of each counts.

    Raises:
        SlurmError: Slurm does not answer, and what is asked for may be known to it.
    """
    found: dict[str, End] = {}
    silent: SlurmError | None = None
    for ask in (_from_accounting, _from_controller):  # the second may know of what the first has not heard yet
        if left := [task for task in tasks if task not in found]:
            try:
                known = ask(sorted({task.partition("_")[0] for task in left}))
            except SlurmError as error:
                silent = error
                continue
            found |= {task: known[task] for task in left if task in known and known[task].state not in UNFINISHED}
    if silent and len(found) < len(set(tasks)):
        raise silent
    return found


def _from_accounting(jobs: Sequence[str]) -> dict[str, End]:
    if not has_accounting():
        return {}
    found: dict[str, End] = {}
    for batch in _batches(jobs):
        listed = call("sacct", "-n", "-P", "-X", "-j", ",".join(batch), "-o", "JobID,State,ExitCode")
        for line in listed.splitlines():
            if line.count("|") == 2:
                task, state, code = line.split("|")
                found[task] = _end(state.split()[0], code)  # "CANCELLED by 1000"
    return found


def _from_controller(jobs: Sequence[str]) -> dict[str, End]:
    found: dict[str, End] = {}
    for job in jobs:
        try:
            listed = call("scontrol", "show", "job", "-o", job)
        except SlurmError as error:
            if UNKNOWN.lower() not in str(error).lower():
                raise
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
    """The indices of '3', '1,4-6', '0-28:2' or '0-7%2'; where a list is cut ('1,3,...'), those that it names."""
    for part in text.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last or first) + 1, int(step or 1))


@functools.cache
def has_accounting() -> bool:
    """Whether this cluster keeps accounts of jobs. Raises SlurmError."""
    return "accounting_storage/none" not in settings().get("AccountingStorageType", "")


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
    said = call("sbatch", "--parsable", *hang, script).split()
    return said[-1].partition(";")[0]


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
