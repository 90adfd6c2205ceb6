"""The grid language: conf/grid/*.yaml read into blocks, with every fault reported before anything is expanded.

See docs/grids.md for the language. A key of a block is a group (`method: [sft, dpo]`), or a dotted setting
(`peft.r: [8, 16]`); both are checked against the options that exist and the schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_align.config import validate
from peft_align.config.compose import ConfigSpace
from peft_align.config.schema import GROUPS, SCIENTIFIC_GROUPS, SWEEP_LEVEL
from peft_align.errors import Fault, InputError, suggest

GRID_KEYS = ("name", "blocks", "include", "baselines")
BLOCK_KEYS = ("name", "kind", "axes", "zip", "when", "exclude", "set")
KINDS = ("train",)


@dataclass(frozen=True)
class When:
    """Axes that hold only for the cells that `where` matches."""

    where: dict[str, list[Any]]
    axes: dict[str, list[Any]]


@dataclass(frozen=True)
class Exclude:
    """Cells that are left out, and why."""

    where: dict[str, list[Any]]
    reason: str


@dataclass(frozen=True)
class Block:
    """One product of axes. `fixed` is what the command line set for the whole block."""

    name: str
    axes: dict[str, list[Any]] = field(default_factory=dict)
    zip: tuple[dict[str, list[Any]], ...] = ()
    when: tuple[When, ...] = ()
    exclude: tuple[Exclude, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)  # `set` in the file
    fixed: dict[str, Any] = field(default_factory=dict)

    def own_keys(self) -> set[str]:
        """The keys that the block varies or sets."""
        zipped = {key for group in self.zip for key in group}
        return {*self.axes, *zipped, *(key for w in self.when for key in w.axes), *self.settings}


@dataclass(frozen=True)
class Grid:
    name: str
    blocks: tuple[Block, ...]
    baselines: bool


def load_grid(space: ConfigSpace, name: str) -> Grid:
    """Read a grid and what it includes. Raises InputError with every fault of all the files."""
    faults: list[Fault] = []
    grid = _load(space, name, (), faults)
    if faults:
        raise InputError(faults)
    assert grid is not None
    return grid


def _load(space: ConfigSpace, name: str, trail: tuple[str, ...], faults: list[Fault]) -> Grid | None:
    if name in trail:
        faults.append(Fault(f"grid/{name}.yaml", f"includes itself: {' -> '.join((*trail, name))}"))
        return None
    try:
        raw = space.load("grid", name)
    except InputError as error:
        faults += error.faults
        return None
    at = f"grid/{name}.yaml"
    _known(raw, GRID_KEYS, at, faults)
    blocks: list[Block] = []
    declared = raw.get("blocks", [])
    if not isinstance(declared, list):
        faults.append(Fault(f"{at}: blocks", "a list of blocks is expected"))
        declared = []
    for i, node in enumerate(declared):
        block = _block(space, node, f"{at}: blocks[{i}]", i, faults)
        if block is not None:
            blocks.append(block)
    included = raw.get("include", [])
    if not isinstance(included, list) or not all(isinstance(entry, str) for entry in included):
        faults.append(Fault(f"{at}: include", "a list of grid names is expected"))
        included = []
    for other in included:
        grid = _load(space, other, (*trail, name), faults)
        blocks += grid.blocks if grid else ()
    baselines = raw.get("baselines", True)
    if not isinstance(baselines, bool):
        faults.append(Fault(f"{at}: baselines", f"true or false is expected, not {validate.show(baselines)}"))
    if not declared and not included:
        faults.append(Fault(at, "has neither blocks nor include"))
    return Grid(str(raw.get("name", name)), tuple(blocks), baselines is True)


def _block(space: ConfigSpace, node: Any, at: str, index: int, faults: list[Fault]) -> Block | None:
    if not isinstance(node, dict):
        faults.append(Fault(at, f"a mapping is expected, not {validate.show(node)}"))
        return None
    _known(node, BLOCK_KEYS, at, faults)
    kind = node.get("kind", "train")
    if kind not in KINDS:
        faults.append(Fault(f"{at}.kind", f"{validate.show(kind)} is not a kind of block", suggest(str(kind), KINDS)))
    axes = _axes(space, node.get("axes", {}), f"{at}.axes", faults)
    zipped = tuple(
        _zip(space, entry, f"{at}.zip[{i}]", faults) for i, entry in enumerate(_list(node, "zip", at, faults))
    )
    fixed = _mapping(node.get("set", {}), f"{at}.set", faults)
    settings = {k: _value(space, k, v, f"{at}.set.{k}", faults, axis=False) for k, v in fixed.items()}
    keys = [*axes, *(key for group in zipped for key in group)]
    for key in sorted({k for k in keys if keys.count(k) > 1} | (set(keys) & set(settings))):
        faults.append(Fault(f"{at}.{key}", "is given more than once in this block"))
    addressable = {*keys, *settings, *GROUPS}
    whens: list[When] = []
    for i, entry in enumerate(_list(node, "when", at, faults)):
        place = f"{at}.when[{i}]"
        entry = _mapping(entry, place, faults)
        _known(entry, ("where", "axes"), place, faults)
        where = _where(space, entry.get("where"), place, addressable, faults)
        own = _axes(space, entry.get("axes"), f"{place}.axes", faults)
        for key in set(own) & set(keys):
            faults.append(Fault(f"{place}.axes.{key}", "is an axis of the block already"))
        addressable |= set(own)
        whens.append(When(where, own))
    excludes: list[Exclude] = []
    for i, entry in enumerate(_list(node, "exclude", at, faults)):
        place = f"{at}.exclude[{i}]"
        entry = _mapping(entry, place, faults)
        _known(entry, ("where", "reason"), place, faults)
        reason = entry.get("reason")
        if not isinstance(reason, str) or not reason.strip():
            faults.append(Fault(f"{place}.reason", "is missing", "say why these cells are left out"))
        excludes.append(Exclude(_where(space, entry.get("where"), place, addressable, faults), str(reason)))
    return Block(str(node.get("name", f"block{index}")), axes, zipped, tuple(whens), tuple(excludes), settings)


def _axes(space: ConfigSpace, node: Any, at: str, faults: list[Fault]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for key, values in _mapping(node, at, faults).items():
        if not isinstance(values, list) or not values:
            faults.append(Fault(f"{at}.{key}", f"a list of values is expected, not {validate.show(values)}"))
            continue
        axes[key] = unique(_value(space, key, v, f"{at}.{key}", faults) for v in values)
    return axes


def _zip(space: ConfigSpace, node: Any, at: str, faults: list[Fault]) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {}
    for key, values in _mapping(node, at, faults).items():
        if not isinstance(values, list) or not values:
            faults.append(Fault(f"{at}.{key}", f"a list of values is expected, not {validate.show(values)}"))
            continue
        rows[key] = [_value(space, key, v, f"{at}.{key}", faults) for v in values]
    if len({len(values) for values in rows.values()}) > 1:
        lengths = ", ".join(f"{key}: {len(values)}" for key, values in rows.items())
        faults.append(Fault(at, f"keys that vary together need equally many values ({lengths})"))
        return {}
    return rows


def _where(
    space: ConfigSpace, node: Any, at: str, addressable: Iterable[str], faults: list[Fault]
) -> dict[str, list[Any]]:
    where: dict[str, list[Any]] = {}
    if not isinstance(node, dict) or not node:
        faults.append(Fault(f"{at}.where", "is missing", "name the cells, e.g. where: {method: dpo}"))
        return where
    for key, values in node.items():
        if key not in addressable:
            hint = suggest(str(key), addressable)
            faults.append(Fault(f"{at}.where.{key}", "is neither an axis nor a setting of this block", hint))
            continue
        listed = values if isinstance(values, list) else [values]
        where[key] = [_value(space, key, v, f"{at}.where.{key}", faults, axis=False) for v in listed]
    return where


def _value(space: ConfigSpace, key: str, v: Any, at: str, faults: list[Fault], *, axis: bool = True) -> Any:
    checked = check_value(space, str(key), v, at, faults)
    if axis and is_operational(key):
        faults.append(Fault(at, "is operational: it changes no result, so it cannot be an axis", "put it under set"))
    if str(key).partition(".")[0] in SWEEP_LEVEL:
        faults.append(Fault(at, "holds for a sweep as a whole", "give it on the command line"))
    return checked


def check_value(space: ConfigSpace, key: str, v: Any, at: str, faults: list[Fault]) -> Any:
    """The value of a group or setting in its type; adds a fault if there is no such key, option or value."""
    if key in GROUPS:
        options = space.options(key)
        if v in options:
            return v
        what = "the value is empty" if v in (None, "") else f"{key} has no option {validate.show(v)}"
        faults.append(Fault(at, what, suggest(str(v), options)))
        return v
    leaf = validate.leaves().get(key)
    if leaf is None:
        groups_and_leaves = [*validate.leaves(), *GROUPS, "grid"]
        what = "is a group of settings, not one" if key in ("hub",) or key in _nodes() else "no such key"
        faults.append(Fault(at, what, suggest(key, groups_and_leaves)))
        return v
    if isinstance(v, str) and "${" in v:
        return v  # checked when it is resolved
    return validate.check(v, leaf.type, leaf.rule, at, faults)


def is_operational(key: str) -> bool:
    """Whether a group or setting is no part of what makes a run."""
    if key in GROUPS:
        return key not in SCIENTIFIC_GROUPS
    leaf = validate.leaves().get(key)
    return leaf is not None and not leaf.scientific


def _nodes() -> set[str]:
    return {key.rpartition(".")[0] for key in validate.leaves() if "." in key}


def _known(node: Mapping[Any, Any], allowed: tuple[str, ...], at: str, faults: list[Fault]) -> None:
    for key in node:
        if key not in allowed:
            faults.append(Fault(f"{at}: {key}", "no such key", suggest(str(key), allowed)))


def _mapping(node: Any, at: str, faults: list[Fault]) -> dict[str, Any]:
    if isinstance(node, dict):
        return node
    faults.append(Fault(at, f"a mapping is expected, not {validate.show(node)}"))
    return {}


def _list(node: Mapping[str, Any], key: str, at: str, faults: list[Fault]) -> list[Any]:
    found = node.get(key, [])
    if isinstance(found, list):
        return found
    faults.append(Fault(f"{at}.{key}", f"a list is expected, not {validate.show(found)}"))
    return []


def unique(values: Iterable[Any]) -> list[Any]:
    """The values in order, each once; 1 and 1.0 and true are different."""
    return list({repr(v): v for v in values}.values())
