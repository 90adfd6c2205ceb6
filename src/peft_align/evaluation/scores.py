"""What a benchmark gives back: metrics with their uncertainty, and every sample."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number of the result table.

    Attributes:
        name: e.g. acc.
        value: its mean over the items.
        stderr: standard error over the items, or over their clusters; None where it is not defined.
        n: items.
        higher_is_better: None if neither.
        part: the subtask, for a benchmark that has no number of its own.
        bound: of a rate whose items all agree, so that its standard error of 0 says nothing: how far from there the
            true rate can be, as a one-sided 95% bound.
    """

    name: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    part: str = ""
    bound: float | None = None


@dataclass
class Scores:
    """The result of one benchmark on one checkpoint, or of one judge on its texts."""

    metrics: list[Metric]
    samples: list[dict[str, Any]]
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> files and digest of what was read
    details: dict[str, Any] = field(default_factory=dict)  # versions, subtasks, counts
    files: dict[str, str] = field(default_factory=dict)  # further products: name -> text


def mean_metric(
    name: str,
    values: Sequence[float],
    higher_is_better: bool | None,
    *,
    clusters: Sequence[Hashable] | None = None,
    scale: float = 1.0,
) -> Metric:
    """The mean of per-item values with its standard error, s / sqrt(n).

    Args:
        name: of the metric.
        values: one an item, not empty.
        higher_is_better: None if neither.
        clusters: what each item belongs to, where items of one are alike: answers to one prompt, say.
        scale: the value and its error are multiplied by it: 100 for percent.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if clusters is not None:
        spread = clustered_error(values, clusters)
    else:
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return Metric(name, scale * mean, None if spread is None else scale * spread, n, higher_is_better)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The standard error of the mean of items that come in clusters; None for a single cluster.

    The square root of the sum over clusters of (the sum of their deviations)², times g / (g - 1) for g clusters,
    divided by n (Miller 2024, arXiv 2411.00640, section 2.2). With one item a cluster it is s / sqrt(n).
    """
    n = len(values)
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for v, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + v - mean
    g = len(sums)
    return math.sqrt(math.fsum(s * s for s in sums.values()) * g / (g - 1)) / n if g > 1 else None


def rate_metric(
    name: str,
    events: Sequence[bool],
    higher_is_better: bool | None,
    *,
    clusters: Sequence[Hashable] | None = None,
    scale: float = 1.0,
) -> Metric:
    """The share of items for which something holds; with its bound where it holds for none, or for all of them."""
    metric = mean_metric(name, [float(event) for event in events], higher_is_better, clusters=clusters, scale=scale)
    if any(events) and not all(events):
        return metric
    independent = len(set(clusters)) if clusters is not None else len(events)
    far = zero_event_bound(independent)
    bound = scale * (1 - far if all(events) else far)
    return Metric(metric.name, metric.value, metric.stderr, metric.n, higher_is_better, bound=bound)


def zero_event_bound(n: int, confidence: float = 0.95) -> float:
    """The largest rate at which no event in n items still has a probability of 1 - confidence: 1 - 0.05^(1/n).

    Clopper and Pearson's one-sided bound (1934); about 3 / n (the rule of three).
    """
    return float(1 - (1 - confidence) ** (1 / n))
