"""Which axis moves a score how much: shares of the variance by analysis of variance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OTHER, SEEDS = "further interactions", "seeds"


@dataclass(frozen=True)
class Share:
    """One term of an analysis of variance.

    Attributes:
        term: the axis, `a × b` for what two axes do together, or one of the two above.
        df: degrees of freedom.
        squares: sum of squares.
        share: of the whole sum of squares about the mean. Where the cells have unequally many values, the shares of
            terms that overlap do not add up to 1.
        f, p: the F test against the seeds' mean square; None without seeds.
        runs: values that all of it rests on.
    """

    term: str
    df: int
    squares: float
    share: float
    f: float | None
    p: float | None
    runs: int


def shares(places: Sequence[Mapping[str, Any]], values: Sequence[float], axes: Sequence[str]) -> list[Share]:
    """Shares of the variance by axis, by pairs of axes, and by seed.

    Sums of squares of type II by least squares: a term's is what it explains beyond all terms that do not contain it
    (Langsrud 2003). In a balanced table this is the textbook's analysis of variance. A term contains another if its
    values tell the other's: an interaction its axes, ranks that only one method has the method.

    Args:
        places: of each value, the axes' values.
        values: one a run.
        axes: those that vary.

    Returns:
        Main effects, interactions of two, further interactions, seeds; nothing without spread or axes.
    """
    y = np.asarray(values, dtype=float)
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    axes = [axis for axis in axes if len({repr(place[axis]) for place in places}) > 1]
    if not axes or total <= 0:
        return []
    labels: dict[tuple[str, ...], list[str]] = {(axis,): [repr(place[axis]) for place in places] for axis in axes}
    for pair in itertools.combinations(axes, 2):
        labels[pair] = [repr([place[axis] for axis in pair]) for place in places]
    terms: list[tuple[str, ...]] = []
    for term in labels:  # of terms that tell the same values apart, the first stands for all
        if not any(_tells(labels[a], labels[term]) and _tells(labels[term], labels[a]) for a in terms):
            terms.append(term)
    designs = {term: _indicators(labels[term]) for term in terms}
    cell = _indicators([tuple(repr(place[axis]) for axis in axes) for place in places])
    means = cell @ ((cell.T @ y) / cell.sum(axis=0))
    within, within_df = float(((y - means) ** 2).sum()), len(y) - cell.shape[1]
    found: list[tuple[str, int, float]] = []
    for term in terms:
        others = [designs[other] for other in terms if not _tells(labels[other], labels[term])]
        without, rank = _residual(others, y)
        with_it, full = _residual([*others, designs[term]], y)
        if full > rank:
            found.append((" × ".join(term), full - rank, max(0.0, without - with_it)))
    rest, rank = _residual(list(designs.values()), y)
    if cell.shape[1] > rank:
        found.append((OTHER, cell.shape[1] - rank, max(0.0, rest - within)))
    tested = within_df > 0 and within > 1e-12 * total
    result = []
    for term_name, df, squares in found:
        f = squares / df / (within / within_df) if tested else None
        result.append(Share(term_name, df, squares, squares / total, f, _above(f, df, within_df), len(y)))
    if within_df > 0:
        result.append(Share(SEEDS, within_df, within, within / total, None, None, len(y)))
    return result


def _above(f: float | None, df: int, within_df: int) -> float | None:
    from scipy.special import fdtrc

    return None if f is None else float(fdtrc(df, within_df, f))


def _indicators(labels: Sequence[Any]) -> NDArray[np.float64]:
    """A column for each label, 1 where a value has it."""
    known = {label: i for i, label in enumerate(dict.fromkeys(map(repr, labels)))}
    found = np.zeros((len(labels), len(known)))
    found[np.arange(len(labels)), [known[repr(label)] for label in labels]] = 1
    return found


def _tells(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether equal labels of the one have equal labels of the other."""
    known: dict[str, str] = {}
    return all(known.setdefault(a, b) == b for a, b in zip(one, other, strict=True))


def _residual(designs: Sequence[NDArray[np.float64]], y: NDArray[np.float64]) -> tuple[float, int]:
    """The sum of squares that a mean and these columns leave, and the rank of them."""
    x = np.hstack([np.ones((len(y), 1)), *designs])
    solution, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    return float(((y - x @ solution) ** 2).sum()), int(rank)
