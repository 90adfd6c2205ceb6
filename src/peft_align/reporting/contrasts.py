"""Contrasts: which cells are set against which, as YAML declares it (conf/report/), and their paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.config import validate
from peft_align.config.compose import ConfigSpace, read_yaml
from peft_align.config.schema import GROUPS
from peft_align.errors import Fault, InputError, suggest
from peft_align.grid.language import check_value
from peft_align.reporting.cells import FAMILY, MERGED, TUNED, Measure, Results, Value
from peft_align.reporting.frame import in_table

Where = dict[str, list[Any]]
PARENTS, BEST_PARENT, BASELINE = "parents", "best_parent", "baseline"
SPECIAL = (PARENTS, BEST_PARENT, BASELINE)
EXPECTED = ("better", "worse", "alike", "not_worse", "not_better")
WITH_MARGIN = EXPECTED[2:]
STEPS = ("first", "last")
RUN_KINDS = ("train", "merge")
MODERATORS = ("more_with", "than_with")
KEYS = ("cells", "against", "where", "benchmarks", "each", *MODERATORS, "expect", "margin")


@dataclass(frozen=True)
class Contrast:
    """Cells against cells that are equal in all other axes, the seed included.

    Attributes:
        name: of the comparison, or of the claim that it is a part of.
        cells, against: what tells the two sides apart; `against` may be a merge's inputs (their mean, or the best of
            them), or the unaligned base.
        where: what holds for both.
        benchmarks: each with a metric or None for its main one; empty: all.
        each: axes whose values are looked at one by one; over all others, the effect is the mean.
        more_with, than_with: the effect's difference between these is what is looked at.
        expect: one of EXPECTED, of `cells`; None: the difference is told.
        margin: by benchmark: how far apart still passes for alike.
    """

    name: str
    cells: Where
    against: Where | str
    where: Where = field(default_factory=dict)
    benchmarks: tuple[tuple[str, str | None], ...] = ()
    each: tuple[str, ...] = ()
    more_with: Where = field(default_factory=dict)
    than_with: Where = field(default_factory=dict)
    expect: str | None = None
    margin: Mapping[str, float] = field(default_factory=dict)

    def named(self) -> set[str]:
        """The settings that it names."""
        against = {} if isinstance(self.against, str) else self.against
        return {*self.cells, *against, *self.where, *self.more_with, *self.than_with, *self.each}

    def __str__(self) -> str:
        text = f"{_words(self.cells)} against {_other(self.cells, self.against)}"
        if self.more_with:
            text += f", more with {_words(self.more_with)} than with {_other(self.more_with, self.than_with)}"
        return text + (f" where {_words(self.where)}" if self.where else "")


def _words(where: Where) -> str:
    return " ".join(f"{key}={','.join(map(_word, values))}" for key, values in where.items())


def _other(where: Where, other: Where | str) -> str:
    """The other side; of one and the same axis its values alone."""
    if isinstance(other, str):
        return other
    return ",".join(map(_word, *other.values())) if len(other) == 1 and other.keys() == where.keys() else _words(other)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_mapping(node: Any, at: str, keys: Sequence[str], faults: list[Fault]) -> bool:
    """Whether a part of a file is a mapping; if not, or if it has other keys, that is added to `faults`."""
    if not isinstance(node, dict):
        faults.append(Fault(at, f"a mapping is expected, not {validate.show(node)}"))
        return False
    faults += [Fault(f"{at}.{key}", "no such key", suggest(str(key), keys)) for key in node if key not in keys]
    return True


def parse(
    space: ConfigSpace, name: str, node: Any, at: str, sides: Mapping[str, list[str]], faults: list[Fault]
) -> Contrast | None:
    """One contrast of a file; what is wrong with it is added to `faults`."""
    before = len(faults)
    if not is_mapping(node, at, KEYS, faults):
        return None
    chosen = {key: _where(space, node[key], f"{at}.{key}", faults) for key in ("cells", "where") if key in node}
    moderators = {key: _where(space, node[key], f"{at}.{key}", faults) for key in MODERATORS if key in node}
    if "cells" not in node:
        faults.append(Fault(f"{at}.cells", "is missing", "say which cells, e.g. cells: {method: dpo}"))
    if len(moderators) == 1:
        (lacking,) = set(MODERATORS) - set(moderators)
        faults.append(Fault(f"{at}.{lacking}", "is missing", "more_with and than_with belong together"))
    against: Where | str = {}
    if isinstance(given := node.get("against"), str):
        against = given
        if given not in SPECIAL:
            faults.append(Fault(f"{at}.against", f"'{given}' is no side", suggest(given, SPECIAL)))
    elif given is None:
        faults.append(Fault(f"{at}.against", "is missing", f"name the other cells, or one of {', '.join(SPECIAL)}"))
    else:
        against = _where(space, given, f"{at}.against", faults)
        if "cells" in chosen and against == chosen["cells"] and against:
            faults.append(Fault(f"{at}.against", "is the same as cells"))
    expect, margin = node.get("expect"), node.get("margin", {})
    if expect is not None and expect not in EXPECTED:
        faults.append(Fault(f"{at}.expect", f"{validate.show(expect)} cannot be", suggest(str(expect), EXPECTED)))
    benchmarks = _benchmarks(space, node.get("benchmarks", []), f"{at}.benchmarks", sides, faults)
    _check_margin(expect, margin, benchmarks, at, faults)
    each = node.get("each", [])
    for key in each if isinstance(each, list) else [each]:
        _check_key(space, key, f"{at}.each", faults)
    if len(faults) > before:
        return None
    where, each = chosen.get("where", {}), tuple(each if isinstance(each, list) else [each])
    return Contrast(name, chosen["cells"], against, where, benchmarks, each, **moderators, expect=expect, margin=margin)


def _where(space: ConfigSpace, node: Any, at: str, faults: list[Fault]) -> Where:
    if not isinstance(node, dict):
        faults.append(Fault(at, f"a mapping is expected, not {validate.show(node)}", "e.g. {method: dpo}"))
        return {}
    found: Where = {}
    for key, given in node.items():
        values = given if isinstance(given, list) else [given]
        _check_key(space, key, f"{at}.{key}", faults)
        for v in values:
            if key == "step" and v not in STEPS and type(v) is not int:
                faults.append(Fault(f"{at}.step", f"{validate.show(v)} is no step", "first, last or a whole number"))
            elif key == "kind" and v not in RUN_KINDS:
                faults.append(Fault(f"{at}.kind", f"{validate.show(v)} is no kind", suggest(str(v), RUN_KINDS)))
            elif key in GROUPS or key in validate.leaves():
                check_value(space, key, v, f"{at}.{key}", faults)
        found[str(key)] = values
    return found


def _check_key(space: ConfigSpace, key: Any, at: str, faults: list[Fault]) -> None:
    known = (*GROUPS, *validate.leaves(), "step", "kind", "inputs")
    if key not in known:
        faults.append(Fault(at, f"'{key}' is neither an axis nor a setting", suggest(str(key), known)))


def _benchmarks(
    space: ConfigSpace, node: Any, at: str, sides: Mapping[str, list[str]], faults: list[Fault]
) -> tuple[tuple[str, str | None], ...]:
    """Benchmarks, sides of benchmarks, or benchmark.metric."""
    found: dict[tuple[str, str | None], None] = {}
    known = [*sides, *space.options("benchmark")]
    for entry in node if isinstance(node, list) else [node]:
        if not isinstance(entry, str):
            faults.append(Fault(at, f"the name of a benchmark is expected, not {validate.show(entry)}"))
            continue
        name, _, metric = entry.partition(".")
        if name not in known and "/" not in name:
            faults.append(Fault(at, f"'{name}' is neither a benchmark nor a side", suggest(name, known)))
        for benchmark in sides.get(name, [name]):
            found[benchmark, metric or None] = None
    return tuple(found)


def _check_margin(
    expect: Any, margin: Any, benchmarks: Sequence[tuple[str, str | None]], at: str, faults: list[Fault]
) -> None:
    if not isinstance(margin, dict):
        faults.append(Fault(f"{at}.margin", "a mapping from benchmark to number is expected", "e.g. {mmlu: 0.01}"))
        return
    named = [benchmark for benchmark, _ in benchmarks]
    for benchmark, value in margin.items():
        if named and benchmark not in named:
            faults.append(
                Fault(f"{at}.margin.{benchmark}", "is not among `benchmarks`", suggest(str(benchmark), named))
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            faults.append(Fault(f"{at}.margin.{benchmark}", f"{validate.show(value)} is no number above 0"))
    if margin and expect not in WITH_MARGIN:
        faults.append(Fault(f"{at}.margin", "belongs to what may differ a little", f"expect: {', '.join(WITH_MARGIN)}"))
    if expect in WITH_MARGIN:
        if not named:
            faults.append(Fault(f"{at}.benchmarks", f"is missing: {expect} needs a margin of each"))
        for benchmark in [b for b in named if b not in margin]:
            faults.append(Fault(f"{at}.margin.{benchmark}", "is missing", f"how far apart is still {expect}"))


def files(dirs: Iterable[Path], group: str) -> list[Path]:
    """The YAML files of conf/report/GROUP, the user's folders' too."""
    return [path for folder in dirs for path in sorted((folder / "report" / group).glob("*.yaml"))]


def load_sides(dirs: Sequence[Path]) -> dict[str, list[str]]:
    """conf/report/sides.yaml: which benchmarks measure which side; a user's own adds to it, or replaces a side."""
    sides: dict[str, list[str]] = {}
    for path in [path for folder in dirs if (path := folder / "report" / "sides.yaml").is_file()]:
        for side, names in read_yaml(path).items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InputError([Fault(f"{path}: {side}", "a list of benchmarks is expected")])
            sides[str(side)] = names
    return sides


def load_comparisons(space: ConfigSpace) -> list[Contrast]:
    """The contrasts of conf/report/comparisons/. Raises InputError with every fault of all files."""
    faults: list[Fault] = []
    sides, found = load_sides(space.dirs), {}
    for path in files(space.dirs, "comparisons"):
        for name, node in read_yaml(path).items():
            at = f"{path}: {name}"
            if name in found:
                faults.append(Fault(at, "there is a comparison of this name already"))
            if contrast := parse(space, str(name), node, at, sides, faults):
                found[name] = contrast
    if faults:
        raise InputError(faults)
    return list(found.values())


@dataclass(frozen=True)
class Pair:
    """The difference of one pair of one seed.

    Attributes:
        runs: ids of those that it is of.
        fixed: of a difference to an unaligned base, which has no seeds: its id and the standard error over its items.
    """

    difference: float
    runs: frozenset[str]
    fixed: tuple[str, float] | None = None


Pairs = dict[tuple[Any, ...], dict[Any, Pair]]  # of each cell that both sides have, by seed


def parts(results: Results, contrast: Contrast, measure: Measure) -> Iterator[tuple[Where, Pairs]]:
    """The contrast's pairs of one measure, for each combination of the values of `each`, which may be only one."""
    values = results.values.get(measure, [])
    matched = _matching(values, contrast.where | contrast.cells)
    combinations = dict.fromkeys(v.at(contrast.each) for v in matched) if contrast.each else [()]
    for combination in combinations:
        own = {key: [v] for key, v in zip(contrast.each, combination, strict=True)}
        yield own, pairs(results, contrast, measure, contrast.where | own)


def pairs(results: Results, contrast: Contrast, measure: Measure, where: Where) -> Pairs:
    """The differences of cells that are equal in all axes that the contrast does not name."""
    if not contrast.more_with:
        return _differences(results, contrast, measure, where, ())
    own = own_settings(results, contrast, measure, where)
    moderators = (*contrast.more_with, *contrast.than_with, *own)
    one = _differences(results, contrast, measure, where | contrast.more_with, moderators)
    other = _differences(results, contrast, measure, where | contrast.than_with, moderators)
    found: Pairs = {}
    for key in (key for key in one if key in other):  # in one order in every process: what is drawn depends on it
        for seed in (seed for seed in one[key] if seed in other[key]):
            a, b = one[key][seed], other[key][seed]
            found.setdefault(key, {})[seed] = Pair(a.difference - b.difference, a.runs | b.runs)
    return found


def _differences(
    results: Results, contrast: Contrast, measure: Measure, where: Where, moderators: Sequence[str]
) -> Pairs:
    values = results.values.get(measure, [])
    left = _matching(values, where | contrast.cells)
    if isinstance(contrast.against, str):
        return _against_own(results, contrast.against, measure, left, _key_axes(results, {*moderators}))
    right = _matching(values, where | contrast.against)
    named = {*contrast.cells, *contrast.against, *moderators}
    axes = _key_axes(results, named)
    # a setting that one side's runs do not have (SFT has no method.beta) cannot be equal: the other side's mean counts
    own = [axis for axis in axes if _all_none(left, axis) != _all_none(right, axis)]
    own += _apart(results, measure, [where | contrast.cells], [where | contrast.against])
    axes = [axis for axis in axes if axis not in own]
    ours, theirs = (_by_place(side, axes, [*named, *own]) for side in (left, right))
    found: Pairs = {}
    for key, seed in (place for place in ours if place in theirs):
        (one, of_one), (other, of_other) = ours[key, seed], theirs[key, seed]
        found.setdefault(key, {})[seed] = Pair(one - other, of_one | of_other)
    return found


def own_settings(results: Results, contrast: Contrast, measure: Measure, where: Where) -> list[str]:
    """Settings of which each side of a contrast is to have one value of its own, and which are part of what tells the
    sides apart: the study's SFT has rank 64, its DPO rank 16."""
    both = [contrast.cells, *([] if isinstance(contrast.against, str) else [contrast.against])]
    if contrast.more_with:
        one, other = ([where | given | side for side in both] for given in (contrast.more_with, contrast.than_with))
    else:
        one, other = ([where | side for side in sides] for sides in (both[:1], both[1:]))
    return _apart(results, measure, one, other)


def _apart(results: Results, measure: Measure, one: Sequence[Where], other: Sequence[Where]) -> list[str]:
    """Settings of which one is to have a single value, and the other another.

    What is planned decides, not what is there so far. Of several values on a side, which one belongs to which is not
    known: then they must be equal.
    """
    settings = [axis for axis in results.axes if "." in axis]
    planned = results.planned.get(measure.benchmark.partition("/")[0], []) if settings else []
    sides = [[v.place for where in side for v in _matching(planned, {k: of for k, of in where.items() if k != "step"})]
             for side in (one, other)]  # fmt: skip
    values = {axis: [{place[axis] for place in side} for side in sides] for axis in settings}
    return [axis for axis, (a, b) in values.items() if len(a) == len(b) == 1 and a != b]


def _all_none(values: Sequence[Value], axis: str) -> bool:
    return all(v.place.get(axis) is None for v in values)


def _key_axes(results: Results, named: set[str]) -> list[str]:
    """The axes in which the cells of a pair are equal; models that a contrast tells apart share a family instead."""
    axes = [axis for axis in results.axes if axis not in named]
    return [FAMILY if axis == "model" else axis for axis in axes] if TUNED in named else axes


def _by_place(
    values: Sequence[Value], axes: Sequence[str], within: Sequence[str]
) -> dict[tuple[tuple[Any, ...], Any], tuple[float, frozenset[str]]]:
    """The mean of one side by cell and seed, with its runs; where it is a mean over several values, of all of them."""
    groups: dict[tuple[tuple[Any, ...], Any], dict[tuple[Any, ...], list[Value]]] = {}
    for value in values:
        groups.setdefault((value.at(axes), value.seed), {}).setdefault(value.at(within), []).append(value)
    needed = {inner for group in groups.values() for inner in group}
    found = {}
    for place, group in groups.items():
        if len(group) == len(needed):
            members = [v for inner in group.values() for v in inner]
            found[place] = math.fsum(v.value for v in members) / len(members), frozenset(v.run_id for v in members)
    return found


def _against_own(results: Results, against: str, measure: Measure, left: Sequence[Value], axes: Sequence[str]) -> Pairs:
    """Merges against their inputs, or runs against their unaligned base."""
    values = results.values.get(measure, [])
    by_id = {v.run_id: v for v in values if v.last}
    bases = {v.at(("model", "base", "dataset", "preference")): v for v in values if v.place["kind"] == "baseline"}
    found: Pairs = {}
    for value in left:
        if against == BASELINE:
            model, base, *pairs_of = value.at(("model", "base", "dataset", "preference"))
            base = str(base).removesuffix(" dequantized")
            one = bases.get((model, base, *pairs_of)) or bases.get((model, base, None, None))
            others = [one] if one else []
        else:
            ids = results.parents.get(value.run_id, ())
            others = [by_id[each] for each in ids if each in by_id]
            others = others if len(others) == len(ids) else []
        if not others:
            continue
        choose = min if results.better.get(measure) is False else max
        known = [other.value for other in others]
        theirs = choose(known) if against == BEST_PARENT else math.fsum(known) / len(known)
        runs = frozenset((value.run_id, *(other.run_id for other in others)))
        fixed = (others[0].run_id, others[0].error or 0.0) if against == BASELINE else None
        found.setdefault(value.at(axes), {})[value.seed] = Pair(value.value - theirs, runs, fixed)
    return found


def _matching(values: Iterable[Value], where: Where) -> list[Value]:
    """The values of these cells; what is not said of the kind and the step is a training run's last step."""
    kinds = where.get("kind", ["merge"] if set(MERGED) & set(where) else ["train"])
    steps = where.get("step", ["last"])
    asked = [(key, [in_table(v) for v in allowed]) for key, allowed in where.items() if key not in ("kind", "step")]
    found = []
    for value in values:
        place = value.place
        at_step = value.step in steps or (value.last and "last" in steps) or (value.first and "first" in steps)
        if at_step and place["kind"] in kinds and all(place.get(key) in allowed for key, allowed in asked):
            found.append(value)
    return found
