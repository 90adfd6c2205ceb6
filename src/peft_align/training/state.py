"""The training state: what continues an interrupted run exactly where it was, `runs/<id>/state/`.

It is the weights, the optimizer, the schedule, the random states and the position in the data after a whole optimizer
step. A run that goes on from it ends bit-identical to an undisturbed one on a CPU with the same threads and processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_align.store.records import Damaged, read_json, sha256, sync_tree, verify, write_json
from peft_align.store.runs import FORMAT, RunDir, step_name
from peft_align.training import processes

WEIGHTS = "weights.safetensors"
TRAINER_STATE = "trainer_state.json"  # the name that transformers looks for
METRICS = "metrics.jsonl"


class ExactState:
    """Mixed into TRL's trainers: saves what `train(resume_from_checkpoint=FOLDER)` restores to the bit.

    The optimizer, the schedule and the random states are transformers' own business. The adapter is not: on the way
    through PEFT it could be cast.
    """

    model: Any
    state: Any
    _total_train_tokens: int

    def save_state_to(self, folder: Path) -> None:
        """Write the state after the optimizer step that was just made: the main process what all have, each its own."""
        if processes.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / WEIGHTS, metadata={"tokens": str(self._total_train_tokens)})
            self._save_optimizer_and_scheduler(str(folder))  # type: ignore[attr-defined]
            self._save_scaler(str(folder))  # type: ignore[attr-defined]
            self.state.save_to_json(str(folder / TRAINER_STATE))
        processes.wait_for_all()  # there is a folder
        self._save_rng_state(str(folder))  # type: ignore[attr-defined]
        processes.wait_for_all()  # all is in it

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        with safe_open(path, "pt") as file:
            self._total_train_tokens = int(file.metadata()["tokens"])
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved.pop(name))
        if saved:
            raise Damaged(f"{resume_from_checkpoint} has weights of another adapter: {sorted(saved)[0]}")


def save_state(directory: RunDir, trainer: Any, step: int, inputs: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Save the state of a trainer in the place of the one before; a kill leaves one of the two.

    Of several processes, all must come here.

    Args:
        directory: the run's.
        trainer: with ExactState.
        step: optimizer steps made.
        inputs: digests of what it was trained on; a state of other inputs is not gone on from.
        more: what the caller wants back.
    """
    fresh = directory.state.with_name("state.new")
    trainer.save_state_to(fresh)
    if not processes.is_main():
        return
    metrics = directory.attempt / METRICS
    with metrics.open("rb") as file:
        os.fsync(file.fileno())
    sync_tree(fresh)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(fresh.iterdir())}
    content = {
        "format": FORMAT,
        "run": directory.id,
        "stage": "train",
        "step": step,
        "inputs": dict(inputs),
        "metrics_bytes": metrics.stat().st_size,
        "files": files,
        **more,
    }
    write_json(fresh / "record.json", content)
    (directory.state / "record.json").unlink(missing_ok=True)
    shutil.rmtree(directory.state, ignore_errors=True)
    fresh.replace(directory.state)


def find_state(directory: RunDir, inputs: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The folder and record of a state to go on from, verified, or None; then nothing is left of the attempt.

    Args:
        directory: the run's; its attempt is cut back to where the state was saved.
        inputs: what the run is trained on now.
    """
    for folder in (directory.state, directory.state.with_name("state.new")):
        record = read_json(folder / "record.json")
        if record is None or record.get("format") != FORMAT or record["inputs"] != dict(inputs):
            continue
        try:
            _check_names(folder, record["files"])
            verify(folder, record["files"])
            _cut_back(directory, record)
        except (Damaged, OSError):
            continue
        return folder, record
    discard_state(directory)
    shutil.rmtree(directory.attempt, ignore_errors=True)
    return None


def _check_names(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise Damaged for files that were not there when the state was saved: transformers reads what it finds."""
    if others := {path.name for path in folder.iterdir()} ^ {*files, "record.json"}:
        raise Damaged(f"{folder} has other files than were saved: {sorted(others)[0]}")


def _cut_back(directory: RunDir, record: Mapping[str, Any]) -> None:
    """Have the attempt as it was when the state was saved. Raises Damaged if something of it is gone."""
    metrics = directory.attempt / METRICS
    if not metrics.is_file() or metrics.stat().st_size < record["metrics_bytes"]:
        raise Damaged(f"{metrics} is shorter than it was")
    os.truncate(metrics, record["metrics_bytes"])
    kept = {step_name(int(step)): entry for step, entry in record["saved"].items()}
    checkpoints = directory.attempt / "checkpoints"
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if folder.name not in kept:
            shutil.rmtree(folder)
    for name, entry in kept.items():
        verify(checkpoints / name, entry["files"])


def discard_state(directory: RunDir) -> None:
    """Delete the state: the run is done, or starts again."""
    for folder in (directory.state, directory.state.with_name("state.new")):
        shutil.rmtree(folder, ignore_errors=True)
