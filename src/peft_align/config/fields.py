"""What a field of the schema accepts, and whether it is part of what makes a result."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a field accepts besides its type."""

    doc: str
    scientific: bool = True
    low: float | None = None
    high: float | None = None
    above: float | None = None  # exclusive lower bound
    choices: tuple[str, ...] | None = None
    may_be_empty: bool = False  # a list without values
    length: int | None = None  # of a list
    only_text: bool = False  # a number is none: YAML reads 1:30:00 as one
    lines: bool = False  # a text may have line breaks and tabs
    form: tuple[str, str, str] | None = None  # regular expression of a text; what else it is, and what is right


def value(doc: str, default: Any = MISSING, **rule: Any) -> Any:
    """A scientific field: another value is another result."""
    return field(default=default, metadata={"rule": Rule(doc, **rule)})


def operational(doc: str, default: Any = MISSING, **rule: Any) -> Any:
    """A field that says where, how fast or with what records something is done."""
    return field(default=default, metadata={"rule": Rule(doc, scientific=False, **rule)})
