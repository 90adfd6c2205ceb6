"""Which samples a run sees, in which order: decided here, the same for every engine and micro-batch size."""

from __future__ import annotations

import numpy as np


def sample_order(available: int, wanted: int, seed: int) -> list[int]:
    """Indices of the samples of a run: whole permutations of what is available, one after the other, cut at `wanted`.

    The first n indices do not depend on `wanted`, so a longer run begins as a shorter one does.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    order: list[int] = []
    while len(order) < wanted:
        order += generator.permutation(available).tolist()
    return order[:wanted]
