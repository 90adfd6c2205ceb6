"""What can be exported of a run: the adapter of a training, at a step, or that which a merge was saved as."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.errors import Fault, InputError, suggest
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir, damage
from peft_align.store.shapes import MERGE, TRAIN

# Groups of settings that a run of its kind has.
SETTINGS = {"train": ("dataset", "preference", "method", "model", "peft", "train"), "merge": ("model", "base", "merge")}
SHOWN = 5  # runs that a beginning is one of
FINISH = "finish it: `python -m peft_align.status` shows it, the same sweep again does what is missing"


@dataclass(frozen=True)
class Exported:
    """One adapter.

    Attributes:
        directory: of its run.
        identity: run.json.
        step: of the training; None of a merge.
        folder, files, digest: the adapter, size and sha256 of each file, the digest that evaluations know it by.
        record: train.json or merge.json.
        inputs: what was read: the base (`model`) and, of a training, the data.
    """

    directory: RunDir
    identity: Mapping[str, Any]
    step: int | None
    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    digest: str
    record: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.identity["config"]
        return found

    @property
    def kind(self) -> str:
        return str(self.identity["kind"])

    @property
    def base(self) -> Mapping[str, Any]:
        """Name, commit, files and digest of the base, as far as they were recorded."""
        return self.inputs.get("model") or {}

    @property
    def tokenizer(self) -> dict[str, str]:
        """sha256 of each file of the base's tokenizer, its chat template among them."""
        files = self.base.get("files") or {}
        own = [name for name in files if "safetensors" not in name and name != "config.json"]
        return {name: str(files[name].get("sha256")) for name in own}

    @property
    def is_last(self) -> bool:
        return self.step is None or self.step == max(map(int, self.record["checkpoints"]))


def named_run(root: Path, named: str) -> RunDir:
    """The run of that id, or the only one whose id begins so. Raises InputError."""
    folder = root / "runs"
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if named in there:
        return RunDir(root, named)
    found = [name for name in there if name.startswith(named)]
    if len(found) == 1:
        return RunDir(root, found[0])
    if found:
        shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise InputError([Fault(named, f"{len(found)} runs begin so", f"write more of one: {shown}")])
    remedy = suggest(named, there) if there else "give the folder of the results: root=DIR"
    raise InputError([Fault(named, f"there is no such run in {folder}", remedy)])


def exported(directory: RunDir, step: int | None = None) -> Exported:
    """The adapter of a run; its files are checked when they are copied.

    Args:
        directory: the run's.
        step: of the training; None: the last one.

    Raises:
        InputError: there is none.
    """
    identity = read_json(directory.path / "run.json") or {}
    kind = identity.get("kind")
    config: Any = identity.get("config")
    is_known = kind in ("train", "merge", "baseline", "external") and isinstance(config, dict)
    if not (is_known and all(isinstance(config.get(group), dict) for group in SETTINGS.get(str(kind), ()))):
        raise InputError([Fault(directory.id, "has no run.json that says what it is", FINISH)])
    if kind == "baseline":
        what = "is an unaligned base: there is no adapter"
        raise InputError([Fault(directory.id, what, "name a run of kind train or merge")])
    if kind == "external":
        what = "was not trained here"
        raise InputError([Fault(directory.id, what, f"its adapter lies in {config.get('adapter')}")])
    return _trained(directory, identity, step) if kind == "train" else _merged(directory, identity, step)


def _trained(directory: RunDir, identity: Mapping[str, Any], step: int | None) -> Exported:
    record = directory.train_record()
    if record is None:
        raise InputError([Fault(directory.id, damage(directory.path / "train.json", TRAIN) or "is not done", FINISH)])
    steps = sorted(map(int, record["checkpoints"]))
    if step is not None and step not in steps:
        kept = f"kept: {', '.join(map(str, steps))}"
        raise InputError([Fault(f"--step {step}", f"{directory.id} has no checkpoint of it", kept)])
    own = record["checkpoints"][str(steps[-1] if step is None else step)]
    folder = directory.adapter if step is None else directory.checkpoint(step)
    at = steps[-1] if step is None else step
    return Exported(directory, identity, at, folder, own["files"], own["digest"], record, record["inputs"])


def _merged(directory: RunDir, identity: Mapping[str, Any], step: int | None) -> Exported:
    if step is not None:
        raise InputError([Fault(f"--step {step}", "a merge has no steps", "leave it out")])
    record = directory.merge_record()
    if record is None:
        raise InputError([Fault(directory.id, damage(directory.path / "merge.json", MERGE) or "is not done", FINISH)])
    saved = record["saved"].get("adapter")
    if saved is None:
        axes = identity.get("axes") or {}
        keys = {"model": "model", "merge": "merge", "peft": "peft", "dataset": "dataset"}
        words = [f"{key}={axes[name]}" for name, key in keys.items() if axes.get(name) and "+" not in str(axes[name])]
        words += [f"seed={identity['config'].get('seed', 0)}", "merge.save=adapter"]
        command = shlex.join(["python", "-m", "peft_align.merge", "+grid=NAME", *words])
        what = "is kept as a recipe, not as an adapter"
        raise InputError([Fault(directory.id, what, f"save it, with its grid's name: {command}")])
    folder, digest = directory.merged("adapter"), str(record["digest"])
    return Exported(directory, identity, None, folder, saved["files"], digest, record, saved["inputs"])
