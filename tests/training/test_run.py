"""One run from its config to its record, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import FP32, run_of, runs_of, trained
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_align.config.schema import OPTIMIZERS
from peft_align.models.loading import load_base
from peft_align.store.runs import RunDir
from peft_align.training.numerics import TrainingFailed
from peft_align.training.run import micro_batch, train

SMALL = ("model=tiny", "dataset=everyday", "train.max_steps=3", "train.batch_size=4", "train.max_length=200")


def weights(root: Path, run_id: str, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(RunDir(root, run_id).checkpoint(step) / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_a_run_leaves_an_adapter_its_checkpoints_metrics_and_a_record(method: str, peft: str, tmp_path: Path) -> None:
    run = run_of(*SMALL, f"method={method}", f"peft={peft}", "train.checkpoint_steps=[1,3]")
    record = trained(run, tmp_path)
    directory = RunDir(tmp_path, run.id)
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == record["loss"]
    assert lines[-1]["samples"] == record["samples"] == 12
    assert sorted(record["checkpoints"]) == ["1", "3"]
    assert (directory.adapter / "adapter_model.safetensors").is_file()
    assert not directory.attempt.exists()
    assert record["data"]["counts"]["read"] == 104
    assert record["provenance"]["packages"]["trl"]
    assert record["inputs"]["model"]["files"]["model.safetensors"]["sha256"]
    assert {tensor.dtype for tensor in weights(tmp_path, run.id, 3).values()} == {torch.float32}
    changed = weights(tmp_path, run.id, 1), weights(tmp_path, run.id, 3)
    assert any(not torch.equal(changed[0][name], changed[1][name]) for name in changed[0])


def test_the_adapter_loads_with_plain_transformers_and_peft(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora")
    trained(run, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(load_base(run.config).folder)
    model = PeftModel.from_pretrained(base, RunDir(tmp_path, run.id).adapter)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) > 0


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_fp32_losses_do_not_depend_on_the_micro_batch_or_checkpointing(method: str, tmp_path: Path) -> None:
    trajectories = []
    for i, words in enumerate([("1", "false"), ("2", "false"), ("4", "false"), ("2", "true")]):
        run = run_of(
            *SMALL, f"method={method}", "peft=lora", *FP32, "train.learning_rate=1e-2",
            f"train.micro_batch_size={words[0]}", f"train.gradient_checkpointing={words[1]}",
        )  # fmt: skip
        trajectories.append(trained(run, tmp_path / str(i))["loss"])
    for other in trajectories[1:]:
        assert other == pytest.approx(trajectories[0], rel=1e-5)
    assert len(set(trajectories[0])) == 3


@pytest.mark.parametrize("peft", ["lora", "qlora"])
def test_a_run_is_bit_equal_when_repeated_whatever_was_done_before_in_the_process(peft: str, tmp_path: Path) -> None:
    run, other = (run_of(*SMALL, f"method={m}", f"peft={peft}") for m in ("dpo", "sft"))
    base = load_base(run.config)
    trained(other, tmp_path / "before", base)
    trained(run, tmp_path / "first", base)
    trained(run, tmp_path / "second")
    first, second = (weights(tmp_path / name, run.id, 3) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_seeds_differ_in_adapter_and_samples(tmp_path: Path) -> None:
    runs = runs_of(*SMALL, "method=sft", "peft=lora", "seed=0,1")
    losses = [trained(run, tmp_path)["loss"] for run in runs]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("words", [("peft=lora", *FP32), ("peft=lora",), ("peft=qlora",)], ids=["fp32", "bf16", "nf4"])
def test_dpo_from_sft_continues_a_copy_of_the_parents_adapter_and_refers_to_it(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    more = ("train.learning_rate=1e-2", "peft.dropout=0")
    words = tuple(word for word in words if "dropout" not in word)
    parent, child = runs_of(*SMALL, "method=sft,dpo", "method.init=sft", *words, *more)
    assert child.parents == (parent.id,)
    trained(parent, tmp_path)
    before = weights(tmp_path, parent.id, 3)
    record = trained(child, tmp_path)
    assert record["loss"][0] == pytest.approx(0.693147, abs=1e-6)  # policy = reference at the first step
    assert record["loss"][2] != pytest.approx(0.693147, rel=1e-3)
    after, own = weights(tmp_path, parent.id, 3), weights(tmp_path, child.id, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == own.keys()  # the same shape, and no reference beside it
    distance = sum((own[n] - before[n]).norm() for n in own) / sum(before[n].norm() for n in own)
    assert 0 < distance < 0.5


def test_a_loss_that_is_not_finite_fails_the_run_and_names_the_step(tmp_path: Path) -> None:
    run = run_of(*SMALL, "method=sft", "peft=lora", *FP32, "train.learning_rate=1e30", "train.max_grad_norm=1e30")
    base = load_base(run.config)
    with pytest.raises(TrainingFailed, match=r"at step [23]"):
        train(run, RunDir(tmp_path, run.id), base, lambda metrics, step: None)
    assert RunDir(tmp_path, run.id).train_record() is None
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize(("batch", "most", "expected"), [(16, 4, 4), (12, 8, 6), (7, 4, 1), (2, 8, 2)])
def test_the_micro_batch_divides_the_effective_batch(batch: int, most: int, expected: int) -> None:
    assert micro_batch(batch, most) == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_of_the_schema_trains(optimizer: str, tmp_path: Path) -> None:
    words = ("model=tiny", "dataset=everyday", "peft=lora", "method=sft", "train.max_steps=2", "train.batch_size=2")
    record = trained(run_of(*words, f"train.optimizer={optimizer}", "train.learning_rate=1e-2"), tmp_path)
    assert len(set(record["loss"])) == 2
