"""Layers in fewer passes compute what PEFT's and transformers' do."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_align.models.fused import Share, fused

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def adapted(seed: int = 0, **more: Any) -> Any:
    """A small Llama with an adapter that is not zero."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], **more)
    made = get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def logits_and_gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(torch.arange(20).view(2, 10)).logits
    logits.pow(2).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    return logits, gradients


def test_outputs_and_gradients_are_pefts() -> None:
    model = adapted().double()
    expected, expected_gradients = logits_and_gradients(model)
    with fused(model):
        assert "forward" in model.base_model.model.model.layers[0].self_attn.q_proj.__dict__
        found, gradients = logits_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # norms are fp32 in double too
    assert len(gradients) == 8
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)
    again, _ = logits_and_gradients(model)
    assert torch.equal(again, expected), "afterwards it is PEFT's again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_and_its_gradient_are_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    norm = adapted().base_model.model.model.norm.to(dtype)
    norm.weight.data = torch.rand(32).add(0.5).to(dtype)
    x, direction = (torch.randn(2, 7, 32).to(dtype) for _ in range(2))
    found = []
    for context in (nullcontext, fused):
        given = x.clone().requires_grad_()
        with context(norm):
            assert ("forward" in norm.__dict__) == (context is fused)
            out = norm(given)
            (out * direction).sum().backward()
        found.append((out.detach(), given.grad))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_norm_that_is_trained_is_left_alone() -> None:
    norm = adapted().base_model.model.model.norm.requires_grad_()
    with fused(norm):
        assert "forward" not in norm.__dict__


def test_in_bf16_it_is_no_farther_from_the_exact_result_than_pefts() -> None:
    ours, theirs = [], []
    for seed in range(10):
        exact, _ = logits_and_gradients(adapted(seed).double())
        model = adapted(seed)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            theirs.append(float((logits_and_gradients(model)[0].double() - exact).norm()))
            with fused(model):
                logits, gradients = logits_and_gradients(model)
            ours.append(float((logits.double() - exact).norm()))
        assert gradients[0].dtype == torch.float32
    assert sum(ours) < 1.05 * sum(theirs)


def test_dropout_falls_on_the_adapters_input_alone() -> None:
    model = adapted(lora_dropout=0.5).double().train()
    with fused(model):
        drawn = torch.stack([model(torch.arange(10)[None]).logits[0, -1] for _ in range(400)])
    model.eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, dtype=torch.float64)
    whole = layer(x)
    model.train()
    with fused(model):
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert drawn.std(0).min() > 0
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.1)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_layers_of_another_kind_are_left_alone(more: dict[str, bool]) -> None:
    model = adapted(**more)
    expected, _ = logits_and_gradients(model)
    with fused(model):
        assert not any("forward" in module.__dict__ for module in model.modules() if hasattr(module, "lora_A"))
        torch.testing.assert_close(logits_and_gradients(model)[0], expected)


def test_an_adapter_that_is_off_stays_off() -> None:
    model = adapted()
    with model.disable_adapter():
        expected, _ = model(torch.arange(5)[None]).logits, None
        with fused(model):
            torch.testing.assert_close(model(torch.arange(5)[None]).logits, expected)


@pytest.mark.parametrize("frozen", [True, False], ids=["one product", "a base of another kind"])
def test_each_share_of_a_row_has_its_own_adapter_and_gradients(frozen: bool) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    adapters = [adapted(seed).double().base_model.model for seed in (1, 2)]
    torch.manual_seed(0)
    bare = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2)).double()
    for adapter in adapters:  # on the same weights
        for name in names:
            layer = adapter.get_submodule(name)
            getattr(layer, "base_layer", layer).weight.data = bare.get_submodule(name).weight.data
    adapters[1].model.layers[0].mlp.down_proj = adapters[1].model.layers[0].mlp.down_proj.base_layer
    for name in names:
        bare.get_submodule(name).requires_grad_(not frozen)
    tokens = [slice(0, 5), slice(5, 12)]
    shares = [Share(a, t, lambda name: nullcontext()) for a, t in zip(adapters, tokens, strict=True)]
    for name in names:
        x = torch.randn(1, 12, bare.get_submodule(name).in_features, dtype=torch.float64, requires_grad=True)
        together = partial(_with_shares, bare, shares, name)
        apart = [partial(adapter.get_submodule(name)) for adapter in adapters]
        direction = torch.randn(1, 12, bare.get_submodule(name).out_features, dtype=torch.float64)
        found = together(x)
        gradients = _gradients(found, direction, x, adapters, name)
        expected = torch.cat([layer(x[:, t]) for layer, t in zip(apart, tokens, strict=True)], 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients, _gradients(expected, direction, x, adapters, name), rtol=1e-6, atol=1e-6)
    assert not any("forward" in module.__dict__ for module in bare.modules())


def _with_shares(model: Any, shares: list[Share], name: str, x: torch.Tensor) -> torch.Tensor:
    with fused(model, shares):
        found: torch.Tensor = model.get_submodule(name)(x)
    return found


def _gradients(
    out: torch.Tensor, direction: torch.Tensor, x: torch.Tensor, adapters: list[Any], name: str
) -> list[torch.Tensor]:
    layers = [adapter.get_submodule(name) for adapter in adapters]
    weights = [p for layer in layers for n, p in layer.named_parameters() if "lora_" in n]
    return list(torch.autograd.grad((out * direction).sum(), [x, *weights]))
