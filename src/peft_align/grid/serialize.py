"""Runs as plain JSON, for job files: what a worker is given, readable by people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from peft_align.config.benchmarks import BENCHMARKS
from peft_align.config.identity import BASE_FIELDS, Precision
from peft_align.config.judges import JUDGES
from peft_align.config.schema import Dataset, Evaluation, Preference
from peft_align.config.validate import config_from_plain, convert
from peft_align.errors import Fault, InputError
from peft_align.grid.benchmarks import of_kind
from peft_align.grid.runs import Run, Scoring
from peft_align.store.records import write_json
from peft_align.store.runs import RunDir

NESTED: dict[str, type] = {"evaluation": Evaluation, "dataset": Dataset, "preference": Preference}


def run_to_plain(run: Run) -> dict[str, Any]:
    """A run as nested dicts, lists and values."""
    return asdict(run)


def config_of(run: Run) -> dict[str, Any]:
    """The settings that a run of its kind has, for people: a merge has inputs in the place of a training."""
    config = asdict(run.config)
    if run.kind == "train":
        del config["merge"]
        return config
    base = {name: config["peft"][name] for name in BASE_FIELDS}
    own: dict[str, Any] = {"model": config["model"], "base": base}
    if run.kind == "external":
        own |= {"adapter": run.adapter}
    if run.kind == "merge":
        own |= {"merge": config["merge"], "inputs": list(run.parents), "seed": run.config.seed}
    return own | {name: config[name] for name in ("evaluation", "judge", "launcher", "tracker", "root", "hub", "disk")}


def write_identity(run: Run, directory: RunDir) -> None:
    """Say in the run's folder what it is: run.json."""
    identity = {"id": run.id, "kind": run.kind, "axes": run.axes, "parents": list(run.parents)}
    write_json(directory.path / "run.json", {**identity, "config": config_of(run)})


def run_from_plain(plain: Mapping[str, Any]) -> Run:
    """The run that `run_to_plain` was given. Raises InputError if the job file was damaged."""
    faults: list[Fault] = []
    scorings = []
    for node in plain["scorings"]:
        nested = {name: convert(cls, node[name], name, faults) for name, cls in NESTED.items()}
        benchmarks = tuple(
            (name, of_kind(BENCHMARKS, f"benchmark {name}", benchmark, {}, faults))
            for name, benchmark in node["benchmarks"]
        )
        judges = tuple(
            (name, option, of_kind(JUDGES, f"judge {option}", judge, {}, faults))
            for name, option, judge in node["judges"]
        )
        nested["base"] = Precision(**node["base"])
        rest = {k: v for k, v in node.items() if k not in (*nested, "benchmarks", "judges", "steps")}
        scorings.append(Scoring(steps=tuple(node["steps"]), benchmarks=benchmarks, judges=judges, **nested, **rest))
    if faults:
        raise InputError(faults)
    return Run(
        id=plain["id"],
        kind=plain["kind"],
        config=config_from_plain(plain["config"]),
        choices=dict(plain["choices"]),
        axes=dict(plain["axes"]),
        parents=tuple(plain["parents"]),
        scorings=scorings,
        steps=tuple(plain["steps"]),
        is_parent_only=plain["is_parent_only"],
        saves=tuple(plain["saves"]),
        adapter=plain["adapter"],
    )
