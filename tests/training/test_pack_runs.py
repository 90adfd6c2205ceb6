"""Runs that are trained in one forward pass are trained as each alone, on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, runs_of, trained
from safetensors.torch import load_file

from peft_align.grid.runs import Run
from peft_align.models.loading import Base, load_base, with_own_modules
from peft_align.models.packing import Row
from peft_align.store.runs import RunDir
from peft_align.training import pack_runs
from peft_align.training.numerics import TrainingFailed
from peft_align.training.pack_runs import Member, Pack
from peft_align.training.run import Interrupted, train

SMALL = (
    "model=tiny", "dataset=everyday", "train.max_steps=3", "train.batch_size=2", "train.max_length=200",
    "train.learning_rate=1e-2", "peft=lora",
)  # fmt: skip
DIFFERENT = (  # in everything that runs of a pack may differ in
    ("method=sft", "seed=0"),
    ("method=dpo", "peft.r=2", "train.max_steps=2", "train.learning_rate=1e-3"),
    ("method=dpo", "method.beta=0.5", "seed=1", "peft.alpha=3", "peft.target_modules=[q_proj,down_proj]"),
)


def some_runs(*words: str) -> list[Run]:
    """The runs of the words, of which a later one counts."""
    return runs_of(*{word.partition("=")[0]: word for word in words}.values())


def never() -> bool:
    return False


def pack_trained(
    runs: Sequence[Run], root: Path, base: Base, stops: Mapping[str, Callable[[], bool]] | None = None
) -> list[Any]:
    """Train runs in one pack; the record of each, or what it ended with."""

    def work(run: Run, member: Member) -> Any:
        directory, stop = RunDir(root, run.id), (stops or {}).get(run.id, never)
        try:
            return train(run, directory, member.base(lambda: base), lambda metrics, step: None, stop, member)
        except (TrainingFailed, Interrupted) as error:
            return error

    pack = Pack()
    for run in runs:
        RunDir(root, run.id).path.mkdir(parents=True, exist_ok=True)
        pack.add(run.id, partial(work, run))
    return pack.train()


def adapter(root: Path, run: Run) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(RunDir(root, run.id).adapter / "adapter_model.safetensors")
    return found


def assert_equal(records: Sequence[Any], runs: Sequence[Run], root: Path, alone: Path, base: Base) -> None:
    """Losses and final adapters are those of each run alone, to 1e-5."""
    for record, run in zip(records, runs, strict=True):
        expected = trained(run, alone, base)
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["tokens"] == expected["tokens"]
        assert record["packed_with"] == sorted(other.id for other in runs if other is not run)
        assert expected["packed_with"] == []
        ours, theirs = adapter(root, run), adapter(alone, run)
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert float((weight - theirs[name]).norm()) <= 1e-5 * float(theirs[name].norm())


@pytest.mark.parametrize("more", [(), ("peft=qlora",), ("train.gradient_checkpointing=true",)], ids=str)
def test_runs_of_every_kind_train_together_as_each_alone(more: tuple[str, ...], tmp_path: Path) -> None:
    runs = [run for words in DIFFERENT for run in some_runs(*SMALL, *FP32, *more, *words)]
    base = load_base(runs[0].config)
    records = pack_trained(runs, tmp_path / "pack", base)
    assert_equal(records, runs, tmp_path / "pack", tmp_path / "alone", base)
    assert [len(record["loss"]) for record in records] == [3, 2, 3]
    assert not base.model.training
    assert not any("forward" in module.__dict__ for module in base.model.modules())


def test_rows_that_are_cut_hold_some_of_the_runs_and_change_nothing(tmp_path: Path) -> None:
    runs = some_runs(*SMALL, *FP32, "method=sft", "train.micro_batch_tokens=250", "seed=0,1,2")
    base = load_base(runs[0].config)
    assert_equal(pack_trained(runs, tmp_path / "pack", base), runs, tmp_path / "pack", tmp_path / "alone", base)


def test_dropout_is_that_of_the_run_alone_also_where_activations_are_recomputed(tmp_path: Path) -> None:
    words = (*SMALL, "peft.compute_dtype=fp32", "peft.dropout=0.3", "train.optimizer=adamw_torch", "method=sft")
    for more in ("false", "true"):
        runs = some_runs(*words, f"train.gradient_checkpointing={more}", "seed=0,1,2")
        base = load_base(runs[0].config)
        root = tmp_path / more
        assert_equal(pack_trained(runs, root / "pack", base), runs, root / "pack", root / "alone", base)


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_in_bf16_with_dropout_it_is_bit_equal_when_repeated(peft: str, tmp_path: Path) -> None:
    runs = some_runs(*SMALL, f"peft={peft}", "peft.dropout=0.3", "method=dpo", "seed=0,1")
    base = load_base(runs[0].config)
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # whatever was drawn before
        pack_trained(runs, tmp_path / name, base)
    for run in runs:
        first, second = adapter(tmp_path / "first", run), adapter(tmp_path / "second", run)
        assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("way", ["parts", "flex"])
def test_a_run_that_fails_leaves_the_others_whole(way: str, tmp_path: Path) -> None:
    words = (*SMALL, *FP32, "method=sft", f"train.attention={way}")
    (bad,) = some_runs(*words, "train.learning_rate=1e30", "train.max_grad_norm=1e30")
    fine = some_runs(*words, "seed=1,2")
    base = load_base(bad.config)
    failed, *records = pack_trained([bad, *fine], tmp_path / "pack", base)
    assert isinstance(failed, TrainingFailed)
    assert RunDir(tmp_path / "pack", bad.id).train_record() is None
    for record, run in zip(records, fine, strict=True):
        assert record["loss"] == pytest.approx(trained(run, tmp_path / "alone", base)["loss"], rel=1e-5)


def test_an_interrupted_run_goes_on_alone_or_in_another_pack(tmp_path: Path) -> None:
    words = (*SMALL, *FP32, "train.max_steps=6", "method=sft")
    runs = some_runs(*words, "seed=0,1,2")
    (stranger,) = some_runs(*words, "method=dpo", "seed=7")
    base = load_base(runs[0].config)
    asked = {run.id: iter([False, True]) for run in runs}
    stops = {run.id: partial(next, asked[run.id]) for run in runs}
    ended = pack_trained(runs, tmp_path / "pack", base, stops)
    assert all(isinstance(each, Interrupted) for each in ended)
    for run in runs:
        state = json.loads((RunDir(tmp_path / "pack", run.id).states()[0] / "record.json").read_text())
        assert (state["step"], len(state["packed_with"])) == (2, 2)
    first = trained(runs[0], tmp_path / "pack", base)
    second, _, third = pack_trained([runs[1], stranger, runs[2]], tmp_path / "pack", base)
    assert stranger.id in second["packed_with"]
    assert runs[0].id in second["packed_with"]
    for run, record in zip(runs, (first, second, third), strict=True):
        assert record["loss"] == pytest.approx(trained(run, tmp_path / "alone", base)["loss"], rel=1e-5)
        ours, theirs = adapter(tmp_path / "pack", run), adapter(tmp_path / "alone", run)
        for name, weight in ours.items():
            assert float((weight - theirs[name]).norm()) <= 1e-5 * float(theirs[name].norm())


@pytest.mark.parametrize("most", [400, 250], ids=["shorter rows", "each alone"])
def test_memory_that_runs_out_shortens_the_rows_of_all_or_parts_them(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = some_runs(*SMALL, *FP32, "method=sft", "train.micro_batch_tokens=2000", "seed=0,1,2")
    base = load_base(runs[0].config)
    join, joined = pack_runs.join, []

    def little(rows: Sequence[Row]) -> Row:
        row = join(rows)
        if row.tokens.shape[1] > most or most == 250:
            raise torch.OutOfMemoryError("no more")
        joined.append(row.tokens.shape[1])
        return row

    monkeypatch.setattr(pack_runs, "join", little)
    records = pack_trained(runs, tmp_path / "pack", base)
    assert all(record["memory"]["micro_batch_tokens"] < 2000 for record in records)
    assert bool(joined) == (most == 400)
    for record, run in zip(records, runs, strict=True):
        assert len(record["packed_with"]) == (2 if most == 400 else 0)
        assert record["loss"] == pytest.approx(trained(run, tmp_path / "alone", base)["loss"], rel=1e-5)


def test_an_error_of_a_joint_step_is_every_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: Sequence[Row]) -> Row:
        raise TrainingFailed("shapes")

    monkeypatch.setattr(pack_runs, "join", broken)
    runs = some_runs(*SMALL, *FP32, "method=sft", "seed=0,1")
    ended = pack_trained(runs, tmp_path, load_base(runs[0].config))
    assert [str(each) for each in ended] == ["shapes", "shapes"]


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_a_base_with_own_modules_has_the_same_weights_in_memory(peft: str) -> None:
    (run,) = some_runs(*SMALL, f"peft={peft}", "method=sft")
    base = load_base(run.config)
    other = with_own_modules(base).model
    assert {id(m) for m in base.model.modules()}.isdisjoint({id(m) for m in other.modules()})
    for ours, theirs in zip(base.model.parameters(), other.parameters(), strict=True):
        assert ours is theirs
    states = [
        [id(m.quant_state) for m in model.modules() if hasattr(m, "quant_state")] for model in (base.model, other)
    ]
    assert states[0] == states[1]
    assert bool(states[0]) == (peft == "qlora")
