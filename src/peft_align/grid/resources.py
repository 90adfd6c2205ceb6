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
            asked |= {name: given for name, given in dataclasses.asdict(rule.set).items() if given is not None}
    return Allocation(**asked)


def directives(asked: Allocation) -> list[str]:
    """The options of sbatch; what is not asked for is not named."""
    options = [f"{flag}={getattr(asked, name)}" for name, flag in OPTIONS.items() if getattr(asked, name) is not None]
    if asked.gpus == 0:
        pass  # a rule takes away what the others ask for
    elif asked.gres is not None:
        options.append(f"--gres={asked.gres}")
    elif asked.gpus:
        options.append(f"--gpus-per-node={asked.gpus}")
    return options + list(asked.extra or ())


def rule_faults(space: ConfigSpace, resources: Resources) -> list[Fault]:
    """What is wrong with the resources asked for that Slurm would not tell: rules that fit nothing, odd limits."""
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
        for line in asked.extra or ():
            if not line.startswith("-") or "\n" in line:
                faults.append(
                    Fault(
                        f"{where}.extra",
                        f"'{line}' is no option of sbatch",
                        "e.g. --exclude=n3, on the command line in quotes",
                    )
                )
    return faults


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
