"""What every dataset is turned into: a prompt and two responses of which one is preferred."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NAMED = 10  # rows dropped for a reason that are named, at most


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """A dialogue that ends with the user's turn, the preferred response and the other one, without outer blanks."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass
class Counts:
    """What became of the rows: each is kept (possibly as several pairs) or dropped for a reason.

    Attributes:
        read: rows read.
        matching: rows that the preference's rule applies to, before any other filter. What a mixture takes two pairs
            from counts twice, so its number is the sum of its parts'.
        kept: pairs made.
        dropped: reason -> rows (of a mixture: would-be pairs) dropped for it.
        named: reason -> the first of them, by name, where something is wrong with the row.
        first: reason -> the first row dropped for it, counted from 0 over the files of the split.
        unmatched: the reasons that say that a rule does not apply to a row.
        row: that is looked at.
    """

    read: int = 0
    matching: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    unmatched: set[str] = field(default_factory=set)
    row: int = -1

    def drop(self, reason: str, name: str | None = None, *, applies: bool = True) -> None:
        """Leave out the row that is looked at.

        Args:
            reason: why.
            name: of what would have been a pair, if something is wrong with the row.
            applies: the preference's rule applies to it.
        """
        self.dropped[reason] += 1
        self.first.setdefault(reason, self.row)
        self.unmatched |= set() if applies else {reason}
        if name is not None and self.dropped[reason] <= NAMED:
            self.named.setdefault(reason, []).append(name)

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows, each being the one that is looked at until the next is asked for."""
        for self.row, row in enumerate(rows):
            yield row

    def plain(self) -> dict[str, Any]:
        """The counts as a record keeps them."""
        counts = {"read": self.read, "matching": self.matching, "kept": self.kept}
        return counts | {
            "dropped": dict(sorted(self.dropped.items())),
            "dropped_rows": dict(sorted(self.named.items())),
        }


def make_pair(
    pair_id: str, prompt: tuple[Message, ...], chosen: object, rejected: object, counts: Counts
) -> Pair | None:
    """The pair, or None with the reason counted: no text, an empty response, or two equal ones."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        counts.drop("response is not text", pair_id)
        return None
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        counts.drop("empty response", pair_id)
    elif chosen == rejected:
        counts.drop("responses are equal", pair_id)
    elif not prompt or not all(message.content for message in prompt):
        counts.drop("empty turn in the prompt", pair_id)
    elif prompt[-1].role != "user":
        counts.drop("prompt does not end with the user", pair_id)
    else:
        counts.kept += 1
        return Pair(pair_id, prompt, chosen, rejected)
    return None
