"""Properties that hold for every grid, tried on random ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sweeping import expand, ids, setting, trained

from peft_align.config.validate import leaves
from peft_align.grid.runs import Run, Sweep

Grid = Callable[..., Sweep]
Node = dict[str, Any]

POOL: dict[str, list[Any]] = {
    "method": ["sft", "dpo"],
    "model": ["tiny", "mistral_7b"],
    "peft": ["lora", "qlora"],
    "train.max_steps": [5, 6, 7],
    "train.batch_size": [4, 8],
    "peft.r": [2, 3],
}
SEEDS = [0, 1, 2, 3]
BETAS = [0.2, 0.3]
DEFAULTS = {"method": "sft", "model": "mistral_7b", "peft": "qlora", "train.max_steps": 700, "train.batch_size": 16}
RANKS = {"sft": 64, "dpo": 16}
KEYS = (*POOL, "seed", "method.beta")
quick = settings(max_examples=50, deadline=None)


def some(values: list[Any]) -> st.SearchStrategy[list[Any]]:
    """One or several of the values, in any order."""
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


@st.composite
def blocks(draw: st.DrawFn) -> Node:
    """A block: some keys as axes, some set, some zipped, some that hold only when another has a value."""
    use = {key: draw(st.sampled_from(["axis", "set", "when", "zip", "none"])) for key in POOL}
    axes: Node = {"seed": draw(some(SEEDS))} | {key: draw(some(POOL[key])) for key in POOL if use[key] == "axis"}
    node: Node = {"axes": axes, "set": {key: draw(st.sampled_from(POOL[key])) for key in POOL if use[key] == "set"}}
    zipped = [key for key in POOL if use[key] == "zip"]
    if zipped:
        length = draw(st.integers(1, 3))
        row = st.lists(st.sampled_from([0, 1]), min_size=length, max_size=length)
        node["zip"] = [{key: [POOL[key][i] for i in draw(row)] for key in zipped}]
    later = {key: draw(some(POOL[key])) for key in POOL if use[key] == "when" and key != "method"}
    node["when"] = [{"where": {"method": "dpo"}, "axes": {"method.beta": draw(some(BETAS))}}]
    if later:
        node["when"].append({"where": {"seed": draw(some(SEEDS))}, "axes": later})
    return node


grids = st.lists(blocks(), min_size=1, max_size=3).map(lambda found: {"blocks": found, "baselines": False})


def assignments(node: Node) -> Iterator[tuple[Any, ...]]:
    """What the language says a block's runs are, by brute force: every key's value, defaults filled in."""
    rows = [[{key: v} for v in values] for key, values in node["axes"].items()]
    for group in node.get("zip", []):
        rows.append([dict(zip(group, picked, strict=True)) for picked in zip(*group.values(), strict=True)])
    for parts in itertools.product(*rows):
        outer = {key: v for part in (node["set"], *parts) for key, v in part.items()}
        inner: list[Node] = [{}]
        for when in node["when"]:
            (key, allowed), *_ = when["where"].items()
            if outer.get(key, DEFAULTS.get(key)) not in (allowed if isinstance(allowed, list) else [allowed]):
                continue
            picks = [dict(zip(when["axes"], p, strict=True)) for p in itertools.product(*when["axes"].values())]
            inner = [one | more for one in inner for more in picks]
        for more in inner:
            values = DEFAULTS | outer | more
            rank = values.get("peft.r", RANKS[values["method"]])
            beta = values.get("method.beta", 0.1) if values["method"] == "dpo" else None
            filled = values | {"peft.r": rank, "method.beta": beta}
            yield tuple(filled[key] for key in KEYS)


def yaml(node: Node) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(node))


def values_of(run: Run) -> tuple[Any, ...]:
    return tuple(setting(run, key) for key in KEYS)


@quick
@given(node=grids)
def test_there_is_one_run_for_each_distinct_assignment(grid: Grid, node: Node) -> None:
    expected = {found for block in node["blocks"] for found in assignments(block)}
    runs = trained(grid(yaml(node)))
    assert {values_of(run) for run in runs} == expected
    assert len(runs) == len({run.id for run in runs}) == len(expected)


@quick
@given(node=grids, data=st.data())
def test_the_order_of_axes_values_and_blocks_does_not_matter(grid: Grid, node: Node, data: st.DataObject) -> None:
    def shuffled(block: Node) -> Node:
        names = data.draw(st.permutations(list(block["axes"])))
        return block | {"axes": {key: data.draw(st.permutations(block["axes"][key])) for key in names}}

    other = node | {"blocks": [shuffled(block) for block in data.draw(st.permutations(node["blocks"]))]}
    assert ids(grid(yaml(node))) == ids(grid(yaml(other)))


@quick
@given(node=grids, data=st.data())
def test_narrowing_by_an_axis_is_filtering(grid: Grid, node: Node, data: st.DataObject) -> None:
    everything = trained(grid(yaml(node)))
    present = sorted({run.config.seed for run in everything})
    chosen = data.draw(some(present))
    narrowed = grid(yaml(node), f"seed={','.join(map(str, chosen))}")
    assert ids(narrowed) == {run.id for run in everything if run.config.seed in chosen}


def science(run: Run) -> dict[str, Any]:
    """The scientific settings of a run by their dotted keys, read off the config by the schema."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for name, v in node.items():
            key = f"{prefix}{name}"
            if isinstance(v, dict) and key not in leaves():
                walk(v, f"{key}.")
            elif leaves()[key].scientific:
                found[key] = v

    walk(asdict(run.config), "")
    return {key: v for key, v in found.items() if not key.startswith(("evaluation.", "launcher.", "tracker."))}


words = st.fixed_dictionaries(
    {"method": st.sampled_from(["sft", "dpo"]), "peft": st.sampled_from(["lora", "qlora"])},
    optional={
        "peft.r": st.sampled_from([16, 64]),
        "peft.alpha": st.sampled_from([16, 16.0, 32]),
        "peft.dropout": st.sampled_from([0.1, 0.05]),
        "train.max_steps": st.sampled_from([700, 8]),
        "train.learning_rate": st.sampled_from(["2e-4", "0.0002", "5.0e-5"]),
        "train.micro_batch_size": st.sampled_from([1, 2]),
        "evaluation.limit": st.sampled_from([1, "null"]),
        "seed": st.sampled_from([0, 1]),
        "method.adapter.r": st.sampled_from([16, 64]),
        "root": st.sampled_from(["a", "b"]),
    },
)


@quick
@given(one=words, other=words)
def test_two_runs_have_one_id_if_and_only_if_they_are_the_same_science(one: Node, other: Node) -> None:
    a, b = (trained(expand(*(f"{k}={v}" for k, v in line.items())))[0] for line in (one, other))
    assert (a.id == b.id) == (science(a) == science(b))


@pytest.mark.parametrize("key", ["method", "model", "peft", "preference", "dataset", "seed"])
def test_narrowing_main_by_each_of_its_axes_is_filtering(key: str) -> None:
    everything = trained(expand("+grid=main"))
    for value in {setting(run, key): None for run in everything}:
        assert ids(expand("+grid=main", f"{key}={value}")) == {r.id for r in everything if setting(r, key) == value}
