"""What a stage of a run asks a cluster for: conf/resources/, its rules applied."""

from __future__ import annotations

import dataclasses
import math
import re

from peft_align.config.compose import ConfigSpace
from peft_align.config.launchers import MATCHED, Allocation, Resources
from peft_align.errors import Fault, suggest
from peft_align.grid.runs import STAGES, Run

KINDS = ("train", "merge", "baseline", "external")
ALL_STAGES = (*STAGES, "report")
GPUS = {"gpus", "gres"}
EARLY = 60  # seconds that Slurm may signal too soon (sbatch(1), --signal)
OURS = {  # options of sbatch that a script has already -> what to say instead
    "--array": "see launcher.max_array, launcher.throttle, launcher.runs_per_task",
    "-a": "see launcher.max_array, launcher.throttle, launcher.runs_per_task",
    "--signal": "see launcher.signal_before",
    "--clusters": "submit from a login node of that cluster",
    "-M": "submit from a login node of that cluster",
    **dict.fromkeys(("--job-name", "-J"), "jobs are known by their names"),
    **dict.fromkeys(("--output", "-o", "--error", "-e", "--open-mode"), "why a task ended is read from its log"),
    **dict.fromkeys(("--dependency", "-d"), "stages wait for each other already"),
    **dict.fromkeys(("--chdir", "-D"), "paths are as they were where you submit"),
}
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
OPTIONS = {
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "constraint": "--constraint",
    "reservation": "--reservation",
    "cpus": "--cpus-per-task",
    "mem": "--mem",
    "time": "--time",
}


def allocation(resources: Resources, stage: str, run: Run | None = None, judge: str | None = None) -> Allocation:
    """What a stage of a run asks for: of the rules that fit, the later wins, setting by setting."""
    choices = run.choices if run else {}
    if run and run.kind == "baseline":  # it is nobody's in particular: of its model and precision alone
        choices = {name: choices[name] for name in ("model", "peft")}
    names = {**choices, "kind": run.kind if run else "", "judge": judge or "", "stage": stage}
    asked = {f.name: getattr(resources, f.name) for f in dataclasses.fields(Allocation)}
    for rule in resources.rules or ():
        if all(names.get(key) == wanted for key, wanted in rule.where.items()):
            given = {name: value for name, value in dataclasses.asdict(rule.set).items() if value is not None}
            if given.keys() & GPUS:  # two words for one thing: what a rule says of it is all of it
                asked |= dict.fromkeys(GPUS)
            asked |= given
    return Allocation(**asked)


def directives(asked: Allocation) -> list[str]:
    """The options of sbatch; what is not asked for is not named."""
    given = ((flag, getattr(asked, name)) for name, flag in OPTIONS.items())
    options = [f"{flag}={value}" for flag, value in given if value not in (None, "")]
    if asked.gpus == 0:
        pass  # a rule takes away what the others ask for
    elif asked.gres:
        options.append(f"--gres={asked.gres}")
    elif asked.gpus:
        options.append(f"--gpus-per-node={asked.gpus}")
    return options + list(asked.extra or ())


def rule_faults(space: ConfigSpace, resources: Resources, signal_before: int | None = None) -> list[Fault]:
    """What is wrong with the resources asked for that Slurm would not tell: rules that fit nothing, odd limits.

    Args:
        space: knows the options that a rule may name.
        resources: what a sweep asks for.
        signal_before: seconds before the time limit at which tasks stop; None: they do not.
    """
    faults: list[Fault] = []
    closed = {"stage": list(ALL_STAGES), "kind": list(KINDS)}
    for i, rule in enumerate(resources.rules or ()):
        where = f"resources.rules[{i}].where"
        for key, wanted in rule.where.items():
            if key not in MATCHED:
                faults.append(Fault(f"{where}.{key}", "is nothing that a rule can ask for", suggest(key, MATCHED)))
                continue
            known = closed.get(key) or space.options(key)
            if wanted not in known:
                faults.append(Fault(f"{where}.{key}", f"there is no {key} '{wanted}'", suggest(wanted, known)))
    for where, asked in [
        ("resources", resources),
        *((f"resources.rules[{i}].set", rule.set) for i, rule in enumerate(resources.rules or ())),
    ]:
        if asked.time is not None and seconds_of(asked.time) is None:
            hint = "as Slurm takes it: minutes, H:M:S, D-H, D-H:M:S; in YAML in quotes"
            faults.append(Fault(f"{where}.time", f"'{asked.time}' is no time limit", hint))
        elif asked.time and signal_before and (seconds_of(asked.time) or 0) <= signal_before + EARLY:
            what = f"{asked.time} leaves no time before launcher.signal_before={signal_before} (seconds, and a minute)"
            faults.append(Fault(f"{where}.time", what, "a longer time or a later signal"))
        if (count := _gpus_of(asked.gres)) is not None and asked.gpus != 0 and count != (asked.gpus or 1):
            what = f"{asked.gres} is {count} GPUs, and gpus, the processes that train a run, is {asked.gpus or 1}"
            faults.append(Fault(f"{where}.gres", what, f"say gpus: {count} beside it"))
        for line in asked.extra or ():
            if (flag := line.partition("=")[0].split(" ")[0]) in OURS:
                faults.append(Fault(f"{where}.extra", f"{flag} is the launcher's own", OURS[flag]))
            if not line.startswith("-") or "\n" in line:
                faults.append(
                    Fault(
                        f"{where}.extra",
                        f"'{line}' is no option of sbatch",
                        "e.g. --exclude=n3, on the command line in quotes",
                    )
                )
    return faults


def _gpus_of(gres: str | None) -> int | None:
    """How many GPUs 'gpu:2' or 'gpu:a100:2,shard:1' are; None if it names none."""
    parts = [part.split(":") for part in (gres or "").split(",") if part.split(":")[0] == "gpu"]
    return sum(int(last) if (last := part[-1]).isdigit() else 1 for part in parts) if parts else None


def seconds_of(limit: str) -> float | None:
    """Seconds of a time limit in Slurm's forms (sbatch(1), --time); None if it is none; UNLIMITED is infinite."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = TIME.fullmatch(limit)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # D-H[:M[:S]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 3:
        return numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
