"""The training states: what continues an interrupted run exactly where it was, `runs/<id>/state/step-000050/`.

One is the weights, the optimizer, the schedule, the random states, the position in the data and the metrics so far,
after a whole optimizer step. A run that goes on from it ends bit-identical to an undisturbed one on a CPU with the same
threads and processes. Its record is written last, sealed, and has a digest of every file. The last ones are kept
(`train.keep_states`): one that is damaged is passed over for the one before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peft_align.store.records import (
    Damaged,
    atomic_write,
    read_json,
    remove_tree,
    sha256,
    sync,
    sync_tree,
    verify,
    write_json,
)
from peft_align.store.runs import FORMAT, RunDir, step_name
from peft_align.training import processes

WEIGHTS = "weights.safetensors"
TRAINER_STATE = "trainer_state.json"  # the name that transformers looks for
METRICS = "metrics.jsonl"
RECORD = "record.json"
CANNOT_WRITE = (OSError, SafetensorError)  # what a disk without room is to whoever writes there
PICKLES = (RuntimeError,)  # and to torch.save


class Unfit(RuntimeError):
    """A state is whole, and not one to go on from."""


class ExactState:
    """Mixed into TRL's trainers: saves what `train(resume_from_checkpoint=FOLDER)` restores to the bit.

    The optimizer, the schedule and the random states are transformers' own business. The adapter is not: on the way
    through PEFT it could be cast.
    """

    model: Any
    state: Any
    _total_train_tokens: int

    def save_state_to(self, folder: Path) -> str | None:
        """Write the state after the optimizer step that was just made: the main process what all have, each its own.

        Returns why that cannot be done, of whichever process, in all of them; None: it was.
        """
        why = processes.agreed(_tried(lambda: self._save_common(folder)) if processes.is_main() else None)
        if why is None:
            own = _tried(lambda: self._save_rng_state(str(folder)))  # type: ignore[attr-defined]
            why = next(filter(None, processes.gathered(own)), None)
        return why

    def _save_common(self, folder: Path) -> None:
        discard(folder)
        folder.mkdir(parents=True)
        trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS, metadata={"tokens": str(self._total_train_tokens)})
        self._save_optimizer_and_scheduler(str(folder))  # type: ignore[attr-defined]
        self._save_scaler(str(folder))  # type: ignore[attr-defined]
        self.state.save_to_json(str(folder / TRAINER_STATE))

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


def save_state(
    directory: RunDir, trainer: Any, step: int, inputs: Mapping[str, Any], more: Mapping[str, Any], keep: int
) -> str | None:
    """Save the state of a trainer, and give up those before the last `keep`; a kill leaves what was there.

    Of several processes, all must come here.

    Args:
        directory: the run's.
        trainer: with ExactState.
        step: optimizer steps made.
        inputs: digests of what it was trained on; a state of other inputs is not gone on from.
        more: what the caller wants back.
        keep: how many states there are to be.

    Returns:
        why it could not be written, in all processes; then the earlier ones are as they were. None: it was.
    """
    folder = directory.state / step_name(step)
    why: str | None = trainer.save_state_to(folder)
    if processes.is_main():
        directory.check()
        content = {
            "format": FORMAT,
            "run": directory.id,
            "stage": "train",
            "step": step,
            "inputs": dict(inputs),
            **more,
        }
        why = why or _tried(lambda: _seal(directory, folder, content))
        for other in [folder] if why else directory.states()[keep:]:
            discard(other)
    return processes.agreed(why)


def _tried(write: Callable[[], object]) -> str | None:
    """Why something cannot be written, or None: it was."""
    try:
        write()
    except (*CANNOT_WRITE, *PICKLES) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _seal(directory: RunDir, folder: Path, content: dict[str, Any]) -> None:
    shutil.copyfile(directory.attempt / METRICS, folder / METRICS)
    sync_tree(folder)
    for above in (directory.state, directory.path):
        sync(above)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_json(folder / RECORD, {**content, "files": files})


def find_state(
    directory: RunDir, inputs: Mapping[str, Any], checkpoints: Collection[int]
) -> tuple[Path, dict[str, Any]] | None:
    """The folder and record of the newest state that can be gone on from, or None; then nothing is left of the attempt.

    Says which it passes over, and why.

    Args:
        directory: the run's; its attempt is cut back to where the state was saved.
        inputs: what the run is trained on now.
        checkpoints: steps whose adapter is asked for.
    """
    states = directory.states()
    for at, folder in enumerate(states):
        try:
            record = _verified(folder, inputs, checkpoints)
            _cut_back(directory, folder, record)
        except (Damaged, Unfit, OSError) as error:
            processes.say(f"warning: the training state {folder.name} is passed over: {error}")
            continue
        for path in directory.state.iterdir():  # what came after it is made again
            if path not in states[at:]:
                discard(path)
        return folder, record
    discard(directory.state)
    discard(directory.state.with_name("state.new"))  # of earlier versions
    remove_tree(directory.attempt)  # or the new one would be written on to what is left of it
    return None


def _verified(folder: Path, inputs: Mapping[str, Any], checkpoints: Collection[int]) -> dict[str, Any]:
    """The record of a state that is whole, of these inputs, and after no checkpoint that it lacks; or it raises."""
    record = read_json(folder / RECORD, sealed=True)
    if record is None:
        raise Damaged(f"{folder / RECORD} is damaged: its content is not the one recorded")
    if record["format"] != FORMAT:
        raise Unfit("it is of another version")
    if record["inputs"] != dict(inputs):
        raise Unfit("it was trained on other data or weights, or by another number of processes")
    lacking = [step for step in sorted(checkpoints) if step <= record["step"] and str(step) not in record["saved"]]
    if lacking:
        raise Unfit(f"the checkpoint of step {lacking[0]}, which is asked for now, was not kept then")
    _check_names(folder, record["files"])
    verify(folder, record["files"])
    return record


def _check_names(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise Damaged for files that were not there when the state was saved: transformers reads what it finds."""
    if others := {path.name for path in folder.iterdir()} - {*files, RECORD}:
        raise Damaged(f"{folder} has other files than were saved: {sorted(others)[0]}")


def _cut_back(directory: RunDir, folder: Path, record: Mapping[str, Any]) -> None:
    """Have the attempt as it was when the state was saved. Raises Damaged if a checkpoint of it is."""
    kept = {step_name(int(step)): entry for step, entry in record["saved"].items()}
    checkpoints = directory.attempt / "checkpoints"
    for name, entry in kept.items():
        verify(checkpoints / name, entry["files"])
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if path.name not in kept:
            shutil.rmtree(path)
    with atomic_write(directory.attempt / METRICS) as temporary:
        shutil.copyfile(folder / METRICS, temporary)


def discard(path: Path) -> None:
    """Delete a state, the record first: without one, it was never whole. A file is deleted, too."""
    with suppress(OSError):
        (path / RECORD if path.is_dir() else path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
