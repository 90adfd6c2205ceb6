"""What a row gives is what each text gives by itself: log-probabilities, gradients, with and without recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweeping import expand, trained
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from peft_align.models import head
from peft_align.models.head import token_log_probs
from peft_align.models.loading import load_base
from peft_align.models.packed_attention import packed
from peft_align.models.packed_scoring import response_scores, why_not_packed
from peft_align.models.packing import Sample, pack

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 100}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **HEADS)),  # query, key and value with bias
    }[request.param]()
    made.requires_grad_(False)
    made.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    made.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    return made.eval()


def samples() -> list[Sample]:
    words = torch.Generator().manual_seed(1)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 100, (length,), generator=words).tolist())

    return [
        Sample(text(7), (text(5), text(3))),
        Sample(text(12), (text(1), text(9), text(4))),
        Sample((), (text(4), text(6))),
        Sample(text(1), (text(2),)),
    ]


def one_by_one(model: Any, given: list[Sample]) -> torch.Tensor:
    found = []
    for sample in given:
        for words in sample.responses:
            ids = torch.tensor([sample.prompt + words])
            scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            found.append(scores[max(0, len(sample.prompt) - 1) :].sum())
    return torch.stack(found)


def gradients(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_gradients_are_those_of_each_text_alone(model: Any, checkpointing: bool) -> None:
    given, weights = samples(), torch.randn(8, generator=torch.Generator().manual_seed(2))
    expected = one_by_one(model, given)
    (expected * weights).sum().backward()
    theirs = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    row = pack(given)
    with packed(model):
        scores = response_scores(model, row)
        (scores * weights).sum().backward()
    ours = gradients(model)
    assert scores.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-5 * other.abs().max()


def test_a_response_is_blind_to_the_others(model: Any) -> None:
    given = samples()
    other = [Sample(s.prompt, (s.responses[0], *[tuple(99 - w for w in r) for r in s.responses[1:]])) for s in given]
    with packed(model), torch.no_grad():
        before, after = response_scores(model, pack(given)), response_scores(model, pack(other))
    first = [0, 2, 5, 7]
    assert after[first].tolist() == pytest.approx(before[first].tolist(), rel=1e-7)
    assert after[1] != before[1]


def test_the_model_attends_as_before_afterwards(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4 * 50 * 3, 2**25])
def test_the_head_has_the_scores_and_gradients_of_a_softmax_whatever_its_chunks(
    monkeypatch: pytest.MonkeyPatch, bias: bool, chunk: int
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    torch.manual_seed(0)
    last = torch.nn.Linear(8, 50, bias=bias).requires_grad_(False)
    hidden, targets, weights = torch.randn(10, 8, requires_grad=True), torch.randint(0, 50, (10,)), torch.randn(10)
    expected = last(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found = token_log_probs(hidden, last, targets)
    (ours,) = torch.autograd.grad((found * weights).sum(), hidden)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_in_bf16_the_head_does_not_round_the_logits_that_carry_the_score(bias: bool) -> None:
    torch.manual_seed(0)
    last = torch.nn.Linear(64, 500, bias=bias).requires_grad_(False)
    last.weight.mul_(32)
    hidden, targets = torch.randn(100, 64).bfloat16(), torch.randint(0, 500, (100,))
    exactly = torch.nn.functional.linear(hidden.float(), *(p.bfloat16().float() for p in last.parameters()))
    expected = exactly.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    last.to(torch.bfloat16)
    rounded = last(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = token_log_probs(hidden, last, targets)
    assert (rounded - expected).square().mean().sqrt() > 20 * (found - expected).square().mean().sqrt()


def test_where_no_gradient_is_wanted_none_is_kept() -> None:
    last = torch.nn.Linear(8, 50).requires_grad_(False)
    found = token_log_probs(torch.randn(3, 8), last, torch.tensor([1, 2, 3]))
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_can_be_given_rows_is_found_to(model: Any, dtype: torch.dtype) -> None:
    assert why_not_packed(model.to(dtype), 10_000) is None


def test_a_model_that_cannot_is_found_with_the_reason() -> None:
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=64)).eval().requires_grad_(False)
    assert why_not_packed(mistral, 64) is None
    assert "last 64 tokens only" in str(why_not_packed(mistral, 65))
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS, head_dim=16, sliding_window=64)).requires_grad_(False)
    assert "softcap" in str(why_not_packed(gemma, 10))
    trained = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS))
    assert "head is trained" in str(why_not_packed(trained, 10))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)).requires_grad_(False)
    assert why_not_packed(gpt2, 10) == "it has attn_pdrop"
    dropping = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, attention_dropout=0.1)).requires_grad_(False)
    assert why_not_packed(dropping, 10) == "it has attention_dropout"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_real_model_is_given_rows_in_every_precision(dtype: str, smollm2: Path) -> None:
    run = trained(expand("model=smollm2_135m", "dataset=everyday", "peft=lora", f"peft.compute_dtype={dtype}"))[0]
    assert why_not_packed(load_base(run.config).model, 512) is None
