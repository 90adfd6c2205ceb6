"""A run that was interrupted goes on from its training state and ends as if nothing had happened."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import interrupted, left, run_of, runs_of, steps_of_states, trained, trajectory

from peft_align.models.loading import load_base
from peft_align.store.records import Digests, inventory, read_json, write_json
from peft_align.store.runs import RunDir
from peft_align.training.run import train
from peft_align.training.state import find_state

SMALL = (
    "model=tiny", "dataset=everyday", "train.max_steps=6", "train.batch_size=4", "train.micro_batch_size=2",
    "train.max_length=200", "train.state_every=2", "train.checkpoint_steps=[2,3,6]", "train.learning_rate=1e-2",
)  # fmt: skip


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("peft", ["lora", "qlora"])
@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_an_interrupted_run_ends_bit_identical_to_an_undisturbed_one(
    engine: str, method: str, peft: str, tmp_path: Path
) -> None:
    run = run_of(*SMALL, f"method={method}", f"peft={peft}", f"train.engine={engine}")
    base = load_base(run.config)
    whole = trained(run, tmp_path / "whole", base)
    cut = tmp_path / "cut"
    directory = interrupted(run, cut, base, 3)
    assert steps_of_states(directory) == [3, 2]
    interrupted(run, cut, load_base(run.config), 2)  # another process would load it anew, too
    record = trained(run, cut, base)
    assert left(cut, run) == left(tmp_path / "whole", run)
    assert trajectory(cut, run) == trajectory(tmp_path / "whole", run)
    assert (record["loss"], record["tokens"]) == (whole["loss"], whole["tokens"])
    assert {k: v["digest"] for k, v in record["checkpoints"].items()} == {
        k: v["digest"] for k, v in whole["checkpoints"].items()
    }
    assert not directory.state.exists()


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_dpo_from_sft_goes_on_with_its_reference(engine: str, tmp_path: Path) -> None:
    parent, child = runs_of(*SMALL, "method=sft,dpo", "method.init=sft", "peft=lora", f"train.engine={engine}")
    base = load_base(parent.config)
    for root in (tmp_path / "whole", tmp_path / "cut"):
        trained(parent, root, base)
    trained(child, tmp_path / "whole", base)
    interrupted(child, tmp_path / "cut", base, 3)
    trained(child, tmp_path / "cut", base)
    assert left(tmp_path / "cut", child) == left(tmp_path / "whole", child)
    assert trajectory(tmp_path / "cut", child) == trajectory(tmp_path / "whole", child)


def test_a_kill_between_two_states_loses_the_steps_since_the_last_one_only(tmp_path: Path) -> None:
    """The first process is killed (-9) when it has made its fifth step; the states are those of steps 2 and 4."""
    words = [*SMALL, "method=sft", "peft=lora"]
    run = run_of(*words)
    directory = RunDir(tmp_path / "cut", run.id)
    directory.path.mkdir(parents=True)
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from helpers import run_of\nfrom pathlib import Path\n"
        "from peft_align.models.loading import load_base\nfrom peft_align.store.runs import RunDir\n"
        "from peft_align.training.run import train\n"
        "run = run_of(*sys.argv[3:])\n"
        "def log(metrics, step):\n    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(run, RunDir(Path(sys.argv[2]), run.id), load_base(run.config), log)\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "cut"), *words]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert steps_of_states(directory) == [4, 2]
    steps: list[int] = []
    base = load_base(run.config)
    train(run, directory, base, lambda metrics, step: steps.append(step))
    assert steps == [5, 6]
    trained(run, tmp_path / "whole", base)
    assert left(tmp_path / "cut", run) == left(tmp_path / "whole", run)
    assert [line["step"] for line in trajectory(tmp_path / "cut", run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_sweep_that_is_told_to_stop_goes_on_where_it_was(tmp_path: Path) -> None:
    """TERM to the sweep: its worker ends its step, saves its state and goes."""
    words = ["model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=2000", "train.batch_size=2",
             "train.max_length=200", "evaluation.benchmarks=[preference]", "evaluation.heldout=4"]  # fmt: skip
    command = [sys.executable, "-m", "peft_align.sweep", *words]
    run = run_of(*words)
    directory = RunDir(tmp_path / "outputs", run.id)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while (directory.progress() or {}).get("step") in (None, 0) and time.time() < deadline:
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(60)
    failure = directory.failure() or {}
    assert "SIGTERM" in failure["reason"]
    made = steps_of_states(directory)[0]
    assert 0 < made < 2000


@pytest.mark.parametrize("form", ["a pickle", "a pickle in torch's archive"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_somebody_changed_runs_nothing_even_with_its_record(tmp_path: Path, name: str, form: str) -> None:
    """Who can write the state can write its record; what torch reads is weights alone."""
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path / "root", base, 2)
    sung, (folder,) = tmp_path / "sung", directory.states()
    if form == "a pickle":
        (folder / name).write_bytes(pickle.dumps(Canary(sung)))
    else:
        torch.save({"state": Canary(sung)}, folder / name)
    record = read_json(folder / "record.json") or {}
    record["files"][name] = inventory(folder, [name], Digests())[name]
    write_json(folder / "record.json", record)
    with pytest.raises(pickle.UnpicklingError):
        train(run, directory, base, lambda metrics, step: None)
    assert not sung.exists()


@pytest.mark.parametrize("name", ["scaler.pt", "pytorch_model.bin", "optimizer.bin"])
def test_a_state_with_a_file_that_was_not_saved_is_not_gone_on_from(tmp_path: Path, name: str) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path / "root", base, 2)
    (folder,) = directory.states()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "sung")))
    steps: list[int] = []
    train(run, directory, base, lambda metrics, step: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6], "from the beginning"
    assert not (tmp_path / "sung").exists()


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_what_is_left_of_an_attempt_and_cannot_be_removed_is_not_written_on_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no state to go on from, a run begins again; the steps of before would stand twice in its metrics."""
    directory = RunDir(tmp_path, "run")
    directory.attempt.mkdir(parents=True)
    (directory.attempt / "metrics.jsonl").write_text("{}\n")

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            find_state(directory, {}, {1})
    assert find_state(directory, {}, {1}) is None
    assert not directory.attempt.exists()
