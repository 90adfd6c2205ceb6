"""What the tests of sweeps share: expanding command lines, and runs that look done on disk, written as jobs do."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from peft_align.config.benchmarks import PAIRED
from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.config.identity import base_label
from peft_align.config.judges import judge_label
from peft_align.errors import InputError
from peft_align.grid.expand import build_sweep
from peft_align.grid.planner import Item, Judgement, Planner, Request, adapter_digest
from peft_align.grid.runs import Run, Sweep
from peft_align.store.records import Digests, digest_of, inventory, link_tree, sha256, write_json
from peft_align.store.runs import FORMAT, RunDir, step_name
from peft_align.store.sweeps import write_manifest


@functools.cache
def shipped() -> ConfigSpace:
    """The shipped conf/, composed once for all tests."""
    return ConfigSpace()


def expand(*words: str, space: ConfigSpace | None = None) -> Sweep:
    """The sweep that a command line asks for."""
    return build_sweep(space or shipped(), parse(words))


def faults(*words: str, space: ConfigSpace | None = None) -> list[str]:
    """The faults that a command line is refused for."""
    with pytest.raises(InputError) as caught:
        expand(*words, space=space)
    return [str(fault) for fault in caught.value.faults]


def one_fault(*words: str, space: ConfigSpace | None = None) -> str:
    """The only fault that a command line is refused for."""
    found = faults(*words, space=space)
    assert len(found) == 1, found
    return found[0]


def trained(sweep: Sweep) -> list[Run]:
    """The sweep's own training runs, without parents that it only needs."""
    return [run for run in sweep.runs if run.kind == "train" and not run.is_parent_only]


def ids(sweep: Sweep) -> set[str]:
    """The ids of the sweep's own training runs."""
    return {run.id for run in trained(sweep)}


def setting(run: Run, key: str) -> Any:
    """The option of a group, or the value of a dotted setting; None where the run has no such setting."""
    if key in run.choices:
        return run.choices[key]
    found: Any = run.config
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def cells(sweep: Sweep, *keys: str) -> list[tuple[Any, ...]]:
    """These keys' values of the sweep's own training runs, sorted, None first."""
    found = (tuple(setting(run, key) for key in keys) for run in trained(sweep))
    return sorted(found, key=lambda row: [(v is not None, v or 0) for v in row])


def write_option(folder: Path, name: str, text: str) -> None:
    """Write an option of the user's own, e.g. `model/mine`."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def source(folder: Path, digests: Digests) -> dict[str, Any]:
    """What a record says of the files that were read from a folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = inventory(folder, names, digests)
    return {"name": folder.name, "commit": None, "files": files, "digest": digest_of(files)}


def finish_training(
    root: Path,
    run: Run,
    steps: Iterable[int] | None = None,
    inputs: Mapping[str, Any] | None = None,
    measured: Sequence[Mapping[str, Any]] = ({"step": 1, "loss": 2.0},),
    **more: Any,
) -> RunDir:
    """Leave a run on disk as training does, with a few bytes for the adapter of each step.

    Args:
        root: of the results.
        run: that is done then.
        steps: of its checkpoints; None: those that it is asked for.
        inputs: what it read.
        measured: lines of its metrics.
        more: what its record has besides.
    """
    directory, digests = RunDir(root, run.id), Digests()
    last = run.config.train.max_steps
    saved: dict[str, Any] = {}
    for step in sorted({*(run.steps if steps is None else steps), last}):
        folder = directory.attempt / "checkpoints" / step_name(step)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(f"{run.id} at {step}".encode())
        (folder / "adapter_config.json").write_text("{}\n", encoding="utf-8")
        files = inventory(folder, [path.name for path in folder.iterdir()], digests)
        saved[str(step)] = {"files": files, "digest": digest_of(files)}
    link_tree(directory.attempt / "checkpoints" / step_name(last), directory.attempt / "adapter")
    metrics = directory.attempt / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in measured), encoding="utf-8")
    record = {
        "format": FORMAT,
        "run": run.id,
        "stage": "train",
        "checkpoints": saved,
        "metrics": {metrics.name: {"size": metrics.stat().st_size, "sha256": sha256(metrics)}},
        "parents": {parent: adapter_digest(RunDir(root, parent).train_record()) for parent in run.parents},
        "inputs": dict(inputs or {}),
        **more,
    }
    write_json(directory.attempt / "train.json", record)
    assert directory.commit_attempt()
    return directory


def finish_evaluation(
    root: Path, request: Request, metrics: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any] | None = None
) -> Path:
    """Leave one benchmark of one checkpoint on disk as evaluation does; returns its folder."""
    folder = RunDir(root, request.run_id).evaluation(request.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl.gz").write_bytes(b"samples")
    assert request.key is not None
    paired = request.config.kind in PAIRED
    record = {
        "format": FORMAT,
        "run": request.run_id,
        "stage": "evaluate",
        "step": request.step,
        "benchmark": request.benchmark,
        "base": request.key["base"].get("weights", base_label(request.scoring.base)),
        "dataset": request.scoring.dataset_name if paired else None,
        "preference": request.scoring.preference_name if paired else None,
        "metrics": list(metrics),
        "key": request.key,
        "inputs": dict(inputs or {}),
        "files": inventory(folder, ["samples.jsonl.gz"], Digests()),
    }
    write_json(folder / "record.json", record)
    return folder


def finish_judgement(root: Path, judgement: Judgement, metrics: Sequence[Mapping[str, Any]]) -> Path:
    """Leave one judging of texts that are there on disk as the judge stage does; returns its folder."""
    request, directory = judgement.request, RunDir(root, judgement.request.run_id)
    evaluated = directory.evaluation_record(request.name)
    assert evaluated is not None
    folder = directory.judgement(request.name, judgement.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl.gz").write_bytes(b"judged")
    record = {
        "format": FORMAT,
        "run": request.run_id,
        "stage": "judge",
        "step": request.step,
        "benchmark": request.benchmark,
        "base": evaluated["base"],
        "judge": judge_label(judgement.option, judgement.judge),
        "dataset": None,
        "preference": None,
        "metrics": list(metrics),
        "key": judgement.key,
        "samples": evaluated["files"],
        "files": inventory(folder, ["samples.jsonl.gz"], Digests()),
    }
    write_json(folder / "record.json", record)
    return folder


def finish_sweep(root: Path, *words: str) -> Sweep:
    """Leave a sweep's training runs and evaluations on disk as jobs do, with its manifest."""
    sweep = expand(*words)
    for run in trained(sweep):
        finish_training(root, run)
    for item in plan(sweep, root):
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)])
    write_manifest(root / "sweeps/adhoc-0", list(words), [], [run.id for run in sweep.runs])
    return sweep


def metric(name: str, value: float, **more: Any) -> dict[str, Any]:
    """One metric as a record holds it."""
    plain = {"name": name, "value": value, "stderr": 0.125, "n": 16, "higher_is_better": True, "part": ""}
    return {**plain, "bound": None, **more}


def plan(sweep: Sweep, root: Path, mirror: str | None = None) -> list[Item]:
    """What is missing of a sweep under a root, seen afresh."""
    return Planner(root, mirror).plan(sweep.runs)
