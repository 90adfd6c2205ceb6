"""Blocks into cells, and what overrides do to them, block by block.

A key that a block varies or sets keeps the cells with the given values; a block left empty is dropped. If no block has
such a value, the given values take the place of the key's in every block that has it. In a block without the key it is
a constant, or a new axis if several values are given. Order: command line > when > set > the option's default.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_align.config import validate
from peft_align.config.command_line import Override
from peft_align.config.compose import ConfigSpace
from peft_align.config.schema import GROUPS
from peft_align.errors import Fault, InputError
from peft_align.grid.language import Block, Selector, When, check_value, is_operational, unique

MAX_CELLS = 1_000_000
SHOWN = 8  # blocks, and values of a key, in a message


@dataclass(frozen=True)
class Cell:
    """One combination of values.

    Attributes:
        block: its block.
        values: what the block and the command line assign: groups and dotted settings.
        axes: the keys among them that vary.
        outer: the values without those of `when`: where the search for a parent's values starts.
        inputs: of a merge: the selector of each input.
        selected: the keys of `values` that a selection chose.
        allowed: what the command line narrowed keys of the block to.
    """

    block: Block
    values: dict[str, Any]
    axes: tuple[str, ...]
    outer: dict[str, Any]
    inputs: tuple[Selector, ...] = ()
    selected: frozenset[str] = frozenset()
    allowed: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Excluded:
    """A cell left out, with the reason given."""

    values: dict[str, Any]
    reason: str


def applies(space: ConfigSpace, key: str, values: Mapping[str, Any]) -> bool:
    """Whether the option chosen in `values` has the setting at all (`method.beta` is DPO's)."""
    leaf = validate.leaves().get(key)
    if leaf is None or leaf.kinds is None:
        return True
    group = key.partition(".")[0]
    return space.node(group, values.get(group, space.defaults[group])).get("kind") in leaf.kinds


def matches(space: ConfigSpace, where: Mapping[str, list[Any]], values: Mapping[str, Any]) -> bool:
    """Whether a cell has one of the asked values for each key; what it does not say is as its options have it."""
    return all(space.value(values, key) in allowed for key, allowed in where.items())


def expand_block(space: ConfigSpace, block: Block) -> Iterator[Cell]:
    """All cells of a block, excluded ones too, in the order of the axes; of a merge block, entry by entry."""
    for part in [replace(block, inputs=(entry,)) for entry in block.inputs] or [block]:
        yield from _expand(space, part)


def _expand(space: ConfigSpace, block: Block) -> Iterator[Cell]:
    (inputs,) = block.inputs or ((),)
    rows: list[list[dict[str, Any]]] = [[{key: v} for v in values] for key, values in block.axes.items()]
    for group in block.zip:
        length = len(next(iter(group.values()), []))
        rows.append([{key: values[i] for key, values in group.items()} for i in range(length)])
    for combination in itertools.product(*rows):
        varied = {key: v for part in combination for key, v in part.items()}
        outer = {**block.settings, **varied, **block.fixed}
        conditional = {key for when in block.when for key in when.axes}
        for inner in when_values(space, block, outer):
            values = complete(space, block, outer, inner)
            variants = [{**values, **selector} for selector in inputs] or [values]
            kept = {k: v for k, v in values.items() if any(applies(space, k, variant) for variant in variants)}
            keys = (key for key in (*varied, *inner) if key in kept and key not in block.fixed)
            axes = tuple(key for key in keys if key in varied or key in conditional)
            yield Cell(block, kept, axes, outer, inputs, frozenset(values) - {*outer, *inner, *block.fixed})


def when_values(space: ConfigSpace, block: Block, outer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The combinations of the `when` axes that hold for a cell; one empty combination if none does."""
    combinations: list[dict[str, Any]] = [{}]
    for when in block.when:
        extended: list[dict[str, Any]] = []
        for inner in combinations:
            if _holds(space, block, when.where, {**outer, **inner}):
                picks = itertools.product(*when.axes.values())
                extended += [
                    {**inner, **when.settings, **dict(zip(when.axes, picked, strict=True))} for picked in picks
                ]
            else:
                extended.append(inner)
        combinations = extended
    yield from combinations


def complete(space: ConfigSpace, block: Block, outer: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """All values of one combination: what was selected, where the block and the command line give none."""
    values = {**outer, **inner, **block.fixed}
    chosen = {k: v for w in block.selected if _holds(space, block, w.where, values) for k, v in w.settings.items()}
    return {**chosen, **values}


def input_cell(space: ConfigSpace, cell: Cell, selector: Selector) -> Cell:
    """The training run that is one input of a merge: the merge's values, the selector's, and what `when` says of it."""
    outer = cell.outer | {k: v for k, v in cell.values.items() if k not in cell.selected} | selector
    outer = {k: v for k, v in outer.items() if k.partition(".")[0] != "merge"}
    values = dict(outer)
    for when in cell.block.when:
        if set(when.where) & cell.block.selector_keys() and matches(space, when.where, values):
            values |= {k: v for k, v in when.settings.items() if k not in cell.block.fixed}
    given = frozenset(values)
    values = complete(space, replace(cell.block, when=(), fixed={}), values, {})
    selected = frozenset(values) - given
    values = {k: v for k, v in values.items() if applies(space, k, values)}
    block = replace(cell.block, inputs=(), fixed=cell.block.fixed | selector)
    return Cell(block, values, (), outer, (), selected, cell.allowed)


def takes_selected(space: ConfigSpace, cell: Cell) -> bool:
    """Whether a selection gives a value to the cell, or to an input of its merge."""
    return bool(cell.selected) or any(input_cell(space, cell, selector).selected for selector in cell.inputs)


def _holds(space: ConfigSpace, block: Block, where: Mapping[str, list[Any]], values: Mapping[str, Any]) -> bool:
    """`matches`; what tells a merge's inputs apart is no value of the merge itself."""
    return matches(space, where, values) and not (block.selector_keys() - set(values)) & set(where)


def size(block: Block) -> int:
    """An upper bound of the number of cells, without making them."""
    total = 1
    for values in block.axes.values():
        total *= len(values)
    for group in block.zip:
        total *= len(next(iter(group.values()), [1]))
    for when in block.when:
        for values in when.axes.values():
            total *= len(values)
    return total * max(1, len(block.inputs))


def narrow(
    space: ConfigSpace, blocks: Sequence[Block], overrides: Sequence[Override]
) -> tuple[list[Cell], list[Excluded], list[str]]:
    """Expand the blocks under the overrides.

    Returns:
        The cells, the excluded ones with their reasons, and a line for what each override did to each block.

    Raises:
        InputError: an override's key or value does not exist, an exclude matches nothing, the grid is too large,
            or nothing is left of it.
    """
    faults: list[Fault] = []
    checked = check_overrides(space, overrides, faults)
    space.prefetch(_options(blocks, checked)) if not faults else None
    if faults:
        raise InputError(faults)
    edited, notes = list(blocks), []
    dropped: set[int] = set()
    filters: list[tuple[Override, list[Any]]] = []
    for override, values in checked:
        if not any(takes(block, override.key) for block in blocks) and values != ["none"]:
            what = "a merge needs inputs, which a grid names in a block with kind: merge"
            faults.append(Fault(override.text, what, "e.g. +grid=merge; see docs/grids.md"))
        owners = [block for block in blocks if override.key in block.own_keys()]
        known = any(v in _all_values(block, override.key) for block in owners for v in values)
        known = known and not is_operational(override.key)  # what makes no other run leaves none out
        if owners and known:
            filters.append((override, values))
        for i, block in enumerate(edited):
            if (override.key in block.own_keys() and known) or not takes(block, override.key):
                continue
            if override.key in block.selector_keys():
                dropped.add(i)
                notes.append(f"{override.text}: block {block.name}: dropped, its inputs have other values")
                continue
            edited[i] = _assign(block, override.key, values)
            had = override.key in block.own_keys()
            what = "replaces its values" if had else ("a new axis" if len(values) > 1 else "set for all its runs")
            notes.append(f"{override.text}: block {block.name}: {what}")
    if sum(map(size, edited)) > MAX_CELLS:
        total = sum(map(size, edited))
        raise InputError([Fault("grid", f"{total} cells are too many", f"at most {MAX_CELLS}; narrow an axis")])
    cells: list[Cell] = []
    excluded: list[Excluded] = []
    for i, (block, original) in enumerate(zip(edited, blocks, strict=True)):
        if i in dropped:
            continue
        kept = list(expand_block(space, block))
        _check_excludes(space, original, kept if block is original else expand_block(space, original), faults)
        for override, values in filters:
            if override.key not in original.own_keys():
                continue
            before = len(kept)
            kept = [new for cell in kept for new in _filter(space, cell, override.key, values)]
            notes.append(f"{override.text}: block {block.name}: {len(kept)} of {before} cells kept")
        if block.selected:
            reached = sum(takes_selected(space, cell) for cell in kept)
            notes.append(f"+selected: block {block.name}: {reached} of {len(kept)} cells take values from it")
        for cell in kept:
            reason = next((e.reason for e in block.exclude if matches(space, e.where, cell.values)), None)
            if reason is None:
                cells.append(cell)
            else:
                excluded.append(Excluded(cell.values, reason))
    _check_reached(space, checked, cells, faults)
    if cells and any(block.selected for block in blocks) and not any(takes_selected(space, cell) for cell in cells):
        hint = "its where lists match no run, or the grid and the command line set all of it"
        faults.append(Fault("+selected", "no run takes a value from it", hint))
    if not faults and not cells:
        faults.append(
            Fault(" ".join(o.text for o in overrides) or "grid", "no run is left", _left_over(blocks, excluded))
        )
    if faults:
        raise InputError(faults)
    return cells, excluded, notes


def _left_over(blocks: Sequence[Block], excluded: Sequence[Excluded]) -> str:
    """Why nothing is left of blocks."""
    if excluded:
        return f"excluded: {'; '.join(dict.fromkeys(each.reason for each in excluded))}"
    return "no cell has all of these; " + "; ".join(f"block {block.name} has {_has(block)}" for block in blocks[:SHOWN])


def _has(block: Block) -> str:
    """The keys of a block with their values, for people."""
    keys = [*block.axes, *(key for group in block.zip for key in group), *block.settings]
    shown = [f"{key}: {', '.join(map(str, unique(_all_values(block, key))[:SHOWN]))}" for key in keys]
    return "; ".join(shown) or "no axes"


def takes(block: Block, key: str) -> bool:
    """Whether a block's runs can have a setting: how to merge is for merges alone."""
    return block.kind == "merge" or key.partition(".")[0] != "merge"


def _assign(block: Block, key: str, values: list[Any]) -> Block:
    """The block with `key` set to the values, wherever it stood before."""
    base = replace(
        block,
        axes={k: v for k, v in block.axes.items() if k != key},
        zip=tuple(group for z in block.zip if (group := {k: v for k, v in z.items() if k != key})),
        when=tuple(w for each in block.when if (w := _without(each, key)).axes or w.settings),
        settings={k: v for k, v in block.settings.items() if k != key},
    )
    if len(values) == 1:
        return replace(base, fixed={**base.fixed, key: values[0]})
    return replace(base, axes={**base.axes, key: unique(values)})


def _without(when: When, key: str) -> When:
    axes = {k: v for k, v in when.axes.items() if k != key}
    return When(when.where, axes, {k: v for k, v in when.settings.items() if k != key})


def _asked_of_inputs(cell: Cell) -> set[str]:
    """The keys that a merge's inputs may differ in, and the groups of which the merge itself says nothing."""
    selectors = cell.block.selector_keys()
    told_apart = {key for w in cell.block.when if set(w.where) & selectors for key in w.settings}
    return selectors | told_apart | (set(GROUPS) - {"merge"} - set(cell.values))


def _filter(space: ConfigSpace, cell: Cell, key: str, values: list[Any]) -> list[Cell]:
    if cell.inputs and key in _asked_of_inputs(cell):
        of_inputs = [input_cell(space, cell, selector).values for selector in cell.inputs]
        having = [each for each in of_inputs if applies(space, key, each)]
        return [cell] if all(space.value(each, key) in values for each in having) else []
    if key in cell.values and key not in cell.selected:
        narrowed = {**cell.allowed, key: values}
        return [replace(cell, allowed=narrowed)] if cell.values[key] in values else []
    if not applies(space, key, cell.values):
        return [cell]
    # The key belongs to a `when` that does not hold for this cell: for it, the values are new.
    axes = (*cell.axes, key) if len(values) > 1 else cell.axes
    return [replace(cell, values={**cell.values, key: v}, outer={**cell.outer, key: v}, axes=axes) for v in values]


def _all_values(block: Block, key: str) -> list[Any]:
    found = [*block.axes.get(key, []), *([block.settings[key]] if key in block.settings else [])]
    for group in block.zip:
        found += group.get(key, [])
    for when in block.when:
        found += [*when.axes.get(key, []), *([when.settings[key]] if key in when.settings else [])]
    return found + [selector[key] for entry in block.inputs for selector in entry if key in selector]


def _options(blocks: Sequence[Block], checked: Sequence[tuple[Override, list[Any]]]) -> Iterable[tuple[str, str]]:
    """The options that the blocks and overrides name, to be composed together."""
    for override, values in checked:
        if override.key in GROUPS:
            yield from ((override.key, v) for v in values)
    narrowed = {override.key for override, _ in checked}
    for block in blocks:
        for group in set(GROUPS) - narrowed:
            yield from ((group, v) for v in _all_values(block, group))


def check_overrides(
    space: ConfigSpace, overrides: Sequence[Override], faults: list[Fault]
) -> list[tuple[Override, list[Any]]]:
    """The overrides with their values in their types; what is wrong with them is added to `faults`."""
    checked: list[tuple[Override, list[Any]]] = []
    for o in overrides:
        leaf = validate.leaves().get(o.key)
        listed = ",".join(map(str, o.values))
        if o.is_axis and leaf and "list" in str(leaf.type) and not any(isinstance(v, list) for v in o.values):
            faults.append(Fault(o.text, "a list stands in brackets", f"write {o.key}=[{listed}]"))
        elif o.is_axis and is_operational(o.key):
            what = "is operational: it changes no result, so it cannot be an axis"
            faults.append(Fault(o.text, what, "give one value"))
        else:
            checked.append((o, [check_value(space, o.key, v, o.text, faults) for v in o.values]))
    return checked


def _applies_to(space: ConfigSpace, key: str, cell: Cell) -> bool:
    """Whether a run of the cell has the setting, or an input of its merge."""
    return any(applies(space, key, {**cell.values, **selector}) for selector in (*cell.inputs, {}))


def _check_excludes(space: ConfigSpace, block: Block, cells: Iterable[Cell], faults: list[Fault]) -> None:
    unmatched = dict(enumerate(block.exclude))
    for cell in cells if unmatched else ():
        for i in [i for i, e in unmatched.items() if matches(space, e.where, cell.values)]:
            del unmatched[i]
    for exclude in unmatched.values():
        what = "matches no cell of the block"
        faults.append(Fault(f"block {block.name}: exclude {exclude.where}", what, f"it has {_has(block)}"))


def _check_reached(
    space: ConfigSpace, checked: Sequence[tuple[Override, list[Any]]], cells: Sequence[Cell], faults: list[Fault]
) -> None:
    """A setting that only some kinds have must reach at least one run."""
    for override, _ in checked:
        leaf = validate.leaves().get(override.key)
        if leaf is None or leaf.kinds is None or not any(takes(cell.block, override.key) for cell in cells):
            continue
        if not any(_applies_to(space, override.key, cell) for cell in cells):
            group = override.key.partition(".")[0]
            kinds = sorted(leaf.kinds)
            what = f"no run of this sweep has it: it belongs to {group} {' or '.join(kinds)}"
            faults.append(Fault(override.text, what, f"leave it out, or add {group}={kinds[0]}"))
