"""Where the results of a sweep come from: code, packages, devices, data, base models, judges, and the commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.grid.planner import Item
from peft_align.reporting.table import Row
from peft_align.reporting.told import Told, device, part, text, told_of
from peft_align.store.records import read_json
from peft_align.store.shapes import MANIFEST, wrong
from peft_align.terminal import one_line, shown, shown_once

NO_GPU = "No run of this sweep was made on a GPU: memory and speed are those of a CPU."
STAGES = {"training": "trained", "evaluation": "evaluated", "judging": "judged"}
AXES = ("model", "peft", "method", "merge")  # of which it is told what never met a GPU


@dataclass(frozen=True)
class Provenance:
    """What the records say. In all rows, `runs` counts runs that have such a record, `records` records.

    Attributes:
        code: version, commit, dirty, digest; runs.
        packages: package, version; runs. A package of several versions has several rows.
        devices: stage (training, evaluation, judging), kind (GPU, CPU), device; runs.
        datasets: use (training, or the benchmark), pairs (option, preference, split; None: not of pairs), name,
            revision (that was asked for; None: unpinned, or none), commit, digest; runs.
        models: option, name, revision, commit, digest; runs.
        judges: benchmark, judge; runs.
        commands: that the sweep was started with, as they can be typed.
        sentences: what people must know of the devices.
        warnings: where runs differ in what should be the same.
    """

    code: list[Row] = field(default_factory=list)
    packages: list[Row] = field(default_factory=list)
    devices: list[Row] = field(default_factory=list)
    datasets: list[Row] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    judges: list[Row] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _Counted:
    """Rows, and the runs that each is of."""

    def __init__(self, *names: str) -> None:
        self.names, self.runs = names, dict[tuple[Any, ...], set[str]]()

    def add(self, run_id: str, *values: Any) -> None:
        self.runs.setdefault(tuple(shown_once(v) if isinstance(v, str) else v for v in values), set()).add(run_id)

    def rows(self) -> list[Row]:
        order = sorted(self.runs, key=lambda values: [(v is None, str(v)) for v in values])
        return [dict(zip(self.names, values, strict=True)) | {"runs": len(self.runs[values])} for values in order]

    def several(self, keys: int, *, at: int) -> list[tuple[Any, ...]]:
        """The first values of rows that are equal in these, and differ in the one `at` which they should not."""
        seen: dict[tuple[Any, ...], set[Any]] = {}
        for values in self.runs:
            if values[at] is not None:
                seen.setdefault(values[:keys], set()).add(values[at])
        return sorted((key for key, found in seen.items() if len(found) > 1), key=str)


def provenance(items: Sequence[Item], root: Path, told: Mapping[str, Told] | None = None) -> Provenance:
    """Gather it from all records of a sweep that are there.

    Args:
        items: the state of the runs.
        root: where they lie.
        told: what was read of them; None: it is read now.
    """
    told = told_of(items, root) if told is None else told
    code = _Counted("version", "commit", "dirty", "code")
    packages, devices = _Counted("package", "version"), _Counted("stage", "kind", "device")
    datasets = _Counted("use", "pairs", "name", "revision", "commit", "digest")
    models, judges = _Counted("option", "name", "revision", "commit", "digest"), _Counted("benchmark", "judge")
    for item in items:
        run = item.run
        for stage, record in told[run.id].records():
            made = part(record, "provenance")
            if made:
                git = part(made, "git")
                dirty = part(git, "dirty")
                own = (text(made, "peft_align"), text(git, "commit"), dirty if isinstance(dirty, bool) else None)
                code.add(run.id, *own, text(made, "code"))
                for name, version in _versions(made):
                    packages.add(run.id, name, version)
            if stage != "merging":
                devices.add(run.id, stage, *(device(record) or (None, None)))
            if stage == "judging":
                judges.add(run.id, text(record, "benchmark"), text(record, "judge"))
            for name, read in (part(record, "inputs") or {}).items():
                source = (text(read, "commit"), text(read, "digest"))
                if name == "model":
                    model = run.config.model
                    models.add(run.id, run.choices["model"], text(read, "name"), model.revision, *source)
                elif name == "data":
                    pairs, revision = _pairs(item, record, stage)
                    use = "training" if stage == "training" else text(record, "benchmark")
                    datasets.add(run.id, use, pairs, text(read, "name"), revision, *source)
                else:
                    datasets.add(run.id, text(record, "benchmark"), None, name, None, *source)
    return Provenance(
        code.rows(),
        packages.rows(),
        devices.rows(),
        datasets.rows(),
        models.rows(),
        judges.rows(),
        commands(root, {item.run.id for item in items}),
        [*device_sentences(devices), *_never_on_gpu(items, told)],
        _warnings(code, packages, datasets, models, told.values()),
    )


def _versions(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Packages and their versions; those that were not there are left out."""
    listed = part(made, "packages")
    found = {"python": text(made, "python"), **(listed if isinstance(listed, Mapping) else {})}
    return [(name, version) for name, version in found.items() if isinstance(version, str) and version != "absent"]


def _pairs(item: Item, record: Mapping[str, Any], stage: str) -> tuple[str, str | None]:
    """Which pairs of a dataset were read: option, preference and split; and the revision that was asked for."""
    run = item.run
    if stage == "training":
        return f"{run.choices['dataset']} {run.choices['preference']}", run.config.dataset.revision
    name, preference = text(record, "dataset"), text(record, "preference")
    asked = {scoring.dataset_name: scoring.dataset.revision for scoring in run.scorings}
    return f"{name} {preference} {text(record, 'key', 'split') or 'test'}", asked.get(str(name))


def device_sentences(devices: _Counted) -> list[str]:
    """What was made on a GPU, in words: nothing, all, or how much of each stage."""
    by_stage: dict[str, dict[str | None, set[str]]] = {}
    for (stage, kind, _), runs in devices.runs.items():
        by_stage.setdefault(stage, {}).setdefault(kind, set()).update(runs)
    told = {kind for kinds in by_stage.values() for kind in kinds}
    found: list[str] = []
    if told == {"CPU"}:
        found.append(NO_GPU)
    elif "GPU" in told:
        for stage, kinds in by_stage.items():
            gpu, cpu = (len(kinds.get(kind, ())) for kind in ("GPU", "CPU"))
            if not gpu and cpu:
                found.append(f"No run of this sweep was {STAGES[stage]} on a GPU.")
            elif gpu and cpu:
                found.append(f"{_runs(gpu)} {STAGES[stage]} on a GPU, {cpu} on a CPU: their speed is not comparable.")
    elif "CPU" in told:
        found.append("No record of this sweep names a GPU; some do not say what they were made on.")
    unknown = {run for kinds in by_stage.values() for run in kinds.get(None, ())}
    if unknown:
        have = "1 run has" if len(unknown) == 1 else f"{len(unknown)} runs have"
        found.append(f"{have} records that do not say on what device they were made.")
    return found


def _runs(count: int) -> str:
    return f"{count} run was" if count == 1 else f"{count} runs were"


def _never_on_gpu(items: Sequence[Item], told: Mapping[str, Told]) -> list[str]:
    """The options of which no record was made on a GPU, where others were."""
    seen: dict[tuple[str, str], set[str]] = {}
    for item in items:
        made = [record for stage, record in told[item.run.id].records() if stage != "merging"]
        kinds = {place[0] for record in made if (place := device(record))}
        for axis in AXES:
            option = item.run.axes.get(axis)
            if isinstance(option, str) and kinds:
                seen.setdefault((axis, option), set()).update(kinds)
    if not any("GPU" in kinds for kinds in seen.values()):
        return []
    never = [f"{axis}={shown(option)}" for (axis, option), kinds in seen.items() if "GPU" not in kinds]
    return [f"Never made on a GPU: {', '.join(never)}."] if never else []


def _warnings(
    code: _Counted, packages: _Counted, datasets: _Counted, models: _Counted, told: Iterable[Told]
) -> list[str]:
    found = []
    dirty = {run for (_, _, is_dirty, _), runs in code.runs.items() if is_dirty for run in runs}
    if dirty:
        found.append(f"{_runs(len(dirty))} made by code with changes that no commit has.")
    if len({digest for *_, digest in code.runs if digest}) > 1:
        found.append("Runs were made by several states of the code: see their versions and commits.")
    if names := [name for (name,) in packages.several(1, at=1)]:
        found.append(f"Runs were made with several versions of {', '.join(names)}.")
    for use, pairs, name in datasets.several(3, at=5):
        what = f"{name} ({pairs})" if pairs else str(name)
        found.append(f"Runs read different data for {use}: {what} has several digests.")
    for (option,) in models.several(1, at=4):
        found.append(f"Runs of the model {option} read different weights.")
    for warning in dict.fromkeys(text(each.train, "data", "warning") for each in told):
        found += [shown(warning)] if warning else []
    return found


def commands(root: Path, run_ids: set[str]) -> list[str]:
    """What the sweeps that have these runs were started with, the one that was started last first.

    A manifest that cannot be read is passed over. Raises nothing.
    """
    try:
        paths = sorted((root / "sweeps").glob("*/sweep.json"), key=lambda path: -path.stat().st_mtime)
    except OSError:
        return []
    found: dict[str, None] = {}
    for path in paths:
        manifest = read_json(path)
        if manifest is None or wrong(manifest, MANIFEST) or not run_ids.intersection(_texts(manifest.get("runs"))):
            continue
        words = [*manifest["command"], *(f"--config-dir={folder}" for folder in manifest["config_dirs"])]
        found[shlex.join(["python", "-m", "peft_align.sweep", *(one_line(shown(word)) for word in words)])] = None
    return list(found)


def _texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
