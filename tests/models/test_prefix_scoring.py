"""Continuations scored in rows that share prefixes, against each request by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sweeping import expand, trained
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from peft_align.models import prefix_scoring
from peft_align.models.loading import load_base
from peft_align.models.packed_attention import packed
from peft_align.models.packed_scoring import response_scores
from peft_align.models.packing import Sample, pack
from peft_align.models.prefix_scoring import log_likelihoods, try_attention, why_not_shared
from peft_align.models.shared_prefix import groups_of, sample_of, texts_of

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 100}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LONGEST = 60
Request = tuple[list[int], list[int]]


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, initializer_range=0.2)).requires_grad_(False).eval()


def qwen2() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **HEADS, initializer_range=0.2)).requires_grad_(False).eval()


def adapted(model: Any, **settings: Any) -> Any:
    """The model with a LoRA adapter that changes what it says."""
    modules = ["q_proj", "v_proj", "down_proj"]
    found = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, **settings))
    words = torch.Generator().manual_seed(3)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=words).to(parameter.dtype) * 0.1
    return found.requires_grad_(False).eval()


MODELS: dict[str, Any] = {"llama": llama, "qwen2": qwen2, "adapter": lambda: adapted(llama())}


def one_by_one(model: Any, requests: list[Request], longest: int = LONGEST) -> list[tuple[float, bool]]:
    found = []
    for context, continuation in requests:
        tokens = [*context, *continuation][-(longest + 1) :]
        scores = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :].float().log_softmax(-1)
        targets = torch.tensor(continuation)
        picked = scores.gather(1, targets[:, None]).sum()
        found.append((float(picked), bool((scores.argmax(-1) == targets).all())))
    return found


def greedy(model: Any, context: list[int], length: int) -> list[int]:
    tokens = list(context)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens[-LONGEST:]])).logits[0, -1].argmax()))
    return tokens[len(context) :]


def requests_of(model: Any) -> list[Request]:
    """Few-shot questions with answers of one and of several tokens, the likeliest among them, and every odd shape."""
    words = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(0, 100, (length,), generator=words).tolist()

    shots = text(20)
    contexts = [shots + text(3 + i % 4) for i in range(7)] + [text(6), text(1), text(LONGEST + 5), [5]]
    found = [(context, [answer]) for context in contexts for answer in (1, 2, 3, *greedy(model, context, 1))]
    for context in contexts:
        first = text(2)
        found += [(context, first + text(3)), (context, first + text(1)), (context, greedy(model, context, 4))]
    found += [
        (shots, text(3)),
        (shots[:5], text(2)),
        (shots[:6], shots[6:9]),
        (shots[:7], shots[7:9]),
        (shots, text(45)),
    ]
    return found + found[:3]


@pytest.mark.parametrize("budget", [1, 30, 64, 5000])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_greediness_are_those_of_each_request_alone(name: str, budget: int) -> None:
    model = MODELS[name]()
    requests = requests_of(model)
    assert why_not_shared(model, LONGEST) is None
    expected = one_by_one(model, requests)
    found = log_likelihoods(model, requests, LONGEST, budget)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    assert sum(likeliest for _, likeliest in found) > 10


@pytest.mark.parametrize("budget", [64, 500])
def test_flex_attention_gives_the_same_scores(budget: int) -> None:
    model = adapted(llama())
    requests = requests_of(model)
    expected = log_likelihoods(model, requests, LONGEST, budget)
    found = log_likelihoods(model, requests, LONGEST, budget, attention="flex")
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    trial = try_attention(model, requests, LONGEST, budget)
    assert trial.why_not is None
    assert set(trial.seconds) == {"parts", "flex"}


def test_the_adapter_is_in_the_scores() -> None:
    requests = requests_of(llama())
    bare, with_adapter = (log_likelihoods(m, requests, LONGEST, 100) for m in (llama(), adapted(llama())))
    assert max(abs(a - b) for (a, _), (b, _) in zip(bare, with_adapter, strict=True)) > 0.1


def test_what_several_texts_share_is_computed_once() -> None:
    model = llama()
    texts = texts_of(requests := requests_of(model), LONGEST)
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].numel()))
    done: list[int] = []
    log_likelihoods(model, requests, LONGEST, 64, done.append)
    shared = sum(len(sample_of(group, texts)) for group in groups_of(texts))
    assert sum(seen) == shared < 0.6 * sum(len(text.tokens) for text in texts)
    assert max(seen) <= 64
    assert sum(done) == len(texts)
    assert len(done) == len(seen)


def test_logits_are_computed_where_something_is_asked_and_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    requests = [([1, 2, 3, *range(10, 30), q], [answer]) for q in range(40) for answer in range(4)]
    expected = one_by_one(model, requests)
    asked: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: asked.append(len(inputs[0])))
    monkeypatch.setattr(prefix_scoring, "CHUNK", 4 * 100 * 16)
    found = log_likelihoods(model, requests, LONGEST, 5000)
    assert asked == [16, 16, 8]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_of_equally_likely_tokens_the_first_is_the_greedy_one() -> None:
    model = llama()
    model.lm_head.weight[41] = model.lm_head.weight[40]
    contexts = [[i, j] for i in range(100) for j in range(20)]
    likeliest = [context for context in contexts if greedy(model, context, 1) == [40]]
    assert likeliest
    found = log_likelihoods(model, [(c, [token]) for c in likeliest for token in (40, 41)], LONGEST, 500)
    assert [is_greedy for _, is_greedy in found] == [True, False] * len(likeliest)


@pytest.mark.parametrize("peft", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_precision_of_base_and_adapter_is_scored(peft: str, dtype: str) -> None:
    config = trained(
        expand("model=tiny", "dataset=everyday", "method=sft", f"peft={peft}", f"peft.compute_dtype={dtype}")
    )
    base = load_base(config[0].config)
    for model in (base.model, adapted(base.model, init_lora_weights=True)):
        assert why_not_shared(model, LONGEST) is None
        requests = requests_of(model)
        expected = one_by_one(model, requests)
        found = log_likelihoods(model, requests, LONGEST, 200)
        near = {"fp32": {"abs": 1e-4}, "bf16": {"abs": 0.3, "rel": 0.02}}[dtype]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], **near)
        if dtype == "fp32":
            assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


def test_a_model_can_be_trained_on_rows_after_it_has_scored_some() -> None:
    """In one process; what the scoring leaves behind (masks, say) must allow a backward pass."""
    model = llama()
    log_likelihoods(model, [([1, 2, 3, 4], [5, 6, 7]), ([1, 2, 3, 4], [8, 6, 7])], LONGEST, 100)
    model.requires_grad_(True)
    with packed(model):
        response_scores(model, pack([Sample((1, 2, 3), ((4, 5), (4, 8, 6)))])).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_no_requests_have_no_scores() -> None:
    assert log_likelihoods(llama(), [], LONGEST, 100) == []


def test_a_model_that_cannot_be_given_rows_says_why() -> None:
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=8)).requires_grad_(False).eval()
    assert "the last 8 tokens" in str(why_not_shared(mistral, LONGEST))
    assert why_not_shared(mistral, 8) is None
    virtual = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "virtual tokens" in str(why_not_shared(virtual, LONGEST))
