"""One run trained by two processes, on CPUs: what one process would make of it, with everything that a run has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, run_of, trained
from sweeping import expand, plan

from peft_align.errors import Fault, InputError
from peft_align.grid.needs import check_inputs
from peft_align.launch.distributed import _error, _plain
from peft_align.launch.job import Worker
from peft_align.launch.outcome import details, kind_of, reason
from peft_align.launch.process import Stopped, asked_to_stop
from peft_align.models.loading import load_base
from peft_align.store.runs import RunDir
from peft_align.training.numerics import TrainingFailed
from peft_align.training.run import train

TWO = "resources.gpus=2"
SMALL = (
    "model=tiny", "dataset=everyday", "peft=lora", "train.micro_batch_size=2",
    "evaluation.benchmarks=[preference]", "evaluation.heldout=4",
)  # fmt: skip


def metrics(root: Path, run_id: str) -> list[dict[str, Any]]:
    """Those of each step, without what the clock says."""
    lines = (RunDir(root, run_id).path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("engine", ["packed", "packed train.attention=flex", "trl"])
def test_two_processes_make_the_steps_of_one(engine: str, method: str, tmp_path: Path) -> None:
    words = (
        *SMALL, *FP32, f"method={method}", "train.max_steps=5", "train.batch_size=8", "train.learning_rate=2e-3",
        "train.max_length=400", *f"train.engine={engine}".split(),
    )  # fmt: skip
    run = run_of(*words, TWO)
    assert run.id == run_of(*words).id
    alone = trained(run_of(*words), tmp_path / "alone")
    directory = RunDir(tmp_path / "together", run.id)
    assert Worker(directory.root, "sweep", ("train", "evaluate")).do(run), directory.failure()
    record = directory.train_record()
    assert record is not None
    assert (alone["processes"], record["processes"]) == (1, 2)
    assert record["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert len(set(record["loss"])) == 5
    assert [record[key] for key in ("tokens", "samples")] == [alone[key] for key in ("tokens", "samples")]
    for one, two in zip(metrics(tmp_path / "alone", run.id), metrics(directory.root, run.id), strict=True):
        assert two.keys() == one.keys()
        assert [two[name] for name in ("rows", "row_tokens")] == [one[name] for name in ("rows", "row_tokens")]
        assert two.get("row_losses", []) == pytest.approx(one.get("row_losses", []), rel=1e-3)
        assert two["tokens"] == two.get("num_tokens", two["tokens"]) == one["tokens"]
        for name in ("loss", "grad_norm", *(name for name in two if name.startswith(("rewards", "logps")))):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert [path.name for path in directory.path.glob("evaluations/*/record.json")] == ["record.json"]
    assert not directory.state.exists()


@pytest.fixture
def told_to_stop() -> Iterator[None]:
    """TERM asks this process to stop, as it does a worker."""
    before = signal.signal(signal.SIGTERM, asked_to_stop)
    yield
    signal.signal(signal.SIGTERM, before)
    asked_to_stop.by = 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(told_to_stop: None, tmp_path: Path) -> None:
    run = run_of(
        *SMALL, TWO, "method=dpo", "train.max_steps=20", "train.batch_size=4", "train.max_length=200",
        "train.learning_rate=1e-2", "peft.dropout=0.1", "train.checkpoint_steps=[1,20]",
    )  # fmt: skip
    whole, cut = RunDir(tmp_path / "whole", run.id), RunDir(tmp_path / "cut", run.id)

    def stop_in_the_middle() -> None:
        while ((cut.progress() or {}).get("step") or 0) < 1:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_the_middle, daemon=True).start()
    with pytest.raises(Stopped):
        Worker(cut.root, "sweep", ("train",)).do(run)
    asked_to_stop.by = 0
    assert (cut.failure() or {})["kind"] == "stopped"
    newest = cut.states()[0]
    state = json.loads((newest / "record.json").read_text(encoding="utf-8"))
    assert 0 < state["step"] < 20
    assert state["inputs"]["processes"] == 2
    random = [torch.load(newest / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*random)  # or both would drop out the same

    shutil.copytree(cut.root, tmp_path / "alone")  # one process does not go on from the state of two
    steps: list[int] = []
    train(run, RunDir(tmp_path / "alone", run.id), load_base(run.config), lambda metrics, step: steps.append(step))
    assert steps == list(range(1, 21))

    for directory in (cut, whole):
        assert Worker(directory.root, "sweep", ("train",)).do(run), directory.failure()
    names = sorted(path.relative_to(whole.path) for path in whole.path.rglob("*.safetensors"))
    assert len(names) == 3
    assert all((cut.path / name).read_bytes() == (whole.path / name).read_bytes() for name in names)
    assert metrics(cut.root, run.id) == metrics(whole.root, run.id)
    first, second = cut.train_record(), whole.train_record()
    assert first is not None
    assert second is not None
    assert (first["loss"], first["tokens"]) == (second["loss"], second["tokens"])
    assert not cut.state.exists()


def test_a_batch_that_they_cannot_share_evenly_is_told_before_anything_starts(tmp_path: Path) -> None:
    sweep = expand(*SMALL, "method=sft", "train.batch_size=5", TWO)
    fault = "resources.gpus=2: so many processes cannot share a batch of 5 samples evenly (take a divisor of"
    with pytest.raises(InputError) as caught:
        check_inputs(plan(sweep, tmp_path))
    assert [str(each).startswith(fault) for each in caught.value.faults] == [True]
    (run,) = (run for run in sweep.runs if run.kind == "train")
    assert Worker(tmp_path, "sweep", ("train",)).do(run) is False
    assert (RunDir(tmp_path, run.id).failure() or {})["reason"].startswith(fault)
    check_inputs(plan(expand(*SMALL, "method=sft", "train.batch_size=6", TWO), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "kind", "told"),
    [
        ("raise MemoryError('no room for the second')", "out_of_memory", "MemoryError: no room for the second"),
        ("os.kill(os.getpid(), 9)", "failed", "TrainingFailed: process 1 of 2 died without a word"),
    ],
)
def test_a_process_that_fails_is_told_with_its_reason(
    end: str, kind: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second ends when it loads the base, while the first waits for it to train."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from peft_align.models import loading\n"
        f"    def load_base(config):\n        {end}\n"
        "    loading.load_base = load_base\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    run = run_of(*SMALL, TWO, "method=sft", "train.max_steps=2", "train.batch_size=4", "train.max_length=200")
    assert Worker(tmp_path, "sweep", ("train",)).do(run) is False
    failure = RunDir(tmp_path, run.id).failure() or {}
    assert failure["kind"] == kind
    assert failure["reason"].startswith(told)


@pytest.mark.slow
def test_a_run_that_diverges_in_two_processes_names_the_rows_of_both(tmp_path: Path) -> None:
    words = ("train.learning_rate=1e30", "train.max_grad_norm=1e30", "train.max_steps=3", "train.batch_size=4")
    run = run_of(*SMALL, *FP32, TWO, "method=sft", "train.max_length=200", *words)
    assert Worker(tmp_path, "sweep", ("train",)).do(run) is False
    directory = RunDir(tmp_path, run.id)
    failure = directory.failure() or {}
    lines = [json.loads(line) for line in (directory.attempt / "metrics.jsonl").read_text().splitlines()]
    assert (failure["what"], failure["step"]) == ("loss", len(lines))
    assert failure["rows_of_step"] == lines[-1]["rows"]
    assert len(failure["row_losses"]) == len(lines[-1]["row_losses"]) == 4


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    "error",
    [
        InputError([Fault("peft.target_modules", "no such module", "see print(model)"), Fault("a", "b")]),
        TrainingFailed("the loss is nan at step 3", {"step": 3, "rows": ["train:5"]}),
        OutOfMemoryError("CUDA out of memory"),
        ValueError("of any kind"),
    ],
)
def test_what_a_process_fails_with_is_recorded_as_if_the_worker_had(error: Exception, tmp_path: Path) -> None:
    told = _error(json.loads(json.dumps(_plain(error))))
    recorded = reason(told, tmp_path), kind_of(told), details(told)
    assert recorded == (reason(error, tmp_path), kind_of(error), details(error))
    if isinstance(error, InputError):
        assert isinstance(told, InputError)
        assert told.faults == error.faults
