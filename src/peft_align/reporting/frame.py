"""What of a sweep its table does not say and the report needs: small enough to be kept in the table's own file.

Of each run: what it is, where it belongs, at which steps its benchmarks are evaluated, and its settings, which claims
and comparisons may name. With it results.parquet alone is enough for the report, on a machine that has neither the runs
nor the options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_align.config.benchmarks import PAIRED
from peft_align.config.schema import TRAINING_GROUPS
from peft_align.grid.runs import Run, Sweep
from peft_align.store.shapes import ANY, Each, Items, Maybe

KEY = b"peft_align"  # of the metadata of results.parquet
FORMAT = 1
SETTINGS = (*TRAINING_GROUPS, "merge", "evaluation")  # groups whose settings are kept; none of them holds a secret
# The plain form, as it is checked when it is read.
SHAPE = {
    "format": int,
    "name": str,
    "axis_keys": Items(str),
    "metrics": Each(Items(str)),
    "models": Each({"tuned_from": Maybe(str), "instruction_tuned": Maybe(bool)}),
    "judges": Each(str),
    "restored": Each(Each(ANY)),
    "shared": Each(ANY),
    "runs": Items(
        {
            "id": str,
            "kind": str,
            "base": str,
            "parents": Items(str),
            "is_parent_only": bool,
            "choices": Each(str),
            "axes": Each(ANY),
            "settings": Each(ANY),
            "steps": Each(Items(int)),
        }
    ),
}


@dataclass(frozen=True)
class Planned:
    """One run as the report knows it.

    Attributes:
        steps: those at which each benchmark is evaluated; on another than the test split, by benchmark/split.
        settings: by dotted key, the values of the groups that are kept, and the seed.
    """

    id: str
    kind: str
    base: str
    parents: tuple[str, ...]
    is_parent_only: bool
    choices: Mapping[str, str]
    axes: Mapping[str, Any]
    settings: Mapping[str, Any]
    steps: Mapping[str, tuple[int, ...]]

    def value(self, key: str) -> Any:
        """The option of a group, or the value of a dotted setting; None where it has no such setting."""
        return self.choices[key] if key in self.choices else self.settings.get(key)


@dataclass(frozen=True)
class Frame:
    """What the report needs of a sweep.

    Attributes:
        axis_keys: as the sweep's.
        metrics: the names that each benchmark's option gives, the main one first; "*": all.
        models: what each model's option says of its family: tuned_from, instruction_tuned.
        judges: the hash of what each judge is, by the name that the table gives it.
    """

    name: str
    axis_keys: tuple[str, ...]
    runs: tuple[Planned, ...]
    metrics: Mapping[str, tuple[str, ...]]
    models: Mapping[str, Mapping[str, Any]]
    judges: Mapping[str, str] = dataclasses.field(default_factory=dict)


def frame_of(sweep: Sweep | Frame, judges: Mapping[str, str] | None = None) -> Frame:
    """What the report needs of a sweep; of what is one already, itself."""
    if isinstance(sweep, Frame):
        return sweep
    metrics = {name: tuple(b.metrics) for run in sweep.runs for s in run.scorings for name, b in s.benchmarks}
    models = {
        run.choices["model"]: {key: getattr(run.config.model, key, None) for key in ("tuned_from", "instruction_tuned")}
        for run in sweep.runs
    }
    kept: dict[int, dict[str, Any]] = {}  # runs share the parts of their configs
    runs = tuple(_planned(run, kept) for run in sweep.runs)
    return Frame(sweep.name, tuple(sweep.axis_keys), runs, metrics, models, judges or {})


def _planned(run: Run, kept: dict[int, dict[str, Any]]) -> Planned:
    steps: dict[str, list[int]] = {}
    for scoring in run.scorings:
        for name, benchmark in scoring.benchmarks:
            split = scoring.evaluation.heldout_split if benchmark.kind in PAIRED else "test"
            steps.setdefault(name if split == "test" else f"{name}/{split}", []).extend(scoring.steps)
    settings = {"seed": run.config.seed}
    for group in SETTINGS:
        node = getattr(run.config, group)
        if id(node) not in kept:
            kept[id(node)] = dict(_leaves(node, group))
        settings |= kept[id(node)]
    return Planned(
        run.id,
        run.kind,
        run.base,
        tuple(run.parents),
        run.is_parent_only,
        dict(run.choices),
        dict(run.axes),
        settings,
        {name: tuple(dict.fromkeys(own)) for name, own in steps.items()},
    )


def _leaves(node: Any, at: str) -> list[tuple[str, Any]]:
    """The values below a part of a config by dotted key."""
    if not dataclasses.is_dataclass(node):
        return [(at, list(node) if isinstance(node, tuple) else node)]
    return [leaf for f in dataclasses.fields(node) for leaf in _leaves(getattr(node, f.name), f"{at}.{f.name}")]


def in_table(value: Any) -> Any:
    """A setting as the table has it: of a list, its values in one text."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def to_plain(frame: Frame) -> dict[str, Any]:
    """A frame as JSON has it; settings that all runs have in common stand there once."""
    first = frame.runs[0].settings if frame.runs else {}
    shared = {k: v for k, v in first.items() if all(k in run.settings and run.settings[k] == v for run in frame.runs)}
    runs = []
    for run in frame.runs:
        own = {key: value for key, value in run.settings.items() if key not in shared}
        runs.append({f.name: getattr(run, f.name) for f in dataclasses.fields(run)} | {"settings": own})
    whole = {f.name: getattr(frame, f.name) for f in dataclasses.fields(frame)}
    return {"format": FORMAT} | whole | {"shared": shared, "runs": runs}


def from_plain(plain: Mapping[str, Any]) -> Frame:
    """The frame that `to_plain` was given; the plain form has its shape."""
    runs = tuple(
        Planned(
            id=run["id"],
            kind=run["kind"],
            base=run["base"],
            parents=tuple(run["parents"]),
            is_parent_only=run["is_parent_only"],
            choices=run["choices"],
            axes=run["axes"],
            settings=plain["shared"] | run["settings"],
            steps={name: tuple(steps) for name, steps in run["steps"].items()},
        )
        for run in plain["runs"]
    )
    metrics = {name: tuple(own) for name, own in plain["metrics"].items()}
    return Frame(plain["name"], tuple(plain["axis_keys"]), runs, metrics, plain["models"], plain["judges"])


def united(frames: Sequence[Frame]) -> Frame:
    """Several as one: a run that several have once, with the steps of all of them. Judges are the first's."""
    runs: dict[str, Planned] = {}
    for run in (run for frame in frames for run in frame.runs):
        known = runs.get(run.id)
        if known is None:
            runs[run.id] = run
            continue
        names = dict.fromkeys((*known.steps, *run.steps))
        steps = {name: tuple(dict.fromkeys((*known.steps.get(name, ()), *run.steps.get(name, ())))) for name in names}
        parent_only = known.is_parent_only and run.is_parent_only
        runs[run.id] = dataclasses.replace(known, is_parent_only=parent_only, steps=steps)
    ordered = [run for run in runs.values() if run.kind != "baseline"]
    ordered += [run for run in runs.values() if run.kind == "baseline"]
    keys = list(dict.fromkeys(key for frame in frames for key in frame.axis_keys))
    keys = [key for key in keys if key != "inputs"] + ["inputs"] * ("inputs" in keys)
    metrics = {name: own for frame in frames for name, own in frame.metrics.items()}
    models = {name: own for frame in frames for name, own in frame.models.items()}
    name = "+".join(dict.fromkeys(frame.name for frame in frames))
    return Frame(name, tuple(keys), tuple(ordered), metrics, models, frames[0].judges)
