"""Which runs a worker trains together, and that each of them ends as if it had been alone."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_training, trained

from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.launch.job import Worker
from peft_align.launch.packs import companions
from peft_align.launch.process import Stopped, asked_to_stop
from peft_align.store.runs import RunDir

SMALL = (
    "model=tiny",
    "dataset=everyday",
    "peft=lora",
    "train.batch_size=2",
    "train.max_length=200",
    "train.max_steps=3",
)
FP32 = ("peft.compute_dtype=fp32", "peft.dropout=0", "train.optimizer=adamw_torch")


def runs_of(*words: str) -> list[Run]:
    return [run for run in expand(*SMALL, *words).runs if run.kind == "train"]


def together(root: Path, runs: list[Run]) -> int:
    """How many runs are trained with the first, that one included."""
    return len(companions(runs[0], runs[1:], Planner(root, None)))


def test_seeds_ranks_and_methods_are_trained_together_up_to_as_many_as_are_asked_for(tmp_path: Path) -> None:
    runs = runs_of("method=sft,dpo", "seed=0,1", "peft.r=2,4", "train.pack_runs=5")
    assert len(runs) == 8
    assert together(tmp_path, runs) == 5
    assert together(tmp_path, runs[:3]) == 3, "fewer than asked for are no error"
    assert together(tmp_path, runs_of("method=sft", "seed=0,1")) == 1, "it is asked for"


def test_the_least_that_is_asked_for_holds(tmp_path: Path) -> None:
    many, few = (runs_of("method=sft", "seed=0,1,2,3", f"train.pack_runs={n}") for n in (4, 2))
    assert together(tmp_path, [many[0], *few[1:]]) == 2
    assert together(tmp_path, [few[0], *many[1:]]) == 2
    assert [run.id for run in companions(many[0], [many[1], few[2], many[3]], Planner(tmp_path, None))] == [
        run.id for run in (many[0], many[1], many[3])
    ]


@pytest.mark.parametrize(
    "other", [["peft=qlora"], ["peft.compute_dtype=fp32"], ["train.engine=trl"], ["resources.gpus=2"]], ids=str
)
def test_another_base_engine_or_several_processes_are_not(other: list[str], tmp_path: Path) -> None:
    words = ["model=tiny", "dataset=everyday", "method=sft", "train.pack_runs=4", "train.batch_size=2"]
    (first,) = trained(expand(*words, "peft=lora"))
    more = other if other[0].startswith("peft=") else ["peft=lora", *other]
    strangers = trained(expand(*words, *more, "seed=1,2"))
    assert together(tmp_path, [first, *strangers]) == 1
    assert together(tmp_path, [strangers[0], first]) == 1


def test_what_is_done_held_or_waits_for_its_parent_or_was_too_much_is_left_out(tmp_path: Path) -> None:
    runs = runs_of("method=sft", "seed=0,1,2,3,4", "train.pack_runs=5")
    finish_training(tmp_path, runs[1])
    RunDir(tmp_path, runs[2].id).fail("train", "the worker died", "killed")
    with RunDir(tmp_path, runs[3].id).lock():
        found = companions(runs[0], runs[1:], Planner(tmp_path, None))
    assert found == [runs[0], runs[4]]
    parent, child = runs_of("method=sft,dpo", "method.init=sft", "train.pack_runs=5", "seed=7")
    assert together(tmp_path, [runs[0], parent, child]) == 2
    finish_training(tmp_path, parent)
    assert together(tmp_path, [runs[0], parent, child]) == 2
    assert companions(runs[0], [parent, child], Planner(tmp_path, None)) == [runs[0], child]


def test_a_worker_trains_parents_then_children_together_and_one_that_fails_stops_none(tmp_path: Path) -> None:
    words = ("method=sft,dpo", "method.init=sft", "train.pack_runs=3", *FP32)
    runs = runs_of(*words, "seed=0,1", "train.learning_rate=1e-3")
    wild = ("method=sft", "train.learning_rate=1e30", "train.max_grad_norm=1e30")
    bad = runs_of(*wild, "train.pack_runs=3", *FP32)
    assert not Worker(tmp_path / "pack", "sweep", ("train",)).work([*bad, *runs], logged=True)
    assert (RunDir(tmp_path / "pack", bad[0].id).failure() or {})["reason"].startswith("TrainingFailed: the loss is")
    alone = [word for word in words if "pack_runs" not in word]
    assert Worker(tmp_path / "alone", "sweep", ("train",)).work(runs_of(*alone, "seed=0,1", "train.learning_rate=1e-3"))
    methods = {run.id: run.config.method.kind for run in runs}
    for run in runs:
        ours, theirs = (RunDir(tmp_path / name, run.id).train_record() or {} for name in ("pack", "alone"))
        others = [other for other in ours["packed_with"] if other in methods]
        assert [methods[other] for other in others] == [run.config.method.kind]
        assert theirs["packed_with"] == []
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_worker_told_to_stop_saves_every_run_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_align.training.recorder import Recorder

    monkeypatch.setattr(asked_to_stop, "by", 0)
    tell = Recorder._tell

    def told(self: Recorder, step: int, loss: float | None) -> None:
        tell(self, step, loss)
        if step == 2 and not self.first and not asked_to_stop.by:
            asked_to_stop(signal.SIGTERM)

    monkeypatch.setattr(Recorder, "_tell", told)
    runs = runs_of("method=sft", "seed=0,1,2", "train.pack_runs=3", *FP32)
    with pytest.raises(Stopped):
        Worker(tmp_path, "sweep", ("train",)).work(runs)
    assert not asked_to_stop.waits
    for run in runs:
        directory = RunDir(tmp_path, run.id)
        assert (directory.failure() or {})["kind"] == "stopped"
        assert [folder.name for folder in directory.states()] == ["step-000002"]
    monkeypatch.setattr(asked_to_stop, "by", 0)
    assert Worker(tmp_path, "sweep", ("train",)).work(runs)
    monkeypatch.undo()
    alone = runs_of("method=sft", "seed=0,1,2", *FP32)
    assert Worker(tmp_path / "alone", "sweep", ("train",)).work(alone)
    for run in runs:
        ours, theirs = (RunDir(root, run.id).train_record() or {} for root in (tmp_path, tmp_path / "alone"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_sweep_with_packs_is_done_by_local_workers(verb: Any, tmp_path: Path) -> None:
    words = (*SMALL, "method=sft,dpo", "method.init=sft", "seed=0,1,2", "train.pack_runs=3", "launcher.threads=1",
             "evaluation.benchmarks=[preference]", "evaluation.heldout=4")  # fmt: skip
    done = verb("sweep", *words, check=True)
    assert "runs are not done" not in done.stdout
    runs = [run for run in expand(*words).runs if run.kind == "train"]
    for run in runs:
        directory = RunDir(tmp_path / "outputs", run.id)
        assert len((directory.train_record() or {})["packed_with"]) == 2
        log = directory.log.read_text(encoding="utf-8")
        assert f"{run.id}, together with" in log
        assert log.count("trainable parameters") == 1, "what a run prints is in its own log"
