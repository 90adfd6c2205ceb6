"""One piece of work goes at a time, from where it handed over, among random numbers of its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from peft_align.training.randomness import Randomness
from peft_align.training.turns import Turn


def test_work_goes_on_with_what_it_is_told_and_never_at_once() -> None:
    seen: list[str] = []

    def work(name: str, turn: Turn) -> str:
        for at in range(2):
            seen.append(f"{name}{at}")
            seen.append(turn.hand_over(at))
        return name

    turns: list[Turn] = []
    turns += [Turn(lambda: work("a", turns[0])), Turn(lambda: work("b", turns[1]))]
    for told in ("", "x", "y"):
        for turn in turns:
            turn.go_on(told)
    assert seen == ["a0", "b0", "x", "a1", "x", "b1", "y", "y"]
    assert [(turn.over, turn.result, turn.error) for turn in turns] == [(True, "a", None), (True, "b", None)]


def test_an_error_is_kept_and_one_that_is_told_is_raised_where_it_waits() -> None:
    turn = Turn(lambda: turn.hand_over(None))
    turn.go_on()
    assert turn.waits
    turn.go_on(KeyError("told"))
    assert turn.over
    assert not turn.waits
    with pytest.raises(KeyError, match="told"):
        raise turn.error or AssertionError


def test_random_numbers_go_on_whatever_others_draw() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    mine = Randomness()
    expected = [draw(), draw()]
    found = []
    for _ in range(2):
        with mine.at_work():
            found.append(draw())
        draw()
    assert found == expected


def test_a_layer_that_is_computed_again_draws_the_same_again() -> None:
    mine, drawn = Randomness(), []
    outside = torch.get_rng_state()
    for layer in ("first", "second", "first"):
        with mine.drawing(layer):
            drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[2] != drawn[1]
    assert torch.equal(torch.get_rng_state(), outside)
