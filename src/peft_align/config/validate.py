"""Turns plain values into the schema's dataclasses, collecting every fault on the way.

OmegaConf's structured configs stop at the first fault, let `++key` through and take milliseconds a run; a sweep
checks thousands of runs and wants all faults at once, so the check is done here on plain values.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_align.config.fields import Rule
from peft_align.config.schema import GROUPS, SCIENTIFIC_GROUPS, Config
from peft_align.errors import Fault, InputError, suggest
from peft_align.secrecy import SECRETS_BELONG, secret_in


@dataclass(frozen=True)
class Leaf:
    """One setting of the schema: its dotted key, its type, its rule and the kinds of its group that have it."""

    key: str
    type: Any
    rule: Rule
    kinds: frozenset[str] | None = None  # None: every option of the group has it

    @property
    def scientific(self) -> bool:
        return self.rule.scientific


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved type hints of a schema dataclass."""
    return typing.get_type_hints(cls)


@functools.cache
def leaves() -> dict[str, Leaf]:
    """Every setting by its dotted key; a key that several kinds of a group share is one leaf."""
    found: dict[str, Leaf] = {}

    def walk(cls: type, prefix: str, kind: str | None, scientific: bool) -> None:
        for f in dataclasses.fields(cls):
            rule: Rule = f.metadata["rule"]
            hint, key, is_scientific = hints(cls)[f.name], f"{prefix}{f.name}", scientific and rule.scientific
            if dataclasses.is_dataclass(hint):
                walk(typing.cast(type, hint), f"{key}.", kind, is_scientific)
                continue
            rule = dataclasses.replace(rule, scientific=is_scientific)
            if kind is not None and key in found:
                known = found[key]
                choices = rule.choices and tuple(dict.fromkeys((*(known.rule.choices or ()), *rule.choices)))
                found[key] = Leaf(
                    key, hint, dataclasses.replace(rule, choices=choices), (known.kinds or frozenset()) | {kind}
                )
            else:
                found[key] = Leaf(key, hint, rule, None if kind is None else frozenset({kind}))

    for group, cls in GROUPS.items():
        for kind, variant in cls.items() if isinstance(cls, dict) else [(None, cls)]:
            walk(variant, f"{group}.", kind, group in SCIENTIFIC_GROUPS)
    for f in dataclasses.fields(Config):
        if f.name not in GROUPS:
            hint = hints(Config)[f.name]
            if dataclasses.is_dataclass(hint):
                walk(typing.cast(type, hint), f"{f.name}.", None, f.metadata["rule"].scientific)
            else:
                found[f.name] = Leaf(f.name, hint, f.metadata["rule"])
    return found


def kind_of(group: str, node: Mapping[str, Any], faults: list[Fault]) -> type | None:
    """The dataclass of a group's node: the only one, or the one its `kind` names."""
    cls = GROUPS[group]
    if not isinstance(cls, dict):
        return cls
    kind = node.get("kind")
    if isinstance(kind, str) and kind in cls:
        return cls[kind]
    what = "is missing" if kind is None else f"{kind!r} is not a kind of {group}"
    faults.append(Fault(f"{group}.kind", what, suggest(str(kind), cls)))
    return None


def config_from_plain(plain: Mapping[str, Any]) -> Config:
    """A Config from the plain values of a job file or record. Raises InputError."""
    faults: list[Fault] = []
    values: dict[str, Any] = {}
    for name, hint in hints(Config).items():
        if name in GROUPS:
            cls = kind_of(name, plain[name], faults)
            values[name] = convert(cls, plain[name], name, faults) if cls else None
        elif dataclasses.is_dataclass(hint):
            values[name] = convert(typing.cast(type, hint), plain[name], name, faults)
        else:
            values[name] = check(plain[name], hint, leaves()[name].rule, name, faults)
    if faults:
        raise InputError(faults)
    return Config(**values)


def convert(cls: type, node: Any, where: str, faults: list[Fault]) -> Any:
    """Build `cls` from a plain mapping; every fault is added to `faults` and None returned."""
    if not isinstance(node, Mapping):
        faults.append(Fault(where, f"a mapping is expected here, not {show(node)}"))
        return None
    before = len(faults)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in node:
        if name not in fields:
            faults.append(Fault(f"{where}.{name}", "no such key", suggest(str(name), fields)))
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name not in node:
            if f.default is dataclasses.MISSING:
                faults.append(Fault(f"{where}.{name}", "is missing", f.metadata["rule"].doc))
            else:
                values[name] = f.default
            continue
        hint, key = hints(cls)[name], f"{where}.{name}"
        if dataclasses.is_dataclass(hint):
            values[name] = convert(typing.cast(type, hint), node[name], key, faults)
        else:
            values[name] = check(node[name], hint, f.metadata["rule"], key, faults)
    return cls(**values) if len(faults) == before else None


def check(value: Any, hint: Any, rule: Rule, where: str, faults: list[Fault]) -> Any:
    """The value in its declared type, or None with a fault added."""
    optional = isinstance(hint, types.UnionType) and type(None) in hint.__args__
    base = next(a for a in hint.__args__ if a is not type(None)) if optional else hint
    if value is None and optional:
        return None
    if value is None or value == "":
        faults.append(Fault(where, "the value is empty", describe(base, rule)))
        return None
    if typing.get_origin(base) is list:
        if not isinstance(value, (list, tuple)) or not (value or rule.may_be_empty):
            many = "a list" if rule.may_be_empty else "a list of at least one value"
            hint = rule.doc if isinstance(value, (list, tuple, Mapping)) else f"write [{show(value).strip(chr(39))}]"
            faults.append(Fault(where, f"{many} is expected, not {show(value)}", hint))
            return None
        if rule.length is not None and len(value) != rule.length:
            faults.append(Fault(where, f"{rule.length} values are expected, not {show(value)}", rule.doc))
            return None
        item = typing.get_args(base)[0]
        if dataclasses.is_dataclass(item):
            return [
                v if type(v) is item else convert(typing.cast(type, item), v, f"{where}[{i}]", faults)
                for i, v in enumerate(value)
            ]
        return [check(v, item, rule, f"{where}[{i}]", faults) for i, v in enumerate(value)]
    if typing.get_origin(base) is dict:
        if not isinstance(value, Mapping):
            faults.append(Fault(where, f"a mapping is expected, not {show(value)}", rule.doc))
            return None
        item = typing.get_args(base)[1]
        return {str(k): check(v, item, rule, f"{where}.{k}", faults) for k, v in value.items()}
    if rule.only_text and isinstance(value, int):
        faults.append(Fault(where, f"{value} is a number", "write H:M:S in quotes: YAML reads 1:30:00 as 5400"))
        return None
    converted = as_type(value, base)
    if converted is None:
        in_quotes = base in (int, float) and isinstance(value, str) and NUMBER.fullmatch(value.strip())
        hint = f"write it without quotes: {value.strip()}" if in_quotes else describe(base, rule)
        endless = base is float and isinstance(value, float) and not math.isfinite(value)
        name = "a finite number" if endless else TYPE_NAMES[base]
        faults.append(Fault(where, f"{show(value)} is not {name}", hint))
        return None
    low_bad = (rule.low is not None and converted < rule.low) or (rule.above is not None and converted <= rule.above)
    if base in (int, float) and (low_bad or ((high := _high(base, rule)) is not None and converted > high)):
        hint = describe(base, rule, over=not low_bad)
        faults.append(Fault(where, f"{show(value)} is out of range", hint))
        return None
    if base is str and (wrong := _unfit(converted, rule)):
        faults.append(Fault(where.partition("=")[0], *wrong))  # of the command line it holds the text
        return None
    if rule.choices and converted not in rule.choices:
        faults.append(Fault(where, f"{show(value)} is not one of its values", suggest(str(value), rule.choices)))
        return None
    return converted


CONTROL, LINES = re.compile(r"[\x00-\x1f\x7f-\x9f]"), str.maketrans("", "", "\n\t")


def _unfit(text: str, rule: Rule) -> tuple[str, str] | None:
    """What is wrong with a text, and the remedy; the text is not told, for it may be a secret."""
    if CONTROL.search(text.translate(LINES) if rule.lines else text):
        return "has a line break or another control character", "write it in one line"
    if held := secret_in(text):
        return f"holds {held}, and settings are written into records and scripts", SECRETS_BELONG
    if rule.form and not re.fullmatch(rule.form[0], text):
        return rule.form[1:]
    return None


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LARGEST = 2**31 - 1  # of whole numbers: what programs below take


def _high(base: Any, rule: Rule) -> float | None:
    return LARGEST if rule.high is None and base is int else rule.high


TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def as_type(value: Any, base: Any) -> Any:
    """`value` as `base` where nothing is lost by it, else None."""
    if base is bool:
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if base is int:
        if isinstance(value, float) and value.is_integer() and math.isfinite(value):
            return int(value)
        return value if isinstance(value, int) else None
    if base is float:
        number = float(value) + 0.0 if isinstance(value, (int, float)) else None  # + 0.0: no negative zero
        return number if number is not None and math.isfinite(number) else None
    if base is str:
        # A revision like 1234567 or a name like 42 reads as a number in YAML; as a text nothing is lost.
        return str(value) if isinstance(value, (str, int)) else None
    raise TypeError(f"the schema uses a type that is not handled: {base}")


def describe(base: Any, rule: Rule, *, over: bool = False) -> str:
    """What a field accepts, in words; `over`: the value is too large for what any takes."""
    if rule.choices:
        return f"allowed: {', '.join(rule.choices)}"
    high = _high(base, rule)
    bounds = [
        f"at least {rule.low:g}" if rule.low is not None else "",
        f"above {rule.above:g}" if rule.above is not None else "",
        f"at most {high:.15g}" if high is not None and (rule.high is not None or over) else "",
    ]
    return ", ".join([TYPE_NAMES.get(base, "a value"), *filter(None, bounds)]) + f": {rule.doc}"


def show(value: Any) -> str:
    """A value as people wrote it, cut to a readable length."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # as YAML has them
    return text if len(text) <= 60 else f"{text[:57]}..."
