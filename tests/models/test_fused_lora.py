"""LoRA layers in one product compute what PEFT's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_align.models.fused_lora import fused

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def adapted(**more: Any) -> Any:
    """A small Llama with an adapter that is not zero."""
    torch.manual_seed(0)
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
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(gradients) == 8
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)
    again, _ = logits_and_gradients(model)
    assert torch.equal(again, expected), "afterwards it is PEFT's again"


def test_in_bf16_it_is_no_farther_from_the_exact_result_than_pefts() -> None:
    exact, _ = logits_and_gradients(adapted().double())
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = logits_and_gradients(model)
        with fused(model):
            ours, gradients = logits_and_gradients(model)
    assert gradients[0].dtype == torch.float32
    assert (ours.double() - exact).norm() < 1.1 * (theirs.double() - exact).norm()


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
        assert torch.equal(logits_and_gradients(model)[0], expected)


def test_an_adapter_that_is_off_stays_off() -> None:
    model = adapted()
    with model.disable_adapter():
        expected, _ = model(torch.arange(5)[None]).logits, None
        with fused(model):
            assert torch.equal(model(torch.arange(5)[None]).logits, expected)
