"""Bases, adapters and scores on the tiny model."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sweeping import expand
from transformers import AutoModelForCausalLM

from peft_align.config.schema import Config
from peft_align.errors import InputError
from peft_align.models import loading
from peft_align.models.adapters import continue_adapter, loaded_adapter, new_adapter, save_adapter, take_off
from peft_align.models.loading import Base, BaseCache, load_base
from peft_align.models.scoring import response_log_probabilities

IDS = torch.arange(3, 40)[None]


def config_of(*words: str) -> Config:
    return expand("model=tiny", "dataset=everyday", *words).runs[0].config


@pytest.fixture(scope="module", params=["fp32", "bf16", "nf4"])
def config(request: pytest.FixtureRequest) -> Config:
    words = {"fp32": ["peft=lora", "peft.compute_dtype=fp32"], "bf16": ["peft=lora"], "nf4": ["peft=qlora"]}
    return config_of(*words[request.param], "method=dpo")


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.clone()


def disturb(model: torch.nn.Module) -> None:
    """Make a fresh adapter do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_a_base_is_given_back_as_it_was(config: Config, tmp_path: Path) -> None:
    base = load_base(config)
    before = logits(base.model)
    model = new_adapter(base, config.peft)
    disturb(model)
    assert not torch.equal(logits(model), before)
    save_adapter(model, tmp_path / "adapter", "base")
    take_off(base, model)
    assert torch.equal(logits(base.model), before)
    assert not any(p.requires_grad for p in base.model.parameters())
    with loaded_adapter(base, tmp_path / "adapter") as again:
        assert not torch.equal(logits(again), before)
    assert torch.equal(logits(base.model), before)


def test_evaluating_leaves_quantized_weights_as_they_are(config: Config) -> None:
    base = load_base(config)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    logits(base.model)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_adapters_precision_is_the_same_for_lora_and_qlora(config: Config) -> None:
    base = load_base(config)
    model = new_adapter(base, config.peft)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    take_off(base, model)


def test_an_unknown_target_module_is_a_clear_fault() -> None:
    config = config_of("peft.target_modules=[q_proj,qq_proj]", "peft=lora")
    with pytest.raises(InputError, match="qq_proj"):
        new_adapter(load_base(config), config.peft)


def test_a_base_is_loaded_once_for_the_runs_that_share_it() -> None:
    cache = BaseCache()
    sft, dpo = (config_of(f"method={m}", "peft=lora") for m in ("sft", "dpo"))
    assert cache.get(sft) is cache.get(dpo)
    assert cache.get(config_of("peft=qlora")) is not cache.get(sft)
    assert cache.loads == 3


def test_the_tiny_model_is_the_same_every_time_and_loads_with_plain_transformers() -> None:
    base = load_base(config_of("peft=lora", "peft.compute_dtype=fp32"))
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    assert torch.equal(logits(plain), logits(base.model))


def test_response_scores_equal_one_sequence_at_a_time_and_do_not_depend_on_the_batch() -> None:
    base: Base = load_base(config_of("peft=lora", "peft.compute_dtype=fp32"))
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randint(3, 250, (p,), generator=generator).tolist(),
            torch.randint(3, 250, (r,), generator=generator).tolist(),
        )
        for p, r in [(1, 1), (5, 9), (30, 2), (7, 40), (12, 12)]
    ]
    expected = []
    for prompt, response in pairs:
        with torch.inference_mode():
            out = base.model(torch.tensor([prompt + response])).logits[0].double()
        logps = torch.log_softmax(out, -1)
        expected.append(sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response)))
    for size in (1, 2, 5):
        scores = response_log_probabilities(base.model, pairs, batch_size=size, pad_token_id=0)
        assert scores == pytest.approx(expected, rel=1e-5)


def test_an_adapter_is_evaluated_and_continued_in_the_precision_it_is_kept_in(config: Config, tmp_path: Path) -> None:
    base = load_base(config)
    model = new_adapter(base, config.peft)
    disturb(model)
    save_adapter(model, tmp_path / "adapter", "base")
    take_off(base, model)
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}

    with loaded_adapter(base, tmp_path / "adapter") as loaded:
        assert all(torch.equal(p, kept[name]) for name, p in weights(loaded).items())
    continued = continue_adapter(base, tmp_path / "adapter", config.peft)
    assert all(torch.equal(p, kept[name]) for name, p in weights(continued).items())
    assert len(weights(continued)) == len(kept) > 0
    take_off(base, continued)


def test_what_was_imported_is_passed_over_by_collections_once_and_before_the_first_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    load = loading.load_base
    monkeypatch.setattr(gc, "freeze", lambda: made.append("frozen"))
    monkeypatch.setattr(loading, "load_base", lambda *given, **how: made.append("loaded") or load(*given, **how))
    loading.pass_over_modules.cache_clear()
    bases = BaseCache()
    for words in (["peft=lora"], ["peft=qlora"]):
        bases.get(config_of(*words, "method=sft"))
    assert made == ["frozen", "loaded", "loaded"]
