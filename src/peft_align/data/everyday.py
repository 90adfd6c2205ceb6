"""Everyday questions and requests, written for this project (scripts/make_everyday.py); carried in the package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft_align.data.pairs import Counts, Message, Pair, make_pair

ROW = "id begins with harmless- or helpful-; prompt, chosen and rejected are texts"
# Rule -> how the ids of its rows begin.
RULES = {"helpful": ("helpful-",), "harmless": ("harmless-",), "mixture": ("harmless-", "helpful-")}


def subset(rule: str) -> None:
    """The files of both preferences lie in one folder."""


def columns(rule: str) -> tuple[str, ...]:
    """What a row must have."""
    return ("id", "prompt", "chosen", "rejected")


def pairs(rows: Iterable[Mapping[str, Any]], rule: str, split: str, counts: Counts) -> Iterator[Pair]:
    """The pairs of the rows whose id says that they belong to the preference."""
    for row in counts.rows(rows):
        name, prompt = row.get("id"), row.get("prompt")
        if isinstance(name, str) and not name.startswith(RULES[rule]):
            continue
        counts.read += 1
        counts.matching += 1
        if not isinstance(name, str) or not isinstance(prompt, str):
            counts.drop("id or prompt is not text")
            continue
        turns = (Message("user", prompt.strip()),)
        pair = make_pair(name, turns, row.get("chosen"), row.get("rejected"), counts)
        if pair is not None:
            yield pair
