"""What every dataset is turned into: a prompt and two responses of which one is preferred."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


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
    """

    read: int = 0
    matching: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def plain(self) -> dict[str, Any]:
        """The counts as a record keeps them."""
        counts = {"read": self.read, "matching": self.matching, "kept": self.kept}
        return counts | {"dropped": dict(sorted(self.dropped.items()))}


def make_pair(
    pair_id: str, prompt: tuple[Message, ...], chosen: object, rejected: object, counts: Counts
) -> Pair | None:
    """The pair, or None with the reason counted: no text, an empty response, or two equal ones."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        counts.dropped["response is not text"] += 1
        return None
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        counts.dropped["empty response"] += 1
    elif chosen == rejected:
        counts.dropped["responses are equal"] += 1
    elif not prompt or not all(message.content for message in prompt):
        counts.dropped["empty turn in the prompt"] += 1
    elif prompt[-1].role != "user":
        counts.dropped["prompt does not end with the user"] += 1
    else:
        counts.kept += 1
        return Pair(pair_id, prompt, chosen, rejected)
    return None
