"""Intervals and tests on the few numbers that a study has: seeds within a cell, cells within a comparison.

A score has two sources of noise. Training again with another seed gives another model; asking other items gives
another score of the same model. A cell's seeds are scored on the same items, so that their spread s holds the first,
and what of the second differs from seed to seed, but not what all seeds share: how hard these items are. So s /
sqrt(seeds) is the error on these items, and items times seeds are never taken for independent draws. See
docs/results.md for the sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
LEAST_DF = 2  # over all cells; with one, 95% of Student's distribution reaches to 12.7 standard errors


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95% interval; None with fewer than two seeds."""

    mean: float
    half_width: float | None
    seeds: int


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean with Student's t interval, t(n-1) × s / sqrt(n) (Student 1908). `values` must not be empty."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, t_quantile(n - 1, confidence) * math.sqrt(variance(values) / n), n)


def variance(values: Sequence[float]) -> float:
    """The unbiased variance of two or more values."""
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def t_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided interval reaches to either side. `df` need not be whole."""
    from scipy.special import stdtrit  # much quicker to import than scipy.stats

    return float(stdtrit(df, 0.5 + confidence / 2))


def t_above(df: float, t: float) -> float:
    """The probability that Student's t is above a value."""
    from scipy.special import stdtr

    return float(stdtr(df, -t))


@dataclass(frozen=True)
class Score:
    """The mean of a cell and what is known of its error.

    Attributes:
        low, high: the 95% interval; None where nothing is known of the error.
        basis: what the interval is over: `seeds`; `items`, where there is one seed, so that nothing is known of
            training again; or empty.
        items: the standard error over the items, the root mean square over seeds; None if no seed has one.
        wide_low, wide_high: the interval for other items too, at most; None without both sources.
    """

    mean: float
    low: float | None
    high: float | None
    basis: str
    seeds: int
    items: float | None
    wide_low: float | None = None
    wide_high: float | None = None


def score(values: Sequence[float], errors: Sequence[float | None]) -> Score:
    """The mean over seeds with its interval.

    With items that all seeds share, the variance of the mean for new seeds and new items is s²/S plus the variance of
    how hard the items are over their number. A seed's squared item error is that, and its own answers' noise besides,
    which s² holds already: so s²/S + the mean of the squared item errors is at least the whole variance, and at most
    a seed's own noise too much. The degrees of freedom are those of s²/S alone by Satterthwaite's rule, for there are
    many items.

    Args:
        values: one a seed, not empty.
        errors: the standard error of each over its items.
    """
    n, known = len(values), [e for e in errors if e is not None and math.isfinite(e)]
    items = math.sqrt(math.fsum(e * e for e in known) / len(known)) if known else None
    mean = math.fsum(values) / n
    if n < 2:
        if items is None:
            return Score(mean, None, None, "", n, None)
        half = normal_quantile() * items
        return Score(mean, mean - half, mean + half, "items", n, items)
    of_seeds = variance(values) / n
    half = t_quantile(n - 1) * math.sqrt(of_seeds)
    if items is None:
        return Score(mean, mean - half, mean + half, "seeds", n, None)
    whole = of_seeds + items * items
    df = (n - 1) * (whole / of_seeds) ** 2 if of_seeds > 0 else math.inf
    wide = (t_quantile(df) if math.isfinite(df) else normal_quantile()) * math.sqrt(whole)
    return Score(mean, mean - half, mean + half, "seeds", n, items, mean - wide, mean + wide)


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided interval of the normal distribution reaches to either side."""
    from scipy.special import ndtri

    return float(ndtri(0.5 + confidence / 2))


@dataclass(frozen=True)
class Effect:
    """A mean difference over cells.

    Attributes:
        low, high: its 95% interval; None where there are not enough runs, or the differences have no spread.
        df, error: degrees of freedom and standard error; 0 and None likewise.
        p: two-sided, of no difference.
        basis: what the interval is over: `seeds` within the cells; `cells`, where no cell has a second seed; or empty.
        cells: how many.
        seeds: the fewest and the most of a cell.
    """

    value: float | None
    low: float | None
    high: float | None
    df: float
    error: float | None
    p: float | None
    basis: str
    cells: int
    seeds: tuple[int, int]

    def p_above(self, bound: float) -> float | None:
        """One-sided: how probable so high an effect is if the true one is `bound`."""
        if self.value is None or self.error is None:
            return None
        return t_above(self.df, (self.value - bound) / self.error)


def paired(differences: Mapping[Any, Sequence[float]], fixed: float = 0.0) -> Effect:
    """The mean over cells of their mean differences over seeds.

    The cells are those that were asked for, not a sample of others: their differences need not be equal, and the
    spread between them is no error. The variance is the sum over cells of s²/seeds, over the number of cells squared,
    each cell's s its own, its degrees of freedom by Welch and Satterthwaite (1946). A cell with a single seed is
    given the mean variance of the others. Where no cell has a second seed, all that is left is Student's t over the
    cells: what it says holds for cells like these.

    Args:
        differences: of each cell, one value a seed that both sides have.
        fixed: squared standard error of the effect that the spread over seeds does not show.
    """
    groups = [list(values) for values in differences.values() if len(values)]
    if not groups:
        return Effect(None, None, None, 0, None, None, "", 0, (0, 0))
    means = [math.fsum(values) / len(values) for values in groups]
    n, seeds = len(groups), (min(map(len, groups)), max(map(len, groups)))
    mean = math.fsum(means) / n
    independent = [means] if seeds[1] < 2 else groups
    enough = sum(len(values) - 1 for values in independent) >= LEAST_DF
    basis = ("cells" if seeds[1] < 2 else "seeds") if enough else ""
    squared, df = mean_error(independent) if enough else (0.0, 0.0)
    if squared <= 0:
        return Effect(mean, None, None, 0, None, None, basis, n, seeds)
    df *= ((squared + fixed) / squared) ** 2  # what is known besides has no degrees of freedom to lose
    error = math.sqrt(squared + fixed)
    half, p = t_quantile(df) * error, 2 * t_above(df, abs(mean) / error)
    return Effect(mean, mean - half, mean + half, df, error, p, basis, n, seeds)


def mean_error(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the mean of the groups' means: its squared standard error, and by Satterthwaite's rule its degrees of freedom.

    Zeros where there is no spread.
    """
    several = [values for values in groups if len(values) > 1]
    lone = len(groups) - len(several)
    terms = [(variance(values) * (1 / len(values) + lone / len(several)), len(values) - 1) for values in several]
    total = math.fsum(term for term, _ in terms)
    if total <= 0:
        return 0.0, 0.0
    return total / len(groups) ** 2, total**2 / math.fsum(term**2 / df for term, df in terms)


def by_seed(differences: Mapping[Any, Mapping[Any, float]]) -> Interval | None:
    """The same mean difference with one value a seed, the mean over the cells: holds if a seed moves all cells alike.

    Args:
        differences: of each cell, by seed; seeds that not every cell has are left out.

    Returns:
        None where fewer than three seeds are left.
    """
    shared = set.intersection(*(set(values) for values in differences.values())) if differences else set()
    if len(shared) <= LEAST_DF or not differences:
        return None
    means = [math.fsum(values[seed] for values in differences.values()) / len(differences) for seed in shared]
    return t_interval(sorted(means))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Each p value corrected for the number of those that there are, by Holm's step-down rule (1979)."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        found[i] = highest
    return found
