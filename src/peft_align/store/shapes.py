"""What records hold that others read: checked where a record is read, so that nothing behind it stumbles.

A shape is a type, or what is made of shapes: a dict of keys (those that end with "?" may be absent; others that a
record has besides are its own business), Each (a mapping with any names), Items (a list), Maybe (or null).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 2**53  # of whole numbers: what every reader of JSON holds exactly


@dataclass(frozen=True)
class Each:
    """A mapping from any names to one shape.

    Attributes:
        whole: the names are whole numbers, as text.
        some: it is not empty.
    """

    shape: Any
    whole: bool = False
    some: bool = False


@dataclass(frozen=True)
class Items:
    """A list of one shape."""

    shape: Any


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Finite:
    """A number that is neither NaN nor infinite."""


ANY = object()
FINITE = Finite()
FILES = Each({"size": int, "sha256": str})
INPUTS = Each({"files": Each(ANY), "digest": str})
METRIC = {
    "name": str,
    "value": float,
    "stderr": Maybe(float),
    "n": int,
    "higher_is_better": Maybe(bool),
    "part": str,
    "bound?": Maybe(float),
}
TRAIN = {
    "checkpoints": Each({"files": FILES, "digest": str}, whole=True, some=True),
    "metrics": Each({"size": int}),
    "parents": Each(Maybe(str)),
    "inputs": INPUTS,
    "data?": {"warning?": Maybe(str)},
    "seconds?": {"total": FINITE},
    "seconds_per_step?": FINITE,
    "samples?": int,
    "tokens?": FINITE,
    "peak_memory_bytes?": {"resident": FINITE, "gpu": Maybe(FINITE)},
    "energy_joules?": Maybe(FINITE),
}
MERGE = {
    "digest": str,
    "parents": Each(Maybe(str)),
    "saved": Each({"asked": Each(ANY), "files": FILES, "inputs": INPUTS}),
}
SCORED = {
    "step": int,
    "benchmark": str,
    "base?": str,
    "dataset": Maybe(str),
    "preference": Maybe(str),
    "metrics": Items(METRIC),
    "files": FILES,
}
EVALUATION = SCORED | {"key": {"split?": str}, "inputs": INPUTS}
JUDGEMENT = SCORED | {"key": {"judge": ANY}, "judge": str, "samples": FILES, "details?": {"warning?": str}}
MANIFEST = {"command": Items(str), "config_dirs": Items(str)}
SUBMISSION = {
    "time": FINITE,
    "sweep": str,
    "name": str,
    "user": str,
    "runs": Items(str),
    "report?": Maybe(str),
    "arrays": Items({"name": str, "job": Maybe(str), "tasks": Items(Items(str))}),
}
# What a run says of itself while it is not done: each is used by itself, and left out where it is of another type.
NOTES: Mapping[str, Any] = {
    "stage": str,
    "kind": str,
    "reason": str,
    "host": str,
    "log": str,
    "task": Maybe(str),
    "time": FINITE,
    "pid": int,
    "step": Maybe(int),
    "of": Maybe(int),
    "loss": Maybe(float),
    "eta": Maybe(FINITE),
    "seconds_per_step": Maybe(FINITE),
    "reached": Items(int),
}


def sound(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The notes that are what they should be."""
    return {key: value for key, value in notes.items() if key not in NOTES or wrong(value, NOTES[key]) is None}


def wrong(value: Any, shape: Any) -> str | None:
    """What of a value, as JSON is read, is not of its shape, with its place; None if all of it is."""
    found = _wrong(value, shape)
    return None if found is None else f"{found[0].removeprefix('.') or 'it'} {found[1]}"


def _wrong(value: Any, shape: Any) -> tuple[str, str] | None:
    """The place and what is wrong there. Places are put together on the way back: most records have nothing wrong."""
    if shape is ANY or (isinstance(shape, Maybe) and value is None):
        return None
    if isinstance(shape, Maybe):
        return _wrong(value, shape.shape)
    if isinstance(shape, dict):
        return _wrong_keys(value, shape) if isinstance(value, dict) else ("", "is no mapping")
    if isinstance(shape, Each):
        return _wrong_names(value, shape) if isinstance(value, dict) else ("", "is no mapping")
    if isinstance(shape, Items):
        if not isinstance(value, list):
            return "", "is no list"
        for i, each in enumerate(value):
            if found := _wrong(each, shape.shape):
                return f"[{i}]{found[0]}", found[1]
        return None
    return None if _is(value, shape) else ("", f"is not {NAMES[shape]}")


def _wrong_keys(value: dict[str, Any], shape: dict[str, Any]) -> tuple[str, str] | None:
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name not in value:
            if name == key:
                return f".{name}", "is missing"
        elif found := _wrong(value[name], inner):
            return f".{name}{found[0]}", found[1]
    return None


def _wrong_names(value: dict[str, Any], shape: Each) -> tuple[str, str] | None:
    if shape.some and not value:
        return "", "is empty"
    if shape.whole and (odd := next((name for name in value if not (name.isascii() and name.isdigit())), None)):
        return f".{odd}", "is named after no whole number"
    for name, each in value.items():
        if found := _wrong(each, shape.shape):
            return f".{name}{found[0]}", found[1]
    return None


NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", FINITE: "a finite number"}


def _is(value: Any, shape: Any) -> bool:
    if shape is str or shape is bool:
        return isinstance(value, shape)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, int):
        return abs(value) <= LARGEST
    return shape is float or (shape is FINITE and math.isfinite(value) and abs(value) <= LARGEST)
