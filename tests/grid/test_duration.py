"""The time that plan expects training to take, against hand-counted operations."""

from __future__ import annotations

import pytest
from sweeping import expand, trained

from peft_align.config.schema import Config
from peft_align.grid.duration import ATTENTION_BACKWARD, CARDS, training_flops, training_seconds

WORDS = ("model=mistral_7b", "train.engine=packed", "train.max_steps=10", "train.batch_size=4")
FROZEN = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
HEAD = 2 * 32_000 * 4096


def config_of(*words: str) -> Config:
    (run,) = trained(expand(*WORDS, *words))
    return run.config


def attention(length: float) -> float:
    """A token sees half of its text on average: a product with each key and one with each value."""
    return 32 * 2 * 2 * 4096 * length / 2


def test_frozen_weights_take_four_operations_a_token_and_trained_ones_six() -> None:
    flops = training_flops(config_of("method=sft", "peft=lora"), 200)
    each = 4 * FROZEN + 6 * 27_262_976 + (1 + ATTENTION_BACKWARD) * attention(200) + 2 * HEAD
    assert flops == pytest.approx(each * 200 * 4 * 10, rel=1e-12)


def test_the_reference_is_one_forward_pass_more_and_so_is_recomputation() -> None:
    config = config_of("method=dpo", "peft=lora")
    trained_ones = 41_943_040
    sample = 4 * FROZEN + 6 * trained_ones + (1 + ATTENTION_BACKWARD) * attention(100) + 2 * HEAD
    reference = 2 * FROZEN + attention(100) + HEAD
    assert training_flops(config, 200) == pytest.approx((sample + reference) * 200 * 4 * 10, rel=1e-12)
    more = training_flops(config, 200, recomputed=True) - training_flops(config, 200)
    assert more == pytest.approx((2 * FROZEN + 2 * trained_ones + attention(100)) * 200 * 4 * 10, rel=1e-9)


def test_unknown_lengths_are_taken_as_the_longest() -> None:
    config, card = config_of("method=dpo", "train.max_length=256"), CARDS[0]
    assert training_seconds(config, card) == training_seconds(config, card, 512.0)


def test_a_faster_card_more_processes_and_a_plain_base_take_less_time() -> None:
    lora, qlora = config_of("method=sft", "peft=lora"), config_of("method=sft", "peft=qlora")
    by_rate = sorted(CARDS, key=lambda card: card.bf16)
    seconds = [training_seconds(lora, card) for card in by_rate]
    assert seconds == sorted(seconds, reverse=True)
    assert training_seconds(lora, CARDS[0], processes=4) == training_seconds(lora, CARDS[0]) / 4
    assert training_seconds(qlora, CARDS[0]) > training_seconds(lora, CARDS[0])
