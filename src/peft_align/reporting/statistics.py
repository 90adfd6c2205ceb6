"""Intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95% interval; None with fewer than two seeds."""

    mean: float
    half_width: float | None
    seeds: int


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with Student's t interval, t(n-1) × s / sqrt(n) (Student 1908). `values` must not be empty."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    from scipy.special import stdtrit  # much quicker to import than scipy.stats

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, float(stdtrit(n - 1, 0.5 + confidence / 2)) * spread / math.sqrt(n), n)
