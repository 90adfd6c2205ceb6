"""What was measured at each step of a training, thinned out to what a plot can show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_align.reporting.told import number

# Names that people read -> the names in metrics.jsonl.
CURVES = {
    "loss": "loss",
    "reward margin": "rewards/margins",
    "reward accuracy": "rewards/accuracies",
    "grad_norm": "grad_norm",
}
POINTS = 200  # of a curve, at most
IN_ALL = 300_000  # of all curves of a page: beyond, it would not open any more
FEWEST = 20
OF_ROWS = b', "rows": '  # what stands behind it in a line, names and losses of every sample, is most of the file
Point = list[float | None]


def points_for(runs: int) -> int:
    """Points of a curve where so many runs have them."""
    return max(FEWEST, min(POINTS, IN_ALL // max(1, runs * len(CURVES))))


def read_curves(path: Path, points: int = POINTS) -> tuple[dict[str, list[Point]], int]:
    """The curves of a file of metrics, as [step, value]; a value that is no finite number is None.

    Args:
        path: of metrics.jsonl.
        points: of each curve, at most.

    Returns:
        The curves that it has, and how many lines could not be read.

    Raises:
        OSError: it cannot be read.
    """
    found: dict[str, list[Point]] = {name: [] for name in CURVES}
    unread = 0
    for raw in path.read_bytes().splitlines():
        line = _line(raw)
        if line is None:
            unread += bool(raw.strip())
            continue
        for name, key in CURVES.items():
            if key in line:
                found[name].append([line["step"], number(line[key])])
    return {name: thinned(curve, points) for name, curve in found.items() if curve}, unread


def _line(raw: bytes) -> Mapping[str, Any] | None:
    head, cut, _ = raw.partition(OF_ROWS)
    try:
        line = json.loads(head + b"}" if cut else head)
    except (ValueError, RecursionError):
        return None
    is_step = isinstance(line, dict) and type(line.get("step")) is int
    return line if is_step else None


def thinned(curve: Sequence[Point], points: int = POINTS) -> list[Point]:
    """At most so many points of a curve: both ends, and of each stretch between them the lowest and the highest.

    So no spike is lost, and of a value that is no number one in each stretch stays.

    Args:
        curve: [step, value] in the order of steps; a value may be None.
        points: at least 5.
    """
    if len(curve) <= points:
        return list(curve)
    inner = curve[1:-1]
    stretches = (points - 2) // (3 if any(value is None for _, value in inner) else 2)
    kept = [0]
    for i in range(stretches):
        first, last = i * len(inner) // stretches, (i + 1) * len(inner) // stretches
        there = {j: value for j in range(first, last) if (value := inner[j][1]) is not None}
        chosen = {min(there, key=there.__getitem__), max(there, key=there.__getitem__)} if there else set()
        missing = next((j for j in range(first, last) if j not in there), None)
        chosen |= set() if missing is None else {missing}
        kept += [j + 1 for j in sorted(chosen)]
    return [curve[j] for j in [*kept, len(curve) - 1]]
