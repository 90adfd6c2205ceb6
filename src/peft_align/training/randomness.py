"""Random states: put back after a look, and one for each run of several in a process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class TorchState:
    """Where torch's random numbers stand: on the CPU, and on every GPU."""

    cpu: torch.Tensor
    gpus: list[torch.Tensor]

    @classmethod
    def now(cls) -> TorchState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)


@contextmanager
def same_randomness() -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been drawn."""
    state = TorchState.now()
    try:
        yield
    finally:
        state.restore()


@dataclass
class Randomness:
    """The random numbers of one run: whatever others draw in between, they go on where they were.

    Attributes:
        torch: where torch's stand.
        others: where Python's and numpy's do.
        drawn: layer -> where the dropout was drawn from that it had for the row at hand.
    """

    torch: TorchState = field(default_factory=TorchState.now)
    others: tuple[Any, Any] = field(default_factory=lambda: (random.getstate(), np.random.get_state()))
    drawn: dict[str, TorchState] = field(default_factory=dict)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While it lasts, everything is drawn from here; what it leaves behind is nobody's."""
        self.torch.restore()
        random.setstate(self.others[0])
        np.random.set_state(self.others[1])
        try:
            yield
        finally:
            self.torch = TorchState.now()
            self.others = random.getstate(), np.random.get_state()

    @contextmanager
    def drawing(self, layer: str) -> Iterator[None]:
        """While it lasts, torch draws from here: a layer's dropout, the same again if backward computes it anew."""
        outside, again = TorchState.now(), layer in self.drawn
        self.drawn.setdefault(layer, self.torch).restore()
        try:
            yield
        finally:
            if not again:
                self.torch = TorchState.now()
            outside.restore()
