"""Paired comparisons: effects of contrasts with their intervals, by three ways of reckoning the error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_align.reporting.cells import Measure, Results
from peft_align.reporting.contrasts import Contrast, Pairs, Where, own_settings, parts
from peft_align.reporting.resampling import bootstrap_t
from peft_align.reporting.statistics import Effect, Interval, by_seed, holm, paired
from peft_align.reporting.table import Row

TOO_FEW, NO_SPREAD = "not enough runs", "no spread"
LEVEL = 0.05
COLUMNS = [
    *("comparison", "contrast", "part", "benchmark", "judge", "metric", "higher_is_better", "effect", "low", "high"),
    *("interval_over", "df", "p", "p_holm", "cells", "seeds_min", "seeds_max", "runs", "own_settings"),
    *("by_seed_low", "by_seed_high", "bootstrap_low", "bootstrap_high", "result"),
]


@dataclass(frozen=True)
class Compared:
    """One contrast of one measure.

    Attributes:
        part: the values of the contrast's `each`.
        effect: the mean difference, `cells` minus `against`, with Student's t over seeds within cells.
        by_seed: the same from one mean a seed, which needs no independence of the cells.
        bootstrap: the same by bootstrap-t, which needs no normal distribution.
        runs: how many it rests on.
        own_settings: which of its settings each side has a value of its own of.
        p_holm: p, corrected for all comparisons of the file.
    """

    contrast: Contrast
    measure: Measure
    part: Where
    effect: Effect
    by_seed: Interval | None
    bootstrap: tuple[float, float] | None
    runs: int
    own_settings: tuple[str, ...]
    higher_is_better: bool | None
    p_holm: float | None = None

    @property
    def result(self) -> str:
        """What it comes to, in words."""
        if self.effect.p is None:
            return NO_SPREAD if self.effect.basis else TOO_FEW
        if self.p_holm is None or self.p_holm >= LEVEL:
            return "no difference shown"
        return "higher" if (self.effect.value or 0.0) > 0 else "lower"

    def doubts(self) -> list[str]:
        """Which of the two other intervals holds 0 where this one does not."""
        others = {"one mean a seed": self.seed_bounds(), "the bootstrap": self.bootstrap}
        return [name for name, bounds in others.items() if bounds is not None and bounds[0] <= 0 <= bounds[1]]

    def seed_bounds(self) -> tuple[float, float] | None:
        """The interval from one mean a seed."""
        if self.by_seed is None or self.by_seed.half_width is None:
            return None
        return self.by_seed.mean - self.by_seed.half_width, self.by_seed.mean + self.by_seed.half_width


def compare(results: Results, contrast: Contrast, measures: Iterable[Measure] | None = None) -> list[Compared]:
    """One contrast on each of its benchmarks, part by part. A benchmark without values has nothing."""
    if measures is None:
        named = [m for name, metric in contrast.benchmarks for m in results.measures(name, metric)]
        measures = named if contrast.benchmarks else results.main
    found = []
    for measure in measures:
        for part, pairs in parts(results, contrast, measure):
            found.append(_compared(results, contrast, measure, part, pairs))
    return found


def _compared(results: Results, contrast: Contrast, measure: Measure, part: Where, pairs: Pairs) -> Compared:
    differences = {key: {seed: pair.difference for seed, pair in of.items()} for key, of in pairs.items()}
    groups = {key: list(of.values()) for key, of in differences.items()}
    fixed = _fixed(pairs)
    effect = paired(groups, fixed)
    seedwise = by_seed(differences) if effect.basis == "seeds" and not fixed else None
    again = None
    if effect.p is not None and not fixed:
        alone = effect.basis == "cells"
        again = bootstrap_t([[v for of in groups.values() for v in of]] if alone else list(groups.values()))
    runs = {run for of in pairs.values() for pair in of.values() for run in pair.runs}
    own = tuple(own_settings(results, contrast, measure, contrast.where | part))
    return Compared(contrast, measure, part, effect, seedwise, again, len(runs), own, results.better.get(measure))


def _fixed(pairs: Pairs) -> float:
    """The squared error that unaligned bases bring in: each is one model, scored once for all cells set against it.

    How hard the items are is in both scores and in no difference; the luck of the base's own answers is not, and its
    item error is the most that this can be.
    """
    cells: dict[tuple[str, float], int] = {}
    for of in pairs.values():
        for base in {pair.fixed for pair in of.values() if pair.fixed is not None}:
            cells[base] = cells.get(base, 0) + 1
    return math.fsum((n / len(pairs) * error) ** 2 for (_, error), n in cells.items())


def comparisons(results: Results, contrasts: Sequence[Contrast]) -> list[Compared]:
    """Every contrast on its benchmarks, p corrected for all of them."""
    found = [compared for contrast in contrasts for compared in compare(results, contrast)]
    corrected = holm([each.effect.p for each in found])
    return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def part_words(part: Where) -> str:
    """The values of `each`, in words."""
    return " ".join(f"{key}={values[0]}" for key, values in part.items())


def effect_row(compared: Compared) -> Row:
    """The columns that comparisons.csv and claims.csv share."""
    effect, seedwise = compared.effect, compared.seed_bounds() or (None, None)
    again = compared.bootstrap or (None, None)
    row: dict[str, Any] = {"contrast": str(compared.contrast), "part": part_words(compared.part) or None}
    row |= {"benchmark": compared.measure.benchmark, "judge": compared.measure.judge, "metric": compared.measure.metric}
    row |= {"higher_is_better": compared.higher_is_better, "effect": effect.value, "low": effect.low}
    row |= {"high": effect.high, "interval_over": effect.basis or None, "df": effect.df or None, "p": effect.p}
    row |= {"cells": effect.cells, "seeds_min": effect.seeds[0], "seeds_max": effect.seeds[1], "runs": compared.runs}
    row |= {"own_settings": " ".join(compared.own_settings) or None}
    row |= {"by_seed_low": seedwise[0], "by_seed_high": seedwise[1]}
    return row | {"bootstrap_low": again[0], "bootstrap_high": again[1]}


def comparison_rows(found: Sequence[Compared]) -> list[Row]:
    """Rows of comparisons.csv."""
    return [
        {"comparison": each.contrast.name} | effect_row(each) | {"p_holm": each.p_holm, "result": each.result}
        for each in found
    ]
