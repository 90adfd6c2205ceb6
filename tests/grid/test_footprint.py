"""The memory that plan expects training to take, against hand-computed figures, and how it grows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweeping import expand, trained

from peft_align.config.schema import Config
from peft_align.grid.footprint import (
    CARDS,
    CUDA_CONTEXT,
    Choice,
    adapter_bytes,
    choice,
    estimate,
    largest_budget,
    longest_sample,
    tokens_at_once,
    weight_bytes,
)

MISTRAL = ("model=mistral_7b", "method=dpo", "train.micro_batch_tokens=2048")

QLORA = ("peft=qlora", "train.engine=packed")


def config_of(*words: str) -> Config:
    (run,) = trained(expand(*words))
    return run.config


def changed(config: Config, **settings: Any) -> Config:
    """With other values of `train`, `peft` or the model's shape, named group__setting."""
    parts: dict[str, dict[str, Any]] = {"train": {}, "peft": {}, "shape": {}}
    for key, value in settings.items():
        group, _, name = key.partition("__")
        parts[group][name] = value
    model = dataclasses.replace(config.model, shape=dataclasses.replace(config.model.shape, **parts["shape"]))
    return dataclasses.replace(
        config,
        model=model,
        train=dataclasses.replace(config.train, **parts["train"]),
        peft=dataclasses.replace(config.peft, **parts["peft"]),
    )


def total(config: Config, **settings: Any) -> float:
    memory = estimate(changed(config, **settings))
    assert memory is not None
    return memory.total


LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # of Mistral 7B, without the head
REST = 7_241_732_096 - LINEAR  # what its model card's tensors have besides


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["peft=lora"], 2 * 7_241_732_096),
        (["peft=lora", "peft.compute_dtype=fp32"], 4 * 7_241_732_096),
        # a constant a block of 64: one byte, and four for each 256 of them; the values of 4 and 8 bits, for each matrix
        (["peft=qlora"], 2 * REST + LINEAR / 2 + LINEAR / 64 * (1 + 4 / 256) + 32 * 7 * 1088),
        (["peft=qlora", "peft.double_quantization=false"], 2 * REST + LINEAR / 2 + LINEAR / 16 + 32 * 7 * 64),
    ],
)
def test_the_base_takes_what_its_parameters_take_and_nf4_spares_embeddings_and_head(
    words: list[str], size: float
) -> None:
    config = config_of(*MISTRAL, *words)
    assert weight_bytes(config.model.shape, config.peft) == size


@pytest.mark.parametrize(
    ("words", "each"),
    [
        (["train.optimizer=adamw_torch"], 16),
        (["train.optimizer=paged_adamw_32bit"], 16),
        (["train.optimizer=paged_adamw_8bit"], 4 + 4 + 2 * (1 + 4 / 256)),
        (["train.optimizer=adamw_torch", "peft.adapter_dtype=bf16"], 8),
    ],
)
def test_a_trained_parameter_has_a_gradient_and_two_moments(words: list[str], each: float) -> None:
    assert adapter_bytes(config_of("model=tiny", *words)) == each


def test_trl_keeps_a_frozen_copy_of_a_continued_adapter_and_several_processes_keep_buckets() -> None:
    words = ("model=tiny", "method=dpo", "method.init=sft")
    run = next(run for run in trained(expand(*words, "train.engine=trl")))
    assert adapter_bytes(run.config) == 16 + 4
    assert adapter_bytes(run.config, processes=2) == 16 + 4 + 4
    run = next(run for run in trained(expand(*words, "train.engine=packed")))
    assert adapter_bytes(run.config) == 16


def test_qlora_dpo_of_a_7b_model_fits_24_gb_with_recomputation_as_it_is_known_to() -> None:
    config = config_of(*MISTRAL, *QLORA, "train.max_length=1024", "train.gradient_checkpointing=true")
    memory = estimate(config)
    assert memory is not None
    assert 5e9 < memory.total < 12e9
    assert choice(config, 24) == Choice(2048, recomputed=True)


def test_a_card_too_small_for_the_weights_suffices_for_no_budget() -> None:
    config = config_of(*MISTRAL, "peft=lora", "peft.compute_dtype=fp32")
    assert weight_bytes(config.model.shape, config.peft) > 24e9
    assert largest_budget(config, 24) is None
    assert choice(config, 24) is None
    assert choice(config, 80) is not None


def test_what_is_left_open_is_what_the_engine_would_come_to() -> None:
    words = ("model=mistral_7b", "method=dpo", *QLORA, "train.max_length=1024")
    config = config_of(*words)
    assert config.train.micro_batch_tokens is None
    longest, found = longest_sample(config), {card: choice(config, card) for card in CARDS}
    assert found == {
        24: Choice(16384, recomputed=True),
        40: Choice(2048, recomputed=False),
        80: Choice(4096, recomputed=False),
    }
    for card, way in found.items():
        assert way is not None
        memory = estimate(config, budget=way.budget, checkpointing=way.recomputed)
        assert memory is not None
        assert memory.total <= card * 1e9
    kept = estimate(config, budget=longest, checkpointing=False)
    assert kept is not None
    assert kept.total > 24e9
    asked = changed(config, train__gradient_checkpointing=False)
    assert choice(asked, 24) is None


def test_an_unknown_module_makes_it_unknown() -> None:
    assert estimate(config_of("model=tiny", "peft.target_modules=[lm_head]")) is None


def test_a_row_holds_the_largest_sample_at_least_and_the_batch_at_most() -> None:
    words = ("model=tiny", "method=dpo", "train.max_length=100", "train.batch_size=4")
    packed = (*words, "train.engine=packed")
    for budget, tokens in (("null", 200), (1, 200), (300, 300), (10**6, 800)):
        assert tokens_at_once(config_of(*packed, f"train.micro_batch_tokens={budget}")) == tokens
    assert tokens_at_once(config_of(*packed), processes=4) == 200
    assert tokens_at_once(config_of(*words, "train.engine=trl", "train.micro_batch_size=3")) == 2 * 2 * 100


@pytest.mark.parametrize("engine", ["packed", "trl"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("card", CARDS)
def test_the_largest_budget_fits_and_one_more_does_not(engine: str, checkpointing: bool, card: int) -> None:
    config = config_of(*MISTRAL, "peft=qlora", f"train.engine={engine}")
    found = largest_budget(config, card, checkpointing=checkpointing)
    assert found is not None
    fits = estimate(config, budget=found, checkpointing=checkpointing)
    assert fits is not None
    assert fits.total <= card * 1e9
    whole = config.train.batch_size * (longest_sample(config) if engine == "packed" else 1)
    if found < whole:
        more = estimate(config, budget=found * 2 if engine == "trl" else found + 1, checkpointing=checkpointing)
        assert more is not None
        assert more.total > card * 1e9


WAYS = st.fixed_dictionaries(
    {
        "train__engine": st.sampled_from(["packed", "trl"]),
        "train__gradient_checkpointing": st.booleans(),
        "peft__base_precision": st.sampled_from(["nf4", "bf16", "fp32"]),
        "peft__dropout": st.sampled_from([0.0, 0.1]),
        "peft__adapter_dtype": st.sampled_from(["bf16", "fp32"]),
    }
)
GROWING = {
    "train__micro_batch_tokens": (1, 20_000),
    "train__micro_batch_size": (1, 16),
    "train__max_length": (8, 8192),
    "peft__r": (1, 256),
    "shape__layers": (1, 100),
    "shape__ffn": (64, 50_000),
    "shape__vocabulary": (100, 200_000),
}


@given(ways=WAYS, key=st.sampled_from(sorted(GROWING)), method=st.sampled_from(["sft", "dpo"]), data=st.data())
def test_more_of_anything_never_takes_less(ways: dict[str, Any], key: str, method: str, data: st.DataObject) -> None:
    config = config_of("model=mistral_7b", f"method={method}")
    low, high = sorted(data.draw(st.tuples(*[st.integers(*GROWING[key])] * 2)))
    assert total(config, **ways, **{key: low}) <= total(config, **ways, **{key: high})


@given(ways=WAYS)
def test_recomputation_never_takes_more_and_something_is_always_allowed_for(ways: dict[str, Any]) -> None:
    config = changed(config_of("model=mistral_7b", "method=dpo"), **ways)
    kept, again = (estimate(config, checkpointing=way) for way in (False, True))
    assert kept is not None
    assert again is not None
    assert again.total < kept.total
    assert min(kept.allowance, again.allowance) > CUDA_CONTEXT


def test_each_run_of_a_pack_has_an_adapter_and_an_optimizer_of_its_own() -> None:
    config = config_of(*MISTRAL, *QLORA)
    alone, packed = (estimate(changed(config, train__pack_runs=count)) for count in (1, 8))
    assert alone is not None
    assert packed is not None
    assert packed.adapter == 8 * alone.adapter
    assert packed.activations == alone.activations, "the rows of all hold as many tokens"
    stock = changed(config, train__engine="trl", train__pack_runs=8)
    assert total(stock) == total(stock, train__pack_runs=1), "engine trl packs nothing"


def test_a_batch_that_is_one_sample_is_not_recomputed_where_it_fits_whole() -> None:
    config = config_of(
        "model=mistral_7b", "method=sft", "peft=lora", "train.batch_size=1", "train.max_length=600",
        "train.engine=packed",
    )  # fmt: skip
    assert longest_sample(config) == 600
    found = choice(config, 80)
    assert found is not None
    assert not found.recomputed
