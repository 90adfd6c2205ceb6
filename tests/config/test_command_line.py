"""The command line: our own flags in any position, and overrides in Hydra's grammar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_align.config.command_line import parse


def values(*words: str) -> dict[str, tuple[Any, ...]]:
    """The values by key of a command line that is accepted."""
    line = parse(words)
    assert line.faults == ()
    return {override.key: override.values for override in line.overrides}


def told(*words: str) -> str:
    """The only fault of a command line."""
    faults = parse(words, ["--json"]).faults
    assert len(faults) == 1, faults
    return str(faults[0])


@pytest.mark.parametrize("word", ["grid=full", "+grid=full", "++grid=full"])
def test_a_grid_is_taken_with_and_without_plus(word: str) -> None:
    line = parse([word])
    assert line.grids == ("full",)
    assert line.overrides == ()
    assert line.faults == ()


def test_several_grids_are_a_union() -> None:
    assert parse(["+grid=main,quickstart"]).grids == ("main", "quickstart")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("peft.r=8", (8,)),
        ("peft.r=8,16,8", (8, 16)),
        ("seed=range(3)", (0, 1, 2)),
        ("seed=range(1,7,2)", (1, 3, 5)),
        ("train.learning_rate=5e-5", (5.0e-5,)),
        ("train.checkpoint_steps=[2,4]", ([2, 4],)),
        ("evaluation.benchmarks=[mmlu],[preference]", (["mmlu"], ["preference"])),
        ("model.hub_id='a, b'", ("a, b",)),
        ('model.hub_id="a=b"', ("a=b",)),
        ("evaluation.limit=null", (None,)),
        ("train.gradient_checkpointing=true", (True,)),
        ("method.beta=.2", (0.2,)),
        ("peft.r=choice(4,8)", (4, 8)),
        ("train.weight_decay=0,0.0", (0, 0.0)),
    ],
)
def test_values_are_read_in_hydras_grammar(word: str, expected: tuple[Any, ...]) -> None:
    found = values(word)[word.partition("=")[0]]
    assert found == expected
    assert [type(v) for v in found] == [type(v) for v in expected]


def test_several_values_make_an_axis_and_a_list_does_not() -> None:
    axis, listed = parse(["seed=0,1", "train.checkpoint_steps=[1,2]"]).overrides
    assert axis.is_axis
    assert not listed.is_axis


def test_flags_are_taken_in_any_position() -> None:
    for words in (["--json", "seed=1"], ["seed=1", "--json"]):
        line = parse(words, ["--json"])
        assert line.flags == {"--json"}
        assert line.words == ("seed=1",)
        assert line.faults == ()
    assert parse(["-h"]).flags == {"--help"}


def test_config_dirs_are_taken_in_both_forms_and_repeated(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    line = parse(["--config-dir", str(one), "seed=1", f"--config-dir={two}"])
    assert line.config_dirs == (one.resolve(), two.resolve())
    assert line.words == ("seed=1",)
    assert line.faults == ()


@pytest.mark.parametrize("words", [["--config-dir"], ["--config-dir="], ["--config-dir", "nowhere"]])
def test_a_config_dir_that_is_no_folder_is_refused(words: list[str]) -> None:
    assert any(what in told(*words) for what in ("is not a folder", "names no folder"))


def test_hydras_own_overrides_are_kept_apart() -> None:
    line = parse(["hydra.verbose=true", "seed=1"])
    assert line.hydra == ("hydra.verbose=true",)
    assert [override.key for override in line.overrides] == ["seed"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--jsn", "did you mean '--json'?"),
        ("--js", "no such flag"),
        ("--json=1", "--json takes no value"),
        ("-m", "multirun is not used here"),
        ("--multirun", "+grid=NAME"),
        ("a=[1", "not an override"),
        ("seed", "not an override"),
        ("=1", "="),
        ("~seed", "cannot be deleted"),
        ("~model=tiny", "cannot be deleted"),
        ("model@peft=tiny", "package"),
        ("seed=", "the value is empty"),
        ("model=''", "the value is empty"),
        ("grid=", "the value is empty"),
        ("model=glob(*)", "glob()"),
        ("peft.dropout=interval(0,1)", "interval()"),
        ("seed=range(1000000)", "too many values"),
        ("seed=range(5,5)", "there is no value in that range"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_word(word: str, message: str) -> None:
    fault = told(word)
    assert message in fault
    assert fault.startswith(word)


def test_a_key_given_twice_with_other_values_is_refused() -> None:
    fault = told("seed=1", "model=tiny", "seed=2")
    assert "'seed' is given twice" in fault
    assert "seed=1" in fault


def test_a_key_given_twice_with_the_same_value_is_one() -> None:
    assert values("seed=1", "+seed=1") == {"seed": (1,)}


def test_all_faults_are_collected() -> None:
    line = parse(["--jsn", "a=[1", "~seed", "--multirun", "model=", "peft.r=8"])
    assert [fault.where for fault in line.faults] == ["--jsn", "--multirun", "a=[1", "~seed", "model="]
    assert [override.key for override in line.overrides] == ["peft.r"]


def test_the_last_single_value_is_looked_up() -> None:
    line = parse(["root=here"])
    assert line.value("root", "outputs") == "here"
    assert line.value("seed", 7) == 7
