"""The engine `packed` against TRL's trainers over 20 optimizer steps of a real model on real rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from helpers import FP32, runs_of, trained

from peft_align.grid.runs import Run
from peft_align.models.loading import load_base
from peft_align.training.recorder import Recorder

STEPS = 20
REAL = ("dataset=hh_rlhf", "train.learning_rate=1e-4", "train.max_grad_norm=1e6")  # gradients as they are
WAYS = {
    "sft": ["method=sft"],
    "dpo from the base": ["method=dpo"],
    "dpo from sft": ["method=sft,dpo", "method.init=sft"],
}
Gradients = dict[str, torch.Tensor]


@pytest.fixture
def first_gradients(monkeypatch: pytest.MonkeyPatch) -> list[Gradients]:
    """The gradients of the first step of each run, as it is trained."""
    found: list[Gradients] = []

    def keep(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            weights = self.model.named_parameters()
            found.append({name: weight.grad.double().clone() for name, weight in weights if weight.grad is not None})

    monkeypatch.setattr(Recorder, "on_pre_optimizer_step", keep)
    return found


def distance(some: Gradients, others: Gradients) -> float:
    """Relative to the second."""
    assert some.keys() == others.keys()
    apart = sum(float((some[name] - others[name]).square().sum()) for name in some)
    return float((apart / sum(float(other.square().sum()) for other in others.values())) ** 0.5)


def runs(mirror: Path, model: str, words: Sequence[str], **settings: object) -> list[Run]:
    return runs_of(
        f"hub.mirror={mirror}", f"model={model}", *REAL, *words, *(f"train.{k}={v}" for k, v in settings.items())
    )


def compare(
    mirror: Path, model: str, peft: str, way: str, folder: Path, gradients: list[Gradients], **settings: object
) -> None:
    losses = {}
    for engine in ("trl", "packed"):
        asked = (*WAYS[way], *FP32, f"peft={peft}")
        made = runs(mirror, model, asked, engine=engine, max_steps=STEPS, **settings)
        base = load_base(made[0].config)
        records = [trained(run, folder / engine, base) for run in made]
        assert {record["engine"] for record in records} == {engine}
        losses[engine] = [record["loss"] for record in records]
    stock, ours = gradients[: len(made)], gradients[len(made) :]
    for theirs, mine in zip(losses["trl"], losses["packed"], strict=True):
        assert len(mine) == STEPS
        assert len(set(mine)) > STEPS / 2
        assert mine == pytest.approx(theirs, rel=0, abs=1e-4)
    assert distance(ours[0], stock[0]) < 1e-4
    if len(made) == 1:
        return
    assert distance(ours[1], stock[1]) < 1e-3, "of a parent that is equal up to the rounding of 20 steps"


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["lora", "qlora"])
@pytest.mark.parametrize("way", list(WAYS))
def test_20_losses_and_the_first_gradient_of_the_tiny_model_are_trls(
    way: str, peft: str, mirror: Path, tmp_path: Path, first_gradients: list[Gradients]
) -> None:
    small = {"batch_size": 4, "micro_batch_size": 2, "max_length": 300}
    compare(mirror, "tiny", peft, way, tmp_path, first_gradients, **small)


@pytest.mark.acceptance
@pytest.mark.parametrize("peft", ["lora", "qlora"])
@pytest.mark.parametrize("way", list(WAYS))
def test_20_losses_and_the_first_gradient_of_smollm2_are_trls(
    way: str, peft: str, mirror: Path, smollm2: Path, tmp_path: Path, first_gradients: list[Gradients]
) -> None:
    small = {"batch_size": 2, "micro_batch_size": 2, "max_length": 128}
    compare(mirror, "smollm2_135m", peft, way, tmp_path, first_gradients, **small)


@pytest.mark.acceptance
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_in_bf16_it_is_no_farther_from_fp32_than_trl_and_no_farther_from_trl_than_rounding_takes_it(
    method: str, mirror: Path, smollm2: Path, tmp_path: Path, first_gradients: list[Gradients]
) -> None:
    """Gradients and losses are held against those of fp32 on the same weights.

    TRL's micro-batch sizes round alike in part, so that TRL may be nearer to itself than exact arithmetic is to it: the
    difference between the engines is held against the larger of both.
    """
    words = [f"method={method}", "peft=lora", "peft.dropout=0", "train.optimizer=adamw_torch"]
    ways: list[dict[str, object]] = [{"engine": "packed"}]
    ways += [{"engine": "packed", "micro_batch_tokens": tokens} for tokens in (2048, 512)]
    ways += [{"engine": "trl", "micro_batch_size": size} for size in (1, 2, 4)]
    losses = []
    for at, way in enumerate(ways):
        more = [] if at else ["peft.compute_dtype=fp32"]
        (run,) = runs(mirror, "smollm2_135m", [*words, *more], max_steps=10, batch_size=8, max_length=512, **way)
        base = load_base(run.config)
        if not at:
            base.model.to(torch.bfloat16).float()
        record = trained(run, tmp_path / str(at), base)
        assert record["engine"] == way["engine"]
        losses.append(record["loss"])
    exact, ours, stock = first_gradients[0], first_gradients[1:3], first_gradients[3:]
    off, their_off = ([distance(each, exact) for each in some] for some in (ours, stock))
    exact_losses, our_losses, their_losses = losses[0], losses[1:3], losses[3:]
    from_exact, theirs_from_exact = (mean(apart(a, exact_losses) for a in some) for some in (our_losses, their_losses))
    own = mean(apart(a, b) for i, a in enumerate(their_losses) for b in their_losses[:i])
    to_them = mean(apart(a, b) for a in our_losses for b in their_losses)
    print(f"{method}: gradients from fp32's: ours {off}, TRL's {their_off}")
    print(f"{method}: losses from fp32's: ours {from_exact}, TRL's {theirs_from_exact}")
    print(f"{method}: ours from TRL's: {to_them}, TRL's from its own: {own}")
    assert max(off) <= max(their_off)
    assert from_exact <= 1.25 * theirs_from_exact, "means of what is mostly chance"
    assert to_them <= 1.25 * max(own, theirs_from_exact)


def apart(some: Sequence[float], others: Sequence[float]) -> float:
    """The mean difference of losses."""
    return mean(abs(a - b) for a, b in zip(some, others, strict=True))
