"""Flex attention sees in a row what its parts see: results, gradients, blocks; what speaks against it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_align.models import flex_attention as flex
from peft_align.models.flex_attention import NAME, WAYS, Trial, block_mask, flex_row_attention, of_all, try_both
from peft_align.models.packed_attention import Unsupported, packed, packed_attention, parts
from peft_align.models.packed_scoring import response_scores
from peft_align.models.packing import Sample, Segment, pack

CPU = torch.device("cpu")
LENGTHS = st.integers(1, 150)
SHAPES = st.lists(st.tuples(st.integers(0, 150), st.lists(LENGTHS, min_size=1, max_size=3)), min_size=1, max_size=4)


def segments_of(shapes: list[tuple[int, list[int]]]) -> tuple[Segment, ...]:
    found, start = [], 0
    for prompt, responses in shapes:
        found.append(Segment(start, prompt, tuple(responses)))
        start += prompt + sum(responses)
    return tuple(found)


def seen_of(segments: tuple[Segment, ...]) -> torch.Tensor:
    """(T, T): what each token of a row sees, said plainly."""
    length = parts(segments)[-1].own[1]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for segment in segments:
        prompt = range(segment.start, segment.start + segment.prompt)
        for token in prompt:
            seen[token, segment.start : token + 1] = True
        first = prompt.stop
        for words in segment.responses:
            for token in range(first, first + words):
                seen[token, prompt.start : prompt.stop] = True
                seen[token, first : token + 1] = True
            first += words
    return seen


@settings(deadline=None, max_examples=25)
@given(SHAPES)
def test_a_token_sees_its_prompt_and_what_comes_before_it_in_its_response(shapes: list[tuple[int, list[int]]]) -> None:
    segments = segments_of(shapes)
    mask, seen = block_mask(segments, CPU), seen_of(segments)
    length = len(seen)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, length, length, CPU)[0, 0], seen)
    blocks = create_block_mask(mask.mask_mod, 1, 1, length, length, CPU).to_dense().bool()
    listed = mask.to_dense().bool()
    assert not (blocks & ~listed).any(), "a block that holds something seen is not looked at"
    if all(segment.prompt for segment in segments):
        assert torch.equal(listed, blocks), "blocks are looked at that hold nothing"


@settings(deadline=None, max_examples=15)
@given(SHAPES, st.sampled_from([(4, 4), (4, 2), (9, 3)]), st.sampled_from([16, 20]), st.integers(0, 99))
def test_results_and_gradients_are_those_of_parts(
    shapes: list[tuple[int, list[int]]], heads: tuple[int, int], size: int, seed: int
) -> None:
    segments = segments_of(shapes)
    length = parts(segments)[-1].own[1]
    words = torch.Generator().manual_seed(seed)
    given = [torch.randn(1, n, length, size, generator=words).requires_grad_(True) for n in (heads[0], *heads[1:] * 2)]
    weights = torch.randn(1, length, heads[0], size, generator=words)
    found = []
    for attend in (packed_attention, flex_row_attention):
        out, _ = attend(torch.nn.Identity(), *given, None, scaling=0.3, segments=segments)
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), given)))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * (1 + one.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_gives_the_same_scores_and_gradients_either_way(checkpointing: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).to(dtype).train()
    model.lm_head.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    words = torch.Generator().manual_seed(1)
    texts = [tuple(torch.randint(0, 100, (n,), generator=words).tolist()) for n in (70, 40, 90, 20, 30)]
    row = pack([Sample(texts[0], (texts[1], texts[2])), Sample(texts[3], (texts[4],))])
    found = []
    for name in WAYS.values():
        with packed(model, name):
            scores = response_scores(model, row)
            scores.sum().backward()
        found.append([scores.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    near = 1e-5 if dtype == torch.float32 else 0.05
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= near * one.abs().max()


def test_one_compilation_serves_rows_of_all_lengths() -> None:
    """As for a GPU, but for the kernels: without Triton the graph is what can be looked at."""
    graphs: list[Any] = []

    def kept(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=kept)
    words = torch.Generator().manual_seed(0)
    for i, length in enumerate((300, 500, 128, 256, 1000, 77, 640, 1300, 901, 2000)):
        segments = segments_of([(20 + i, [30, 40])] * i + [(10, [length])])
        whole = parts(segments)[-1].own[1]
        query, key, value = (torch.randn(1, n, whole, 16, generator=words) for n in (4, 2, 2))
        with torch.no_grad():
            found = compiled(query, key, value, block_mask=block_mask(segments, CPU), scale=0.3, enable_gqa=True)
            expected, _ = packed_attention(torch.nn.Identity(), query, key, value, None, 0.3, segments)
        assert (found.transpose(1, 2) - expected).abs().max() < 1e-5
    assert len(graphs) <= 2, "one, and one where the length is a multiple of a block's"


def test_a_process_may_have_models_of_more_shapes_than_torch_compiles_for_by_default() -> None:
    torch._dynamo.reset()
    flex._compiled()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend="eager")
    mask = block_mask((Segment(0, 20, (20, 20)),), CPU)
    for size in range(16, 36, 2):
        query, key, value = (torch.zeros(1, n, 60, size) for n in (4, 2, 2))
        with torch.no_grad():
            assert compiled(query, key, value, block_mask=mask, enable_gqa=True).shape == query.shape


def test_a_way_of_attending_that_rows_do_not_know_is_refused() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    gemma = Gemma2ForCausalLM(Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=16))
    gemma.lm_head.requires_grad_(False)
    with packed(gemma, NAME), pytest.raises(Unsupported, match="softcap"):
        response_scores(gemma, pack([Sample((1, 2), ((3, 4),))]))


def test_flex_attention_that_fails_or_differs_is_not_taken_and_the_reason_is_told() -> None:
    def fails(way: str) -> torch.Tensor:
        if way == "flex":
            raise RuntimeError("no valid triton configs\nand more")
        return torch.ones(2)

    trial = try_both(fails, 1e-4, timed=True)
    assert (trial.chosen, trial.seconds) == ("parts", {})
    assert str(trial) == "warning: flex attention is not used: it failed: no valid triton configs"
    differs = try_both(lambda way: torch.tensor([1.0, 100.0 + (way == "flex")]), 1e-4, timed=True)
    assert differs.chosen == "parts"
    assert "0.01 of themselves away" in str(differs)
    not_a_number = try_both(lambda way: torch.tensor([float("nan") if way == "flex" else 1.0]), 1e-4, timed=True)
    assert not_a_number.chosen == "parts"


def test_the_faster_way_is_taken_where_it_is_timed() -> None:
    assert Trial({"parts": 2.0, "flex": 1.0}).chosen == "flex"
    assert Trial({"parts": 1.0, "flex": 2.0}).chosen == "parts"
    assert try_both(lambda way: torch.ones(1), 1e-4, timed=False) == Trial()
    assert Trial().chosen == "flex"
    assert set(try_both(lambda way: torch.ones(1), 1e-4, timed=True).seconds) == set(WAYS)


def test_processes_agree_by_the_slowest_of_them_and_by_any_reason() -> None:
    slow, fast = Trial({"parts": 2.0, "flex": 3.0}), Trial({"parts": 2.0, "flex": 1.0})
    assert of_all([fast, slow]) == Trial({"parts": 2.0, "flex": 3.0})
    assert of_all([fast, Trial(why_not="it failed")]) == Trial(why_not="it failed")
