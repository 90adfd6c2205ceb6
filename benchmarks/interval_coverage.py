"""How often the report's 95% intervals hold the truth, where it is known; and how often those hold it that it does
not use.

    python benchmarks/interval_coverage.py

Scores are drawn with known means, spreads and effects, and the report's own functions are asked for their interval. The
table goes into docs/results.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from side_by_side import ROOT, put

from peft_align.reporting.resampling import bootstrap_t
from peft_align.reporting.statistics import by_seed, paired, score, t_interval

Rng = np.random.Generator
Floats = NDArray[np.float64]
Held = Callable[[Rng], bool]  # draws one study and says whether the interval holds the truth
EFFECT = 0.3  # of every comparison, in units of the seeds' spread
ITEMS = 400


@dataclass(frozen=True)
class Case:
    """One row of the table; `offered`: for such a case, so that it must hold the truth in 95% of them."""

    name: str
    drawn: str
    held: Held
    offered: bool = True


def inside(truth: float, low: float | None, high: float | None) -> bool:
    """Whether there is an interval, and it holds the truth."""
    return low is not None and high is not None and low <= truth <= high


def seeds(n: int) -> Held:
    """Student's t over the seeds of a cell."""

    def held(rng: Rng) -> bool:
        found = t_interval(rng.normal(0.5, 0.1, n).tolist())
        return abs(found.mean - 0.5) <= (found.half_width or 0.0)

    return held


def answers(rng: Rng, n: int, own: float) -> Floats:
    """Whether each of n seeds answers each item.

    An item is answered if it is easier than a seed is able; how able a seed is, differs from seed to seed, and so does,
    for each item anew, its luck: `own` is the share of luck in what decides an answer besides the item.
    """
    hard, able = rng.normal(0, 1, ITEMS), rng.normal(0.3, 0.1, n)
    luck = rng.normal(0, 1, (n, ITEMS))
    decided = able[:, None] - math.sqrt(1 - own) * hard[None] + math.sqrt(own) * luck
    return np.asarray(decided > 0, dtype=float)


def normal_below(x: float) -> float:
    """The distribution function of the normal distribution."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


TRUTH = normal_below(0.3 / math.sqrt(1 + 0.1**2))  # the mean over all seeds and all items of `answers`


def one_seed(of_training: bool) -> Held:
    """The item standard error of a single seed, for the same model on other items, or for training again too."""

    def held(rng: Rng) -> bool:
        able = rng.normal(0.3, 0.1)
        drawn = np.asarray(able - rng.normal(0, 1, ITEMS) > 0, dtype=float)
        found = score([float(drawn.mean())], [float(drawn.std(ddof=1)) / math.sqrt(ITEMS)])
        return inside(TRUTH if of_training else normal_below(able), found.low, found.high)

    return held


def seeds_and_items(own: float, which: str) -> Held:
    """Five seeds on the same items, for new seeds and new items: the wide interval, the seeds alone, or all answers."""

    def held(rng: Rng) -> bool:
        drawn = answers(rng, 5, own)
        if which == "pooled":
            half = 1.96 * drawn.std() / math.sqrt(drawn.size)
            return bool(abs(drawn.mean() - TRUTH) <= half)
        errors = (drawn.std(axis=1, ddof=1) / math.sqrt(ITEMS)).tolist()
        found = score(drawn.mean(axis=1).tolist(), errors)
        wide = (found.wide_low, found.wide_high) if which == "wide" else (found.low, found.high)
        return inside(TRUTH, *wide)

    return held


def differences(rng: Rng, counts: Sequence[int], common: float = 0.0) -> dict[int, dict[int, float]]:
    """Of each cell, by seed: effects about EFFECT that differ from cell to cell, as do their spreads; `common`: the
    spread of what a seed does to all cells alike."""
    offsets = 0.5 * (np.arange(len(counts)) - (len(counts) - 1) / 2)
    spreads = np.geomspace(0.5, 2, len(counts)) if len(counts) > 1 else np.ones(1)
    moved = rng.normal(0, common, max(counts)) if common else np.zeros(max(counts))
    return {
        i: {seed: float(EFFECT + offsets[i] + moved[seed] + rng.normal(0, spreads[i])) for seed in range(n)}
        for i, n in enumerate(counts)
    }


def over_cells(counts: Sequence[int], common: float = 0.0) -> Held:
    """Paired differences: the mean over cells."""

    def held(rng: Rng) -> bool:
        drawn = differences(rng, counts, common)
        found = paired({cell: list(values.values()) for cell, values in drawn.items()})
        return inside(EFFECT, found.low, found.high)

    return held


def over_cells_alone(cells: int) -> Held:
    """One value a cell: Student's t over the cells."""

    def held(rng: Rng) -> bool:
        found = paired({i: [value] for i, value in enumerate(rng.normal(EFFECT, 1, cells).tolist())})
        return inside(EFFECT, found.low, found.high)

    return held


def one_mean_a_seed(counts: Sequence[int], common: float) -> Held:
    """Paired differences: the mean over cells of each seed, then Student's t over seeds."""

    def held(rng: Rng) -> bool:
        found = by_seed(differences(rng, counts, common))
        return found is not None and abs(found.mean - EFFECT) <= (found.half_width or 0.0)

    return held


def drawn_again(counts: Sequence[int]) -> Held:
    """The bootstrap-t interval of the same."""

    def held(rng: Rng) -> bool:
        drawn = differences(rng, counts)
        found = bootstrap_t([list(v.values()) for v in drawn.values()], seed=int(rng.integers(1 << 31)))
        return found is not None and inside(EFFECT, *found)

    return held


def skewed(cells: int, again: bool) -> Held:
    """Cells without a second seed, whose differences are skewed: Student's t over the cells, or bootstrap-t."""

    def held(rng: Rng) -> bool:
        drawn = rng.exponential(1.0, cells).tolist()
        if again:
            found = bootstrap_t([drawn], seed=int(rng.integers(1 << 31)))
            return found is not None and inside(1.0, *found)
        effect = paired({i: [value] for i, value in enumerate(drawn)})
        return inside(1.0, effect.low, effect.high)

    return held


def percentile(n: int, draws: int = 1000) -> Held:
    """The percentile bootstrap over the seeds of a cell."""

    def held(rng: Rng) -> bool:
        values = rng.normal(0.5, 0.1, n)
        low, high = np.quantile(values[rng.integers(0, n, (draws, n))].mean(axis=1), [0.025, 0.975])
        return inside(0.5, float(low), float(high))

    return held


SAME = "5 seeds on the same 400 items"
CASES = (
    Case("t over seeds", "one cell, 3 seeds", seeds(3)),
    Case("t over seeds", "one cell, 5 seeds", seeds(5)),
    Case("item error of one seed", "the same model on 400 other items", one_seed(False)),
    Case("seeds and other items, at most", f"{SAME}, answered alike", seeds_and_items(0.1, "wide")),
    Case("paired t", "one cell, 3 seeds", over_cells([3])),
    Case("paired t", "one cell, 5 seeds", over_cells([5])),
    Case("paired t over cells", "8 cells of unequal spread, 5 seeds", over_cells([5] * 8)),
    Case("paired t over cells", "8 cells of unequal spread, 3 seeds", over_cells([3] * 8)),
    Case("paired t over cells", "2 cells of unequal spread, 3 seeds", over_cells([3] * 2)),
    Case("paired t over cells", "8 cells, a third of the runs missing", over_cells([5, 3, 2, 1, 4, 5, 3, 4])),
    Case("paired t over cells", "16 cells without a second seed", over_cells_alone(16)),
    Case("one mean a seed, t", "8 cells, 5 seeds that move all cells alike", one_mean_a_seed([5] * 8, 1.0)),
    Case("bootstrap-t over cells", "8 cells of unequal spread, 5 seeds", drawn_again([5] * 8)),
    Case("bootstrap-t over cells", "16 cells without a second seed, skewed", skewed(16, True)),
    Case("percentile bootstrap", "one cell, 5 seeds", percentile(5), False),
    Case("all answers as independent", f"{SAME}, answered alike", seeds_and_items(0.1, "pooled"), False),
    Case("t over seeds, for other items", f"{SAME}, answered alike", seeds_and_items(0.1, "seeds"), False),
    Case("seeds and other items, at most", f"{SAME}, answered by luck", seeds_and_items(0.9, "wide"), False),
    Case("item error of one seed", "for training again too", one_seed(True), False),
    Case("paired t over cells", "16 cells without a second seed, skewed", skewed(16, False), False),
    Case("paired t over cells", "8 cells, 5 seeds that move all cells alike", over_cells([5] * 8, 1.0), False),
)


def coverage(case: Case, simulations: int) -> float:
    """The share of the simulations in which the interval holds the truth."""
    rng = np.random.default_rng(0)
    return sum(case.held(rng) for _ in range(simulations)) / simulations


def main() -> int:
    """Simulate, print, write down."""
    parser = argparse.ArgumentParser(description="Coverage of 95% intervals in simulations.")
    parser.add_argument("--simulations", type=int, default=1000)
    given = parser.parse_args()
    found = [coverage(case, given.simulations) for case in CASES]
    rows = [["interval", "drawn", "holds the truth", "offered for it"], ["---"] * 4]
    for case, share in zip(CASES, found, strict=True):
        rows.append([case.name, case.drawn, f"{100 * share:.1f}%", "yes" if case.offered else "no"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    command = f"python benchmarks/interval_coverage.py --simulations {given.simulations}"
    put(ROOT / "docs" / "results.md", "interval_coverage", f"{table}\n\n`{command}`")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
