"""What the disk tells of each run of a sweep: every record is read once, however many parts of a report ask for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_align.grid.planner import Item, Judgement, Request
from peft_align.grid.runs import Run, value
from peft_align.store.runs import RunDir

# Of records that reports read; the rest (digests of every file, the loss of every step) is not kept in memory.
TRAINED = (
    *("steps", "samples", "tokens", "tokens_per_second", "seconds", "seconds_per_step", "peak_memory_bytes"),
    *("processes", "packed_with", "engine", "data", "energy_joules", "finished"),
)
SCORED = ("step", "benchmark", "base", "dataset", "preference", "metrics", "judge", "seconds", "finished")


@dataclass(frozen=True)
class Scored:
    """One evaluation that is on disk, or one judging of its texts.

    Attributes:
        judgement: None: what the evaluation itself says.
        record: of it; see SCORED.
    """

    request: Request
    judgement: Judgement | None
    record: Mapping[str, Any]


@dataclass
class Told:
    """One run. What is not asked for is not read.

    Attributes:
        faults: what of the run cannot be read, in words; those who read more of it add to them.
    """

    item: Item
    root: Path
    same: dict[str, Any] = field(default_factory=dict, repr=False)  # provenance that many records share, once
    faults: list[str] = field(default_factory=list)

    @property
    def run(self) -> Run:
        return self.item.run

    @cached_property
    def directory(self) -> RunDir:
        return RunDir(self.root, self.run.id)

    @cached_property
    def train(self) -> dict[str, Any]:
        """The record of training; empty where there is none that can be used."""
        record = self.item.records.pop(("", None), None)
        if record is None and self.run.kind == "train":
            record = self.directory.train_record()
        return {} if record is None else self._kept(record, TRAINED)

    @cached_property
    def merge(self) -> dict[str, Any]:
        """Likewise the record of a merge: a recipe, which takes no time and no device."""
        record = self.directory.merge_record() if self.run.kind == "merge" else None
        return {} if record is None else self._kept(record, ("finished",))

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        """Why it stopped, if it is not done."""
        return None if self.item.done or self.item.failure is None else self.directory.failure()

    @cached_property
    def scored(self) -> list[Scored]:
        """The evaluations of the sweep that are there as planned, each followed by its judgings."""
        missing = {id(request) for request, _ in self.item.missing}
        unjudged = {id(judgement) for judgement, _ in self.item.unjudged}
        found: list[tuple[Request, Judgement | None, dict[str, Any] | None]] = []
        for request in self.item.requests:
            if id(request) in missing:
                continue
            known = self.item.records.pop((request.name, None), None)  # what is not kept here is let go
            found.append((request, None, known or self.directory.evaluation_record(request.name)))
            for judgement in self.item.judgements:
                if judgement.request is request and id(judgement) not in unjudged:
                    known = self.item.records.pop((request.name, judgement.name), None)
                    judged = known or self.directory.judgement_record(request.name, judgement.name)
                    found.append((request, judgement, judged))
        # one that another process replaces just now is None
        return [Scored(r, j, self._kept(record, SCORED)) for r, j, record in found if record is not None]

    def _kept(self, record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        kept = {name: record[name] for name in names if name in record}
        kept["details"] = {"warning": part(record, "details", "warning")}
        key = record.get("key")
        kept["key"] = {name: key[name] for name in ("split", "judge") if name in key} if isinstance(key, dict) else {}
        kept["inputs"] = self._once({name: _source(given) for name, given in _mapping(record.get("inputs")).items()})
        kept["provenance"] = self._once(_mapping(record.get("provenance")))
        return kept

    def _once(self, value: Any) -> Any:
        return self.same.setdefault(repr(value), value)

    def records(self) -> list[tuple[str, Mapping[str, Any]]]:
        """All records with what was done for them: training, merging, evaluation, judging."""
        found: list[tuple[str, Mapping[str, Any]]] = []
        found += [(stage, record) for stage, record in (("training", self.train), ("merging", self.merge)) if record]
        found += [("evaluation" if s.judgement is None else "judging", s.record) for s in self.scored]
        return found


def told_of(items: Sequence[Item], root: Path) -> dict[str, Told]:
    """The runs by their id, in their order; parents that the sweep only needs too."""
    same: dict[str, Any] = {}
    return {item.run.id: Told(item, root, same) for item in items}


def _source(given: Any) -> dict[str, Any]:
    """What a record says of something that was read, without the files."""
    return {name: value for name, value in _mapping(given).items() if name in ("name", "commit", "digest")}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def part(node: Any, *names: str) -> Any:
    """What stands in mappings within mappings; None where one of them is absent or no mapping."""
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None  # as JSON has it: asked of every record
    return node


def number(node: Any, *names: str) -> float | None:
    """A finite number in mappings within mappings; None for anything else."""
    value = part(node, *names)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def text(node: Any, *names: str) -> str | None:
    """A text in mappings within mappings; None for anything else."""
    value = part(node, *names)
    return value if isinstance(value, str) else None


def device(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a record was made on: "GPU" or "CPU", and its name; None where it does not say."""
    hardware = part(record, "provenance", "hardware")
    if not isinstance(hardware, dict):
        return None
    gpu, cpu = text(hardware, "gpu"), text(hardware, "cpu")
    if gpu:
        return "GPU", gpu
    if "gpu" not in hardware or cpu is None:
        return None
    threads = number(hardware, "threads")
    counted = "" if threads is None else f", {threads:.0f} thread{'' if threads == 1 else 's'}"
    return "CPU", f"{cpu} CPU{counted}"


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """A short name of each run for people: what it is, and the axes in which those of the same name differ."""
    several = len({run.choices["model"] for run in runs}) > 1
    first = {run.id: _label(run, several=several) for run in runs}
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(first[run.id], []).append(run)
    for members in alike.values():
        keys = dict.fromkeys(key for run in members for key in run.axes)
        differ = [key for key in keys if len({repr(_own(run, key)) for run in members}) > 1]
        for run in members if len(members) > 1 else ():
            own = [f"{key}={_shown(_own(run, key))}" for key in differ if _own(run, key) is not None]
            first[run.id] = " ".join([first[run.id], *(own or [run.id[-12:]])])
    return first


def _own(run: Run, key: str) -> Any:
    """What a run has of an axis, also where only other blocks of the grid name it."""
    return run.axes[key] if key in run.axes else value(run, key)


def _label(run: Run, *, several: bool) -> str:
    axes, model = run.axes, run.choices["model"]
    if run.kind == "baseline":
        return f"baseline {model} {run.base}"
    if run.kind == "external":
        return f"{axes.get('adapter', 'adapter')} {model} {run.base}"
    if run.kind == "merge":
        words = [run.choices["merge"], axes.get("inputs"), axes.get("peft"), axes.get("dataset")]
    else:
        words = [axes.get("method"), axes.get("peft"), axes.get("dataset"), axes.get("preference")]
    words += [model] if several else []
    return " ".join([*(str(word) for word in words if word), f"seed {run.config.seed}"])


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
