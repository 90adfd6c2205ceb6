"""The grid language: conf/grid/*.yaml read into blocks, with every fault reported before anything is expanded.

See docs/grids.md for the language. A key of a block is a group (`method: [sft, dpo]`), or a dotted setting
(`peft.r: [8, 16]`); both are checked against the options that exist and the schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.config import validate
from peft_align.config.compose import ConfigSpace, read_yaml
from peft_align.config.schema import GROUPS, SCIENTIFIC_GROUPS, SWEEP_LEVEL
from peft_align.errors import Fault, InputError, suggest
from peft_align.store.records import SEAL_LINE, sealed_text

GRID_KEYS = ("name", "blocks", "include", "baselines")
BLOCK_KEYS = ("name", "kind", "axes", "inputs", "zip", "when", "exclude", "set")
KINDS = ("train", "merge")
BLOCK_EXAMPLE = "e.g. blocks: [{name: one, axes: {seed: [0, 1]}}]"
Selector = dict[str, Any]  # of one input of a merge: what tells its training run from the block's others


@dataclass(frozen=True)
class When:
    """Axes and settings that hold only for the cells that `where` matches."""

    where: dict[str, list[Any]]
    axes: dict[str, list[Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # `set` in the file


@dataclass(frozen=True)
class Exclude:
    """Cells that are left out, and why."""

    where: dict[str, list[Any]]
    reason: str


@dataclass(frozen=True)
class Block:
    """One product of axes.

    Attributes:
        inputs: of a merge block: each entry is one merge, a selector for each of its inputs.
        settings: `set` in the file.
        fixed: what the command line set for the whole block.
        selected: values that a selection chose, where nothing else gives one.
    """

    name: str
    kind: str = "train"
    axes: dict[str, list[Any]] = field(default_factory=dict)
    zip: tuple[dict[str, list[Any]], ...] = ()
    when: tuple[When, ...] = ()
    exclude: tuple[Exclude, ...] = ()
    inputs: tuple[tuple[Selector, ...], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    selected: tuple[When, ...] = ()

    def own_keys(self) -> set[str]:
        """The keys that the block varies or sets."""
        zipped = {key for group in self.zip for key in group}
        conditional = {key for w in self.when for key in (*w.axes, *w.settings)}
        return {*self.axes, *zipped, *conditional, *self.settings, *self.selector_keys()}

    def selector_keys(self) -> set[str]:
        """The keys by which the inputs of a merge are chosen."""
        return {key for entry in self.inputs for selector in entry for key in selector}


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
        what = f"includes itself: {' -> '.join((*trail, name))}"
        faults.append(Fault(f"grid/{name}.yaml", what, "leave one of them out"))
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
        what = f"a list of blocks is expected, not {validate.show(declared)}"
        faults.append(Fault(f"{at}: blocks", what, BLOCK_EXAMPLE))
    for i, node in enumerate(declared if isinstance(declared, list) else ()):
        block = _block(space, node, f"{at}: blocks[{i}]", i, faults)
        if block is not None:
            blocks.append(block)
    included = raw.get("include", [])
    if not isinstance(included, list) or not all(isinstance(entry, str) for entry in included):
        what = f"a list of grid names is expected, not {validate.show(included)}"
        faults.append(Fault(f"{at}: include", what, "e.g. include: [main]"))
    for other in included if isinstance(included, list) else ():
        if not isinstance(other, str):
            continue
        if other not in space.options("grid"):
            hint = suggest(other, [option for option in space.options("grid") if option != name])
            faults.append(Fault(f"{at}: include: {other}", "no such option", hint))
            continue
        grid = _load(space, other, (*trail, name), faults)
        blocks += grid.blocks if grid else ()
    baselines = raw.get("baselines", True)
    if not isinstance(baselines, bool):
        faults.append(Fault(f"{at}: baselines", f"true or false is expected, not {validate.show(baselines)}"))
    if not raw.keys() & {"blocks", "include"} or (declared == [] and included == []):
        faults.append(Fault(at, "has neither blocks nor include", BLOCK_EXAMPLE))
    return Grid(_name(raw, name, f"{at}: name", faults), tuple(blocks), baselines is True)


def _name(node: Mapping[str, Any], default: str, at: str, faults: list[Fault]) -> str:
    name = node.get("name", default)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        faults.append(Fault(at, f"a text is expected, not {validate.show(name)}", f"e.g. name: {default}"))
    return str(name)


def _block(space: ConfigSpace, node: Any, at: str, index: int, faults: list[Fault]) -> Block | None:
    if not isinstance(node, dict):
        faults.append(Fault(at, f"a mapping is expected, not {validate.show(node)}", BLOCK_EXAMPLE))
        return None
    _known(node, BLOCK_KEYS, at, faults)
    kind = node.get("kind", "train")
    if kind not in KINDS:
        faults.append(Fault(f"{at}.kind", f"{validate.show(kind)} is not a kind of block", suggest(str(kind), KINDS)))
    axes = _axes(space, node.get("axes", {}), f"{at}.axes", faults)
    zipped = tuple(
        _zip(space, entry, f"{at}.zip[{i}]", faults) for i, entry in enumerate(_list(node, "zip", at, faults))
    )
    settings = _settings(space, node.get("set", {}), f"{at}.set", faults)
    keys = [*axes, *(key for group in zipped for key in group)]
    for key in sorted({k for k in keys if keys.count(k) > 1} | (set(keys) & set(settings))):
        faults.append(Fault(f"{at}.{key}", "is given more than once in this block", "keep one"))
    inputs = _inputs(space, node, kind, [*keys, *settings], at, faults)
    selectors = {key for entry in inputs for selector in entry for key in selector}
    addressable = {*keys, *settings, *GROUPS, *selectors}
    whens: list[When] = []
    for i, entry in enumerate(_list(node, "when", at, faults)):
        when = _when(space, entry, f"{at}.when[{i}]", addressable, faults)
        for key in sorted({*when.axes, *when.settings} & set(keys)):
            faults.append(Fault(f"{at}.when[{i}].{key}", "is an axis of the block already", "keep one of the two"))
        if selectors & set(when.where):
            told = "it holds for some inputs of a merge only"
            if when.axes:
                hint = "use set, or name the inputs one by one"
                faults.append(Fault(f"{at}.when[{i}].axes", f"cannot be: {told}", hint))
            for key in [key for key in when.settings if key.partition(".")[0] == "merge"]:
                faults.append(Fault(f"{at}.when[{i}].set.{key}", f"belongs to the merge as a whole, but {told}"))
        addressable |= {*when.axes, *when.settings}
        whens.append(when)
    merging = {key for key in addressable - set(GROUPS) | {*keys, *settings} if key.partition(".")[0] == "merge"}
    if kind == "merge" and "merge" not in merging:
        faults.append(Fault(f"{at}.axes.merge", "is missing", "say how to merge, e.g. merge: [slerp, dare_ties]"))
    for key in sorted(merging) if kind == "train" else ():
        faults.append(Fault(f"{at}.{key}", "belongs to a block of merges", "add kind: merge, and inputs"))
    excludes: list[Exclude] = []
    for i, entry in enumerate(_list(node, "exclude", at, faults)):
        place = f"{at}.exclude[{i}]"
        entry = _mapping(entry, place, faults)
        _known(entry, ("where", "reason"), place, faults)
        reason = entry.get("reason")
        if not isinstance(reason, str) or not reason.strip():
            faults.append(Fault(f"{place}.reason", "is missing", "say why these cells are left out"))
        where = _where(space, entry.get("where"), place, addressable - (selectors - {*keys, *settings}), faults)
        excludes.append(Exclude(where, str(reason)))
    name = _name(node, f"block{index}", f"{at}.name", faults)
    return Block(name, str(kind), axes, zipped, tuple(whens), tuple(excludes), inputs, settings)


def _inputs(
    space: ConfigSpace, node: Mapping[str, Any], kind: Any, taken: Sequence[str], at: str, faults: list[Fault]
) -> tuple[tuple[Selector, ...], ...]:
    """The selectors of a merge block's inputs."""
    if kind != "merge":
        if "inputs" in node:
            faults.append(Fault(f"{at}.inputs", "belongs to a block of merges", "add kind: merge"))
        return ()
    example = "e.g. - [{preference: harmless}, {preference: helpful}]"
    entries: list[tuple[Selector, ...]] = []
    for i, entry in enumerate(_list(node, "inputs", at, faults)):
        place = f"{at}.inputs[{i}]"
        if not isinstance(entry, list) or len(entry) < 2:
            faults.append(Fault(place, "a list of two or more selectors is expected", example))
            continue
        selectors = [_settings(space, each, f"{place}[{j}]", faults) for j, each in enumerate(entry)]
        for key in sorted({key for selector in selectors for key in selector}):
            if key in taken:
                faults.append(
                    Fault(f"{place}.{key}", "is an axis or a setting of the block already", "keep one of the two")
                )
            head = key.partition(".")[0]
            if head == "merge" or (is_operational(key) and head not in SWEEP_LEVEL):
                what, hint = "tells no training run from another", "name what the inputs differ in"
                faults.append(Fault(f"{place}.{key}", what, hint))
        if any(selector in selectors[:j] for j, selector in enumerate(selectors)):
            faults.append(Fault(place, "names one input twice", "name two or more that differ"))
        entries.append(tuple(selectors))
    if not node.get("inputs"):
        faults.append(Fault(f"{at}.inputs", "is missing", example))
    return tuple(entries)


def _when(space: ConfigSpace, node: Any, at: str, addressable: Iterable[str], faults: list[Fault]) -> When:
    entry = _mapping(node, at, faults)
    _known(entry, ("where", "axes", "set"), at, faults)
    where = _where(space, entry.get("where"), at, addressable, faults)
    if not {"axes", "set"} & set(entry):
        faults.append(Fault(at, "has neither axes nor set", "say what holds there, e.g. axes: {peft.r: [8, 16]}"))
    axes = _axes(space, entry.get("axes", {}), f"{at}.axes", faults)
    settings = _settings(space, entry.get("set", {}), f"{at}.set", faults)
    for key in sorted(set(axes) & set(settings)):
        faults.append(Fault(f"{at}.{key}", "is given more than once here", "keep one"))
    return When(where, axes, settings)


def load_selection(space: ConfigSpace, path: Path) -> tuple[When, ...]:
    """The `when` list of a file that peft_align.select wrote. Raises InputError with every fault of it."""
    node = read_yaml(path)
    text, seal, _ = path.read_text(encoding="utf-8").rpartition(SEAL_LINE)
    if seal and path.read_text(encoding="utf-8") != sealed_text(text):
        hint = "make it again with peft_align.select; if you edited it, delete its last line"
        raise InputError([Fault(str(path), "is not as it was written", hint)])
    faults: list[Fault] = []
    _known(node, ("selected_by", "when", "table"), str(path), faults)
    addressable = [*validate.leaves(), *GROUPS]
    whens = [
        _when(space, entry, f"{path}: when[{i}]", addressable, faults)
        for i, entry in enumerate(_list(node, "when", str(path), faults))
    ]
    for i, when in enumerate(whens):
        for key in when.settings:
            if key.partition(".")[0] in SWEEP_LEVEL:
                continue  # told already
            if key not in GROUPS and not key.startswith("merge.") and not is_operational(key):
                continue
            faults.append(Fault(f"{path}: when[{i}].set.{key}", "is no setting of a training run"))
    if any(when.axes for when in whens):
        faults.append(Fault(f"{path}: when", "a selection sets values, it has no axes", "write set: instead of axes:"))
    if not whens and not faults:
        faults.append(Fault(f"{path}: when", "is empty", "make the file with python -m peft_align.select"))
    if faults:
        raise InputError(faults)
    return tuple(whens)


def _settings(space: ConfigSpace, node: Any, at: str, faults: list[Fault]) -> dict[str, Any]:
    given = _mapping(node, at, faults)
    return {key: _value(space, key, v, f"{at}.{key}", faults, axis=False) for key, v in given.items()}


def _axes(space: ConfigSpace, node: Any, at: str, faults: list[Fault]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for key, values in _mapping(node, at, faults).items():
        if not isinstance(values, list) or not values:
            faults.append(_no_values(f"{at}.{key}", values))
            continue
        axes[key] = unique(_value(space, key, v, f"{at}.{key}", faults) for v in values)
    return axes


def _no_values(at: str, given: Any) -> Fault:
    single = given is not None and not isinstance(given, (list, dict))
    hint = f"write [{given}]" if single else "write [VALUE, ...]"
    return Fault(at, f"a list of values is expected, not {validate.show(given)}", hint)


def _zip(space: ConfigSpace, node: Any, at: str, faults: list[Fault]) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {}
    for key, values in _mapping(node, at, faults).items():
        if not isinstance(values, list) or not values:
            faults.append(_no_values(f"{at}.{key}", values))
            continue
        rows[key] = [_value(space, key, v, f"{at}.{key}", faults) for v in values]
    if len({len(values) for values in rows.values()}) > 1:
        lengths = ", ".join(f"{key}: {len(values)}" for key, values in rows.items())
        what = f"keys that vary together need equally many values ({lengths})"
        faults.append(Fault(at, what, "give each as many as the others"))
        return {}
    return rows


def _where(
    space: ConfigSpace, node: Any, at: str, addressable: Iterable[str], faults: list[Fault]
) -> dict[str, list[Any]]:
    where: dict[str, list[Any]] = {}
    if not isinstance(node, dict) or not node:
        faults.append(Fault(f"{at}.where", "is missing", "name the cells, e.g. where: {method: dpo}"))
        return where
    for key, values in _mapping(node, at, faults).items():
        if key not in addressable:
            known = key in validate.leaves()
            hint = "add it to axes or set of the block" if known else suggest(key, addressable)
            faults.append(Fault(f"{at}.where.{key}", "is neither an axis nor a setting of this block", hint))
            continue
        listed = values if isinstance(values, list) else [values]
        where[key] = [_value(space, key, v, f"{at}.where.{key}", faults, axis=False) for v in listed]
    return where


def _value(space: ConfigSpace, key: str, v: Any, at: str, faults: list[Fault], *, axis: bool = True) -> Any:
    if key.partition(".")[0] in SWEEP_LEVEL:
        faults.append(Fault(at, "holds for a sweep as a whole", "give it on the command line"))
        return v
    checked = check_value(space, key, v, at, faults)
    if axis and is_operational(key):
        faults.append(Fault(at, "is operational: it changes no result, so it cannot be an axis", "put it under set"))
    return checked


def check_value(space: ConfigSpace, key: str, v: Any, at: str, faults: list[Fault]) -> Any:
    """The value of a group or setting in its type; adds a fault if there is no such key, option or value."""
    if key in GROUPS:
        options = space.options(key)
        if isinstance(v, str) and v in options:
            return v
        what = "the value is empty" if v in (None, "") else f"{key} has no option {validate.show(v)}"
        own = [f"{key}.{name}" for name in v] if isinstance(v, dict) else []
        hint = f"write settings with dots: {own[0]}" if own else space.hint(key, str(v))
        faults.append(Fault(at, what, hint))
        return v
    leaf = validate.leaves().get(key)
    if leaf is None:
        own = [name for name in validate.leaves() if name.startswith(f"{key}.")]
        if own:
            faults.append(Fault(at, "is a group of settings, not one", f"its settings: {', '.join(own)}"))
        else:
            faults.append(Fault(at, "no such key", suggest(key, [*validate.leaves(), *GROUPS, "grid"])))
        return v
    group, _, name = key.partition(".")
    if name == "kind":
        options = space.options(group)
        hint = f"choose an option that is: {group}={v}" if v in options else suggest(str(v), options)
        faults.append(Fault(at, f"what kind it is belongs to an option of {group}", hint))
        return v
    if any(isinstance(part, str) and "${" in part for part in (v if isinstance(v, list) else [v])):
        return v  # checked when it is resolved
    return validate.check(v, leaf.type, leaf.rule, at, faults)


def is_operational(key: str) -> bool:
    """Whether a group or setting is no part of what makes a run."""
    if key in GROUPS:
        return key not in SCIENTIFIC_GROUPS
    leaf = validate.leaves().get(key)
    return leaf is not None and not leaf.scientific


def _known(node: Mapping[Any, Any], allowed: tuple[str, ...], at: str, faults: list[Fault]) -> None:
    for key in node:
        if key not in allowed:
            faults.append(Fault(f"{at}: {key}", "no such key", suggest(str(key), allowed)))


def _mapping(node: Any, at: str, faults: list[Fault]) -> dict[str, Any]:
    if isinstance(node, dict):
        return {str(key): value for key, value in node.items()}
    faults.append(Fault(at, f"a mapping is expected, not {validate.show(node)}", "write {KEY: VALUE}"))
    return {}


def _list(node: Mapping[str, Any], key: str, at: str, faults: list[Fault]) -> list[Any]:
    found = node.get(key, [])
    if isinstance(found, list):
        return found
    hint = f"write {key}: [...], or lines that begin with '- '"
    faults.append(Fault(f"{at}.{key}", f"a list is expected, not {validate.show(found)}", hint))
    return []


def unique(values: Iterable[Any]) -> list[Any]:
    """The values in order, each once; 1 and 1.0 and true are different."""
    return list({repr(v): v for v in values}.values())
