"""The engine `packed` against TRL's on the same batches, and what it saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, run_of, runs_of, trained

from peft_align.errors import InputError
from peft_align.models import flex_attention
from peft_align.models.flex_attention import Trial
from peft_align.models.loading import load_base
from peft_align.models.packing import Row, Sample
from peft_align.store.runs import RunDir
from peft_align.training import engine
from peft_align.training.engine import PackedTrainer
from peft_align.training.run import Interrupted, train

SMALL = (
    "model=tiny", "dataset=everyday", "train.max_steps=3", "train.batch_size=4", "train.micro_batch_size=2",
    "train.max_length=200", "train.learning_rate=1e-3",
)  # fmt: skip


def lines(root: Path, run_id: str) -> list[dict[str, Any]]:
    text = (RunDir(root, run_id).path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("peft", ["lora", "qlora"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_losses_gradients_and_metrics_are_trls(method: str, peft: str, tmp_path: Path) -> None:
    words = (*SMALL, *FP32, f"method={method}", f"peft={peft}")
    stock = run_of(*words, "train.engine=trl")
    base = load_base(stock.config)
    record = trained(stock, tmp_path, base)
    theirs = lines(tmp_path, stock.id)
    for tokens in (100_000, 300, 1):
        run = run_of(*words, "train.engine=packed", f"train.micro_batch_tokens={tokens}")
        assert run.id != stock.id, "the engine is part of what a run is"
        found = trained(run, tmp_path / str(tokens), base)
        assert found["engine"] == "packed"
        assert found["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert found["tokens"] == record["tokens"]
        for mine, other in zip(lines(tmp_path / str(tokens), run.id), theirs, strict=True):
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert mine["learning_rate"] == other["learning_rate"]
            names = [name for name in other if name.startswith(("rewards/", "logps/"))]
            assert len(names) == (6 if method == "dpo" else 0)
            for name in names:
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


def test_dpo_from_sft_has_the_parent_for_its_reference(tmp_path: Path) -> None:
    losses = []
    for name in ("trl", "packed"):
        words = (*SMALL, *FP32, "method=sft,dpo", "method.init=sft", "peft=lora", f"train.engine={name}")
        parent, child = runs_of(*words)
        base = load_base(parent.config)
        trained(parent, tmp_path / name, base)
        losses.append(trained(child, tmp_path / name, base)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][0] == pytest.approx(0.6931472, rel=1e-6)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    losses = []
    for flag in ("false", "true"):
        run = run_of(
            *SMALL, *FP32, "method=dpo", "peft=lora", "train.engine=packed", f"train.gradient_checkpointing={flag}"
        )
        losses.append(trained(run, tmp_path / flag)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("method", "recomputed"), [("sft", "false"), ("dpo", "true")])
def test_flex_attention_trains_to_the_same_losses(
    method: str, recomputed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SMALL, *FP32, f"method={method}", "peft=lora", "train.engine=packed")
    base = load_base(run_of(*words).config)
    expected = trained(run_of(*words), tmp_path, base)
    assert expected["memory"]["attention"] == "parts", "on a CPU"
    run = run_of(*words, "train.attention=flex", f"train.gradient_checkpointing={recomputed}")
    found = trained(run, tmp_path / "flex", base)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["memory"]["attention"] == "flex"
    assert "attention by flex" in capsys.readouterr().out
    assert run.id == run_of(*words).id, "an operational setting"


def test_reference_values_of_one_way_of_attention_are_not_taken_for_the_others(tmp_path: Path) -> None:
    words = (*SMALL, *FP32, "method=dpo", "peft=lora", "train.engine=packed")
    for way in ("parts", "flex"):
        found = trained(run_of(*words, f"train.attention={way}"), tmp_path)["reference"]
        assert found["computed"] == found["samples"]


def test_an_interrupted_run_goes_on_with_its_way_of_attention(tmp_path: Path) -> None:
    words = (*SMALL, *FP32, "method=dpo", "peft=lora", "train.engine=packed", "train.state_every=1")
    asked = iter((False, True))
    run = run_of(*words, "train.attention=flex")
    with pytest.raises(Interrupted):
        train(run, RunDir(tmp_path, run.id), load_base(run.config), lambda *told: None, lambda: next(asked))
    record = trained(run_of(*words), tmp_path)
    assert record["memory"]["attention"] == "flex"
    assert len(record["loss"]) == 3


def test_where_flex_attention_fails_parts_are_taken_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*given: Any) -> Any:
        raise NotImplementedError("no such kernel here")

    monkeypatch.setattr(flex_attention, "block_mask", none)
    run = run_of(*SMALL, *FP32, "method=dpo", "peft=lora", "train.engine=packed", "train.attention=flex")
    record = trained(run, tmp_path)
    assert record["memory"]["attention"] == "parts"
    assert "warning: flex attention is not used: it failed: no such kernel here" in capsys.readouterr().out


def test_both_ways_are_timed_where_the_faster_is_asked_for_and_leave_no_trace(tmp_path: Path) -> None:
    """What `auto` does on a GPU, on a CPU."""
    words = (*SMALL, "method=sft", "peft=lora", "peft.dropout=0.5", "train.engine=packed")
    tried = PackedTrainer._tried_attention
    before = trained(run_of(*words), tmp_path / "parts")["loss"]
    found: list[Trial] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedTrainer, "_choose_attention", lambda self, asked: timed(self))

        def timed(self: PackedTrainer) -> None:
            self.attention = "parts"
            found.append(tried(self, timed=True))

        assert trained(run_of(*words), tmp_path / "timed")["loss"] == before
    assert set(found[0].seconds) == {"parts", "flex"}


def test_with_dropout_it_trains_and_the_reference_has_none(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=dpo", "peft=lora", "peft.dropout=0.5", "train.engine=packed")
    record = trained(run, tmp_path)
    assert record["loss"][0] == pytest.approx(0.6931472, rel=1e-3), "a fresh adapter adds nothing, dropped out or not"
    assert len(set(record["loss"])) == 3


def test_ranks_seeds_and_betas_share_every_reference_value(tmp_path: Path) -> None:
    runs = runs_of(
        *SMALL, *FP32, "method=dpo", "peft=lora", "train.engine=packed",
        "peft.r=2,4,8", "seed=0,1,2",
    )  # fmt: skip
    assert len(runs) == 9
    base = load_base(runs[0].config)
    records = [trained(run, tmp_path, base)["reference"] for run in runs]
    kept = [json.loads(path.read_text())["values"] for path in (tmp_path / "reference").glob("*/*.json")]
    assert sum(record["computed"] for record in records) == sum(map(len, kept))
    by_seed = {run.config.seed: record["samples"] for run, record in zip(runs, records, strict=True)}
    assert max(by_seed.values()) <= sum(map(len, kept)) <= sum(by_seed.values())
    other = run_of(*SMALL, *FP32, "method=dpo", "peft=qlora", "train.engine=packed")
    assert trained(other, tmp_path)["reference"]["computed"] == by_seed[0], "another base precision, other values"


def test_memory_that_runs_out_makes_rows_shorter_and_no_other_trajectory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SMALL, *FP32, "method=sft", "peft=lora", "train.engine=packed", "train.micro_batch_tokens=2000")
    run = run_of(*words)
    base = load_base(run.config)
    expected = trained(run, tmp_path / "enough", base)["loss"]
    pack, rows = engine.pack, []

    def packed(samples: Sequence[Sample], device: Any) -> Row:
        row = pack(samples, device)
        if row.tokens.shape[1] > 250:
            raise torch.OutOfMemoryError("no more")
        rows.append(row.tokens.shape[1])
        return row

    monkeypatch.setattr(engine, "pack", packed)
    assert trained(run, tmp_path / "little", base)["loss"] == pytest.approx(expected, rel=1e-5)
    assert max(rows) <= 250
    assert "out of memory: going on with 250 tokens at a time" in capsys.readouterr().out


def test_a_sample_that_does_not_fit_by_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*given: Any) -> Row:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(engine, "pack", none_left)
    with pytest.raises(MemoryError, match=r"a single sample of \d+ tokens does not fit into memory"):
        trained(run_of(*SMALL, "method=sft", "peft=lora", "train.engine=packed"), tmp_path)


def test_another_error_is_not_taken_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Row:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(engine, "pack", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        trained(run_of(*SMALL, "method=sft", "peft=lora", "train.engine=packed"), tmp_path)


def test_a_model_that_cannot_be_given_rows_is_trained_by_trl_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SMALL, *FP32, "method=sft", "peft=lora")
    stock, run = run_of(*words, "train.engine=trl"), run_of(*words, "train.engine=packed")
    base = load_base(run.config)
    monkeypatch.setattr(base.model.config, "sliding_window", 20, raising=False)
    record = trained(run, tmp_path, base)
    assert record["engine"] == "trl"
    assert record["loss"] == trained(stock, tmp_path, base)["loss"]
    assert "is trained by TRL's own engine: it attends to the last 20 tokens only" in capsys.readouterr().out


def test_a_stop_while_the_reference_is_scored_keeps_the_values_so_far(tmp_path: Path) -> None:
    run = run_of(*SMALL, *FP32, "method=dpo", "peft=lora", "train.engine=packed")
    directory, base = RunDir(tmp_path, run.id), load_base(run.config)
    with pytest.raises(Interrupted, match="values so far are kept"):
        train(run, directory, base, lambda *told: None, lambda: True)
    assert directory.train_record() is None
    assert directory.reached()[2] > 0, "it counts as having got further"
    record = trained(run, tmp_path, base)
    assert record["reference"]["computed"] < record["reference"]["samples"]


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_an_adapter_on_the_head_is_refused(engine: str, tmp_path: Path) -> None:
    words = (*SMALL, "method=sft", "peft=lora", f"train.engine={engine}", "peft.target_modules=[q_proj,lm_head]")
    with pytest.raises(InputError, match="lm_head: log-probabilities are computed from the head's own weights"):
        trained(run_of(*words), tmp_path)


def test_an_adapter_that_a_kill_left_without_a_record_is_replaced(tmp_path: Path) -> None:
    run = run_of(*SMALL, *FP32, "method=sft", "peft=lora", "train.engine=packed", "train.state_every=1")
    asked = iter((False, True))
    with pytest.raises(Interrupted):
        train(run, RunDir(tmp_path, run.id), load_base(run.config), lambda *told: None, lambda: next(asked))
    left = RunDir(tmp_path, run.id).attempt / "adapter"
    left.mkdir()
    (left / "adapter_config.json").write_text("{}")
    record = trained(run, tmp_path)
    assert RunDir(tmp_path, run.id).product() == RunDir(tmp_path, run.id).adapter, "verified against the record"
    assert len(record["loss"]) == 3


def test_recomputing_leaves_no_hook_on_the_embeddings(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora", "train.engine=packed", "train.gradient_checkpointing=true")
    base = load_base(run.config)
    trained(run, tmp_path, base)
    assert not base.model.get_input_embeddings()._forward_hooks
