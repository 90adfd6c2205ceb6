"""Whatever is written in a grid file or on a command line: a sweep, or faults; never another exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeping import expand, write_option

from peft_align.config.command_line import parse
from peft_align.config.compose import ConfigSpace
from peft_align.errors import Fault, InputError

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TINY = {"model": "tiny", "dataset": "everyday"}
KEYS = (
    "seed",
    "method",
    "model",
    "peft",
    "peft.r",
    "train.max_steps",
    "method.beta",
    "merge",
    "evaluation.steps",
    "root",
)
WORDS = (
    "sft",
    "dpo",
    "tiny",
    "lora",
    "slerp",
    "none",
    "merge",
    "train",
    "",
    "x",
    "${peft.r}",
    "${a.b}",
    "${",
    "1",
    "*",
)

leaf = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats(allow_nan=True)
    | st.sampled_from(WORDS)
    | st.text(max_size=4)
)
names = (
    st.sampled_from((*KEYS, "where", "axes", "set", "reason", "name", "kind")) | st.text(max_size=4) | st.integers(0, 3)
)
nested = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
settings_of = st.dictionaries(st.sampled_from(KEYS), nested, max_size=3)
axes = st.dictionaries(st.sampled_from(KEYS), st.lists(leaf, max_size=3) | nested, max_size=3)
where = st.fixed_dictionaries(
    {}, optional={"where": settings_of | nested, "axes": axes | nested, "set": settings_of | nested}
)
block = st.fixed_dictionaries(
    {},
    optional={
        "name": nested,
        "kind": st.sampled_from(["train", "merge"]) | nested,
        "axes": axes | nested,
        "zip": st.lists(axes, max_size=2) | nested,
        "when": st.lists(where, max_size=2) | nested,
        "exclude": st.lists(st.fixed_dictionaries({"where": settings_of, "reason": leaf}), max_size=2) | nested,
        "inputs": st.lists(st.lists(settings_of, max_size=3), max_size=2) | nested,
        "set": settings_of.map(lambda given: TINY | given) | nested,
        "more": nested,
    },
)
grids = st.fixed_dictionaries(
    {},
    optional={
        "name": nested,
        "blocks": st.lists(block | nested, max_size=2) | nested,
        "include": st.lists(st.sampled_from(["quickstart", "fuzzed", "x"]) | leaf, max_size=2) | nested,
        "baselines": nested,
        "more": nested,
    },
)


def told(*words: str, space: ConfigSpace | None = None) -> list[Fault]:
    """The faults that a command line is refused for; none if it is a sweep, which has runs then."""
    try:
        sweep = expand(*words, space=space)
    except InputError as error:
        found = error.faults
    else:
        assert sweep.runs
        return []
    assert found
    return found


def is_a_sweep_or_refused(*words: str, space: ConfigSpace | None = None) -> None:
    """Faults say where and what, and no more than people can read."""
    assert all(fault.where and fault.what and len(str(fault)) < 3000 for fault in told(*words, space=space))


@quick
@given(grid=grids | nested)
def test_any_nested_value_as_a_grid_is_a_sweep_or_refused(
    grid_folder: Path, grid_space: ConfigSpace, grid: Any
) -> None:
    write_option(grid_folder, "grid/fuzzed", yaml.safe_dump(grid))
    is_a_sweep_or_refused("+grid=fuzzed", space=grid_space)


@quick
@given(text=st.text(max_size=80) | st.text(alphabet="blocks: [{axes}]-\n &*!|>'\"#", max_size=60))
def test_any_text_as_a_grid_is_a_sweep_or_refused(grid_folder: Path, grid_space: ConfigSpace, text: str) -> None:
    path = grid_folder / "grid/fuzzed.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    is_a_sweep_or_refused("+grid=fuzzed", space=grid_space)


@quick
@given(content=st.binary(max_size=60))
def test_any_bytes_as_a_grid_are_refused(grid_folder: Path, grid_space: ConfigSpace, content: bytes) -> None:
    (grid_folder / "grid/fuzzed.yaml").write_bytes(content)
    is_a_sweep_or_refused("+grid=fuzzed", space=grid_space)


keys = st.sampled_from(
    (*KEYS, "grid", "+grid", "hub", "hub.mirror", "benchmark.mmlu.num_fewshot", "~seed", "model@x", "a.b")
)
written = st.sampled_from(
    ("1", "[1,2]", "{a:1}", "1,2", "range(0,3)", "'x'", "null", "sft,dpo", "tiny", "${seed}", "nan", "")
)
overrides = st.tuples(keys, written | st.text(max_size=6)).map("=".join) | st.text(max_size=10)


@quick
@given(line=st.lists(overrides, max_size=3))
def test_any_command_line_is_a_sweep_or_refused(line: list[str]) -> None:
    parsed = parse(line)
    assert all(fault.where and fault.what for fault in parsed.faults)
    if not parsed.config_dirs and not parsed.hydra:
        is_a_sweep_or_refused("model=tiny", "dataset=everyday", *line) if not parsed.faults else None
