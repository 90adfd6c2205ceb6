"""Launchers, and what a Slurm job asks for. All of it is operational."""

from __future__ import annotations

from dataclasses import dataclass

from peft_align.config.fields import operational

MATCHED = ("stage", "kind", "dataset", "preference", "method", "model", "peft", "merge", "judge")


@dataclass(frozen=True)
class Local:
    kind: str = operational("which launcher", choices=("local",))
    workers: int | None = operational("worker processes; null: one a GPU, or 1", low=1)
    threads: int | None = operational("CPU threads of a worker; null: shared out evenly", low=1)


@dataclass(frozen=True)
class Debug:
    kind: str = operational("which launcher", choices=("debug",))
    threads: int | None = operational("CPU threads; null: as torch has it", low=1)


@dataclass(frozen=True)
class Slurm:
    kind: str = operational("which launcher", choices=("slurm",))
    threads: int | None = operational("CPU threads of a task; null: the CPUs that Slurm gives it", low=1)
    runs_per_task: int = operational("runs of one base model that a task does, one after the other", low=1)
    throttle: int | None = operational("tasks of an array that run at a time; null: all", low=1)
    max_array: int | None = operational("tasks of an array; null: as many as the cluster allows", low=1)
    signal_before: int = operational("seconds before the time limit at which a task saves its state", low=1)
    attempts: int = operational("times that a run may stop by itself without getting further", low=1)
    offline: bool = operational("tasks never ask the hub: what they need is in hub.mirror or the cache")
    follow: bool = operational("stay and show what the runs do, until all jobs have ended")
    dry_run: bool = operational("write the scripts and submit nothing")


@dataclass(frozen=True)
class Allocation:
    """What a job asks Slurm for; what is null is not asked for."""

    partition: str | None = operational("partition", default=None)
    account: str | None = operational("account", default=None)
    qos: str | None = operational("quality of service", default=None)
    constraint: str | None = operational("features of the node", default=None)
    reservation: str | None = operational("reservation", default=None)
    gpus: int | None = operational("GPUs of a task; more than one train a run together", default=None, low=0)
    gres: str | None = operational(
        "the GPUs in your cluster's words, e.g. gpu:a100:1, in the place of --gpus-per-node", default=None
    )
    cpus: int | None = operational("CPU cores of a task", default=None, low=1)
    mem: str | None = operational("main memory of a task, e.g. 32G", default=None)
    time: str | None = operational("time limit of a task, as Slurm takes it: H:M:S, D-H", default=None, only_text=True)
    setup: list[str] | None = operational(
        "shell lines before the program: modules, environments", default=None, lines=True
    )
    prefix: str | None = operational("what the program is started with, e.g. apptainer exec --nv my.sif", default=None)
    python: str | None = operational("the program's Python; null: this one", default=None)
    extra: list[str] | None = operational("further options of sbatch, e.g. --exclude=n3", default=None)


@dataclass(frozen=True)
class ResourceRule:
    where: dict[str, str] = operational(f"stage or options that it holds for: {', '.join(MATCHED)}")
    set: Allocation = operational("what those ask for")


@dataclass(frozen=True)
class Resources(Allocation):
    """What every job asks for, and rules for some; of several that fit, the later wins, setting by setting."""

    rules: list[ResourceRule] | None = operational("exceptions by stage, kind of run, or option", default=None)


LAUNCHERS: dict[str, type] = {"local": Local, "slurm": Slurm, "debug": Debug}
