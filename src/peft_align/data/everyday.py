"""Everyday questions and requests, written for this project (scripts/make_everyday.py); carried in the package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft_align.data.pairs import Counts, Message, Pair, make_pair

# Rule -> how the ids of its rows begin.
RULES = {"helpful": ("helpful-",), "harmless": ("harmless-",), "mixture": ("harmless-", "helpful-")}


def subset(rule: str) -> None:
    """The files of both preferences lie in one folder."""


def pairs(rows: Iterable[Mapping[str, Any]], rule: str, split: str, counts: Counts) -> Iterator[Pair]:
    """The pairs of the rows whose id says that they belong to the preference."""
    for row in rows:
        if not row["id"].startswith(RULES[rule]):
            continue
        counts.read += 1
        counts.matching += 1
        pair = make_pair(row["id"], (Message("user", row["prompt"].strip()),), row["chosen"], row["rejected"], counts)
        if pair is not None:
            yield pair
