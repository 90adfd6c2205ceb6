"""A run that was interrupted goes on from its training state and ends as if nothing had happened."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_of, runs_of, trained

from peft_align.grid.runs import Run
from peft_align.models.loading import Base, load_base
from peft_align.store.records import Digests, inventory, write_json
from peft_align.store.runs import RunDir
from peft_align.training.run import Interrupted, train

SMALL = (
    "model=tiny", "dataset=everyday", "train.max_steps=6", "train.batch_size=4", "train.micro_batch_size=2",
    "train.max_length=200", "train.state_every=2", "train.checkpoint_steps=[2,3,6]", "train.learning_rate=1e-2",
)  # fmt: skip


def interrupted(run: Run, root: Path, base: Base, steps: int) -> RunDir:
    """Train so many steps and stop."""
    directory = RunDir(root, run.id)
    directory.path.mkdir(parents=True, exist_ok=True)
    made: list[int] = []
    with pytest.raises(Interrupted):
        train(run, directory, base, lambda metrics, step: made.append(step), lambda: len(made) == steps)
    return directory


def left(root: Path, run: Run) -> dict[str, bytes]:
    """Every weight that a run leaves."""
    path = RunDir(root, run.id).path
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*.safetensors"))}


def trajectory(root: Path, run: Run) -> list[dict[str, Any]]:
    """The metrics of each step, without what the clock says."""
    lines = (RunDir(root, run.id).path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


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
    assert json.loads((directory.state / "record.json").read_text())["step"] == 3
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
    assert json.loads((directory.state / "record.json").read_text())["step"] == 4
    steps: list[int] = []
    base = load_base(run.config)
    train(run, directory, base, lambda metrics, step: steps.append(step))
    assert steps == [5, 6]
    trained(run, tmp_path / "whole", base)
    assert left(tmp_path / "cut", run) == left(tmp_path / "whole", run)
    assert [line["step"] for line in trajectory(tmp_path / "cut", run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["optimizer.pt", "weights.safetensors", "record.json"])
def test_a_damaged_state_is_not_gone_on_from(damage: str, tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path, base, 3)
    path = directory.state / damage
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    steps: list[int] = []
    train(run, directory, base, lambda metrics, step: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_state_of_other_data_is_not_gone_on_from(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path, base, 3)
    record = json.loads((directory.state / "record.json").read_text())
    record["inputs"]["data"] = "another digest"
    (directory.state / "record.json").write_text(json.dumps(record))
    steps: list[int] = []
    train(run, directory, base, lambda metrics, step: steps.append(step))
    assert steps[0] == 1


def test_a_state_that_a_kill_left_beside_the_old_one_is_used(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path, base, 3)
    directory.state.rename(directory.state.with_name("state.new"))
    steps: list[int] = []
    train(run, directory, base, lambda metrics, step: steps.append(step))
    assert steps == [4, 5, 6]


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
    made = json.loads((directory.state / "record.json").read_text())["step"]
    assert 0 < made < 2000


@pytest.mark.parametrize("form", ["a pickle", "a pickle in torch's archive"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_somebody_changed_runs_nothing_even_with_its_record(tmp_path: Path, name: str, form: str) -> None:
    """Who can write the state can write its record; what torch reads is weights alone."""
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path / "root", base, 2)
    sung = tmp_path / "sung"
    if form == "a pickle":
        (directory.state / name).write_bytes(pickle.dumps(Canary(sung)))
    else:
        torch.save({"state": Canary(sung)}, directory.state / name)
    record = json.loads((directory.state / "record.json").read_text(encoding="utf-8"))
    record["files"][name] = inventory(directory.state, [name], Digests())[name]
    write_json(directory.state / "record.json", record)
    with pytest.raises(pickle.UnpicklingError):
        train(run, directory, base, lambda metrics, step: None)
    assert not sung.exists()


@pytest.mark.parametrize("name", ["scaler.pt", "pytorch_model.bin", "optimizer.bin"])
def test_a_state_with_a_file_that_was_not_saved_is_not_gone_on_from(tmp_path: Path, name: str) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora")
    base = load_base(run.config)
    directory = interrupted(run, tmp_path / "root", base, 2)
    (directory.state / name).write_bytes(pickle.dumps(Canary(tmp_path / "sung")))
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
