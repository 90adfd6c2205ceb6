"""What a benchmark gives back: metrics with their uncertainty, and every sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number of the result table.

    Attributes:
        name: e.g. acc.
        value: its mean over the items.
        stderr: standard error over the items; None where it is not defined.
        n: items.
        higher_is_better: None if neither.
        part: the subtask, for a benchmark that has no number of its own.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    part: str = ""


@dataclass
class Scores:
    """The result of one benchmark on one checkpoint."""

    metrics: list[Metric]
    samples: list[dict[str, Any]]
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> files and digest of what was read
    details: dict[str, Any] = field(default_factory=dict)  # versions, subtasks, counts


def mean_metric(name: str, values: Sequence[float], higher_is_better: bool | None) -> Metric:
    """The mean of per-item values with its standard error, s / sqrt(n)."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return Metric(name, mean, spread, n, higher_is_better)
