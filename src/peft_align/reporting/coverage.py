"""What of a sweep is there: runs done, failed, missing, and cells excluded, counted over the axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft_align.grid.cells import Excluded
from peft_align.grid.planner import Item
from peft_align.grid.runs import Sweep
from peft_align.reporting.frame import Frame, frame_of
from peft_align.reporting.table import NOT_TRAINED, Row

DONE, FAILED, MISSING, EXCLUDED = "done", "failed", "missing", "excluded"
STATES = (DONE, FAILED, MISSING, EXCLUDED)
COLUMNS = ["axis", "value", "state", "reason", "runs"]
ALL = "all"
SHOWN = 3


@dataclass(frozen=True)
class Coverage:
    """Counts by axis, value, state and reason.

    Attributes:
        counts: runs, or excluded cells; the axis `all` has them all, `kind` those of training, merges and baselines.
        whole: whether the states of all runs are known; from a table alone only those are that have a row.
    """

    counts: Mapping[tuple[str, str, str, str], int]
    whole: bool = True

    def of(self, axis: str = ALL, value: str = "") -> Counter[str]:
        """Counts by state."""
        return Counter(self._by_value.get((axis, value), {}))

    @cached_property
    def _by_value(self) -> Mapping[tuple[str, str], Counter[str]]:
        found: dict[tuple[str, str], Counter[str]] = {}
        for (axis, value, state, _), n in self.counts.items():
            found.setdefault((axis, value), Counter())[state] += n
        return found

    def reasons(self, state: str) -> Counter[str]:
        """Counts of all runs in a state by reason."""
        found: Counter[str] = Counter()
        for (axis, _, own, reason), n in self.counts.items():
            if axis == ALL and own == state:
                found[reason] += n
        return found

    def rows(self) -> list[Row]:
        """Rows of coverage.csv."""
        return [dict(zip(COLUMNS, (*key, n), strict=True)) for key, n in self.counts.items()]

    def text(self) -> str:
        """Some lines for people: how much is there, why the rest is not, and where most is lacking."""
        total = self.of()
        if not self.whole:
            runs = "1 run has" if total[DONE] == 1 else f"{total[DONE]} runs have"
            return f"{runs} results in the table; what is missing, failed or was excluded, it does not say.\n"
        planned = total[DONE] + total[FAILED] + total[MISSING]
        head = [f"{total[DONE]} of {planned} runs are complete"]
        head += [f"{total[FAILED]} failed"] if total[FAILED] else []
        head += [f"{total[MISSING]} are missing"] if total[MISSING] else []
        text = ", ".join(head) + (f"; {total[EXCLUDED]} cells are excluded" if total[EXCLUDED] else "") + ".\n"
        for state in (FAILED, MISSING, EXCLUDED):
            reasons = self.reasons(state).most_common()
            told = [f"{n} × {reason}" for reason, n in reasons[:SHOWN]]
            told += [f"{len(reasons) - SHOWN} further reasons"] if len(reasons) > SHOWN else []
            text += f"  {state}: {'; '.join(told)}\n" if told else ""
        least = self.least()
        return text + (f"  least complete: {', '.join(least)}\n" if least else "")

    def least(self) -> list[str]:
        """The values of axes that lack the most, where not all values lack as much."""
        shares = []
        for axis, at in dict.fromkeys((axis, at) for axis, at, *_ in self.counts if axis not in (ALL, "kind")):
            own = self.of(axis, at)
            planned = own[DONE] + own[FAILED] + own[MISSING]
            if planned:
                shares.append((own[DONE] / planned, f"{axis}={at} ({own[DONE]} of {planned})"))
        lowest = sorted({share for share, _ in shares})
        whole = self.of(ALL)
        overall = whole[DONE] / max(1, whole[DONE] + whole[FAILED] + whole[MISSING])
        return [text for share, text in sorted(shares) if share < overall and share == lowest[0]][:SHOWN]


def coverage(sweep: Sweep, items: Sequence[Item]) -> Coverage:
    """Count the runs of a sweep; parents that it only needs are left out."""
    states = {item.run.id: state(item) for item in items if not item.run.is_parent_only}
    excluded = {repr(sorted(cell.values.items(), key=str)): cell for cell in sweep.excluded}
    return _counted(frame_of(sweep), states, list(excluded.values()))


def of_table(frame: Frame, table: Sequence[Row]) -> Coverage:
    """What a table alone tells: the runs that have a row in it, as done."""
    return _counted(frame, {row["run_id"]: (DONE, "") for row in table}, whole=False)


def _counted(
    frame: Frame, states: Mapping[str, tuple[str, str]], excluded: Sequence[Excluded] = (), *, whole: bool = True
) -> Coverage:
    """Count runs by their states and reasons, and excluded cells."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    own = [run for run in frame.runs if run.id in states]
    keys = [key for key in dict.fromkeys((*frame.axis_keys, "seed")) if key != "inputs"]
    values = {run.id: {key: _shown(run.value(key)) for key in keys} for run in own if run.kind not in NOT_TRAINED}
    varying = [key for key in keys if len({of[key] for of in values.values()}) > 1]
    for run in own:
        at, reason = states[run.id]
        counts[ALL, "", at, reason] += 1
        counts["kind", run.kind, at, reason] += 1
        for key in varying if run.id in values else ():
            if values[run.id][key]:
                counts[key, values[run.id][key], at, reason] += 1
    for cell in excluded:
        counts[ALL, "", EXCLUDED, cell.reason] += 1
        for key in varying:
            if key in cell.values:
                counts[key, _shown(cell.values[key]), EXCLUDED, cell.reason] += 1
    order = {state: i for i, state in enumerate(STATES)}
    keyed = sorted(counts.items(), key=lambda entry: _order(entry[0], [ALL, "kind", *keys], order))
    return Coverage(dict(keyed), whole)


def _order(key: tuple[str, str, str, str], axes: Sequence[str], states: Mapping[str, int]) -> tuple[Any, ...]:
    axis, at, state, reason = key
    return axes.index(axis), at, states[state], reason


def state(item: Item) -> tuple[str, str]:
    """Whether a run is done, failed or missing, and why."""
    if item.done:
        return DONE, ""
    return (FAILED, item.failure) if item.failure else (MISSING, item.why)


def _shown(found: Any) -> str:
    return "" if found is None else ",".join(map(str, found)) if isinstance(found, list) else str(found)
