"""Reads a command line: our own flags, and overrides in Hydra's grammar.

`grid=full`, comma lists and `range()` are taken here, before Hydra, which refuses them outside of --multirun.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, OverrideType, QuotedString, RangeSweep
from hydra.errors import HydraException

from peft_align.errors import Fault, suggest
from peft_align.secrecy import SECRETS_BELONG, redacted, secret_in

MAX_SWEEP_VALUES = 100_000
SETTING = re.compile(r"-|\+?[\w.@]+=")  # how a flag or a setting begins, and no value of a flag
ADDED_UP = ("grid", "selected")  # several of them are united


@dataclass(frozen=True)
class Override:
    """`key=values` from the command line; several values make an axis."""

    text: str
    key: str
    values: tuple[Any, ...]

    @property
    def is_axis(self) -> bool:
        return len(self.values) > 1


@dataclass(frozen=True)
class CommandLine:
    overrides: tuple[Override, ...] = ()
    grids: tuple[str, ...] = ()
    selected: tuple[str, ...] = ()
    own: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the verb's own keys
    flags: frozenset[str] = frozenset()
    config_dirs: tuple[Path, ...] = ()
    hydra: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()  # told together with the faults of the keys and values

    def value(self, key: str, default: Any) -> Any:
        """The last single value given for `key`."""
        return next((o.values[-1] for o in reversed(self.overrides) if o.key == key), default)


def take_values(
    argv: Sequence[str], named: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, list[str]], list[str], list[Fault]]:
    """The values of flags that have some, the words that are left, and what is wrong with the values.

    A flag's values are the words behind it, up to the next flag or `key=value`, or what follows its `=`.

    Args:
        argv: the command line.
        named: by flag, the least and the largest number of values.
    """
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    left = list(argv)
    while left:
        name, equals, attached = left.pop(0).partition("=")
        if name not in named:
            rest.append(name + equals + attached)
            continue
        own = given.setdefault(name, [])
        own += [attached] if equals else []
        while not equals and left and len(own) < named[name][1] and not SETTING.match(left[0]):
            own.append(left.pop(0))
    faults = []
    for name, values in given.items():
        least, most = named[name]
        if len(values) > most == 0:
            faults.append(Fault(f"{name}={values[-1]}", f"{name} takes no value", f"write {name}"))
        elif len(values) < least or "" in values:
            faults.append(Fault(name, "has no value", f"write {name} VALUE"))
        elif len(values) > most:
            faults.append(Fault(name, "is given twice", "give one value"))
    return given, rest, faults


def parse(argv: Sequence[str], flags: Sequence[str] = (), own: Sequence[str] = ()) -> CommandLine:
    """Parse `argv`; `flags` are the verb's own besides --config-dir and --help, `own` its keys that are no settings."""
    allowed = [*flags, "--config-dir", "--help"]
    faults: list[Fault] = []
    seen: set[str] = set()
    dirs: list[Path] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, attached = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif word in ("-m", "--multirun"):
            faults.append(
                Fault(word, "Hydra's multirun is not used here", "name a grid with +grid=NAME, or give lists")
            )
        elif name == "--config-dir":
            folder = attached if equals else (rest.pop(0) if rest else "")
            if not folder or not Path(folder).is_dir():
                what = f"'{folder}' is not a folder" if folder else "names no folder"
                faults.append(Fault("--config-dir", what, "give the folder of your own options"))
            else:
                dirs.append(Path(folder).resolve())
        elif word == "-h":
            seen.add("--help")
        elif name in allowed and not equals:
            seen.add(name)
        elif name in allowed:
            faults.append(Fault(word, f"{name} takes no value", f"write {name}"))
        else:
            faults.append(Fault(word, "no such flag", suggest(name, allowed)))
    overrides, hydra = _parse_overrides(words, faults)
    apart = {key: overrides.pop(key).values for key in (*ADDED_UP, *own) if key in overrides}
    return CommandLine(
        overrides=tuple(overrides.values()),
        grids=tuple(map(str, apart.pop("grid", ()))),
        selected=tuple(str(Path(str(path)).absolute()) for path in apart.pop("selected", ())),
        own=apart,
        flags=frozenset(seen),
        config_dirs=tuple(dirs),
        hydra=tuple(hydra),
        words=tuple(map(_anywhere, words)),
        faults=tuple(faults),
    )


def _anywhere(word: str) -> str:
    """A word as it is to be read again from another folder: with paths of selections and adapters in full."""
    key, equals, paths = word.partition("=")
    if key.lstrip("+") not in ("selected", "adapter") or not equals or any(mark in paths for mark in "'\"()[]"):
        return word
    is_path = key.lstrip("+") == "selected"
    full = [str(Path(path).absolute()) if is_path or Path(path).is_dir() else path for path in paths.split(",")]
    return f"{key}={','.join(full)}"


def _parse_overrides(words: Sequence[str], faults: list[Fault]) -> tuple[dict[str, Override], list[str]]:
    parser = OverridesParser.create()
    overrides: dict[str, Override] = {}
    hydra: list[str] = []
    for word in words:
        if held := secret_in(word):
            what = f"holds {held}, and the command line is recorded"
            faults.append(Fault(redacted(word.partition("=")[0]), what, SECRETS_BELONG))
            continue
        try:
            parsed = parser.parse_override(word)
        except HydraException as error:
            reason = str(error).splitlines()[0] if "=" in word else "there is no '=' in it"
            at = word if word.strip() else f"'{word}'"
            faults.append(Fault(at, f"not an override: {reason}", "write key=value, e.g. method=dpo or peft.r=8,16"))
            continue
        key = parsed.key_or_group
        if key.startswith("hydra.") or key == "hydra":
            hydra.append(word)
            continue
        if not key:
            faults.append(Fault(word, "there is no key before '='", "write key=value"))
        elif parsed.type == OverrideType.DEL:
            faults.append(Fault(word, "settings cannot be deleted", f"give another value: {key}=..."))
        elif parsed.package is not None:
            faults.append(Fault(word, "a package (@) is not used here", f"write {key}=..."))
        else:
            values = _values(parsed.value(), word, faults)
            if not values:
                continue
            if key in ADDED_UP and key in overrides:
                values = list(dict.fromkeys(map(str, [*overrides[key].values, *values])))
            elif key in overrides and overrides[key].values != tuple(values):
                faults.append(Fault(word, f"'{key}' is given twice", f"the other is {overrides[key].text}"))
                continue
            overrides[key] = Override(word, key, tuple(values))
    return overrides, hydra


def _values(value: Any, word: str, faults: list[Fault]) -> list[Any]:
    """The values of one override, in order and once each; empty if a fault was added."""
    if isinstance(value, (Glob, IntervalSweep)):
        faults.append(Fault(word, "glob() and interval() are not used here", "list the values: a,b,c or range(a,b)"))
        return []
    if isinstance(value, RangeSweep):
        raw = list(itertools.islice(value.range(), MAX_SWEEP_VALUES + 1))
        if len(raw) > MAX_SWEEP_VALUES:
            faults.append(Fault(word, "these are too many values for one axis", f"at most {MAX_SWEEP_VALUES}"))
            return []
    else:
        raw = list(value.list) if isinstance(value, ChoiceSweep) else [value]
    plain = [_plain(v) for v in raw]
    if not plain or any(v == "" for v in plain):
        what = "the value is empty" if plain else "there is no value in that range"
        faults.append(Fault(word, what, f"write {word.split('=')[0]}=VALUE"))
        return []
    unique: dict[str, Any] = {json.dumps(v, sort_keys=True, default=str): v for v in plain}
    return list(unique.values())


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return value
