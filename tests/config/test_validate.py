"""Plain values into the schema: types, ranges, and every fault told."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from sweeping import expand, trained

from peft_align.config.benchmarks import LmEval
from peft_align.config.fields import Rule
from peft_align.config.schema import Dataset, Evaluation, Train
from peft_align.config.validate import check, config_from_plain, convert, leaves
from peft_align.errors import Fault, InputError, suggest
from peft_align.grid.serialize import run_from_plain, run_to_plain


def checked(value: Any, hint: Any, **rule: Any) -> tuple[Any, list[str]]:
    """The value in its type, and the faults."""
    found: list[Fault] = []
    return check(value, hint, Rule("what it means", **rule), "here", found), [str(fault) for fault in found]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (8, int, 8),
        (8.0, int, 8),
        (8, float, 8.0),
        ("a", str, "a"),
        (42, str, "42"),
        (True, bool, True),
        (None, int | None, None),
        (3, int | None, 3),
        ([1, 2.0], list[int], [1, 2]),
        ((1, 2), list[float], [1.0, 2.0]),
    ],
)
def test_a_value_is_taken_in_its_type_where_nothing_is_lost(value: Any, hint: Any, expected: Any) -> None:
    found, faults = checked(value, hint)
    assert faults == []
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (8.5, int, "8.5 is not a whole number"),
        ("8", int, "'8' is not a whole number"),
        (True, int, "true is not a whole number"),
        (float("nan"), int, "not a whole number"),
        ("1e-4", float, "is not a number"),
        (float("inf"), float, "is not a finite number"),
        (float("nan"), float, "is not a finite number"),
        (False, float, "is not a number"),
        (1.5, str, "is not a text"),
        (1, bool, "is not true or false"),
        (None, int, "the value is empty"),
        ("", str, "the value is empty"),
        ("", str | None, "the value is empty"),
        ([], list[int], "at least one value"),
        (3, list[int], "at least one value"),
        ({"a": 1}, int, "is not a whole number"),
        ([1, "x"], list[int], "here[1]: 'x' is not a whole number"),
    ],
)
def test_a_value_of_another_type_is_a_fault(value: Any, hint: Any, message: str) -> None:
    found, faults = checked(value, hint)
    assert len(faults) == 1
    assert message in faults[0]
    assert found is None or None in found


@pytest.mark.parametrize(
    ("value", "rule", "fine"),
    [
        (1, {"low": 1}, True),
        (0, {"low": 1}, False),
        (1, {"high": 1}, True),
        (2, {"high": 1}, False),
        (0, {"above": 0}, False),
        (1, {"above": 0}, True),
    ],
)
def test_ranges_hold_at_their_bounds(value: int, rule: dict[str, float], fine: bool) -> None:
    found, faults = checked(value, int, **rule)
    assert (found == value) == fine
    assert ("out of range" in "".join(faults)) == (not fine)


def test_a_choice_that_does_not_exist_is_told_with_what_was_meant() -> None:
    assert "did you mean 'cosine'?" in checked("cosin", str, choices=("linear", "cosine"))[1][0]


def test_a_list_may_be_empty_only_where_the_rule_says_so() -> None:
    assert checked([], list[str], may_be_empty=True) == ([], [])


def test_all_faults_of_a_mapping_are_told() -> None:
    found: list[Fault] = []
    node = {"loader": "hh_rlfh", "hub_id": None, "validation_fraction": 0.9, "expected_rows": [], "colour": "red"}
    assert convert(Dataset, node, "dataset", found) is None
    assert {fault.where for fault in found} == {
        "dataset.loader",
        "dataset.validation_fraction",
        "dataset.expected_rows",
        "dataset.colour",
        "dataset.revision",
    }


@pytest.mark.parametrize("node", [None, [1], "text"])
def test_what_is_no_mapping_is_a_fault(node: Any) -> None:
    found: list[Fault] = []
    assert convert(LmEval, node, "benchmark", found) is None
    assert "a mapping is expected here" in str(found[0])


def test_two_decay_rates_are_needed_no_more_no_less() -> None:
    node = dataclasses.asdict(trained(expand("model=tiny"))[0].config.train)
    for betas in ([0.9], [0.9, 0.99, 0.999]):
        found: list[Fault] = []
        convert(Train, node | {"adam_betas": betas}, "train", found)
        assert [fault.where for fault in found] == ["train.adam_betas"]


def test_a_field_with_a_default_may_be_left_out() -> None:
    found: list[Fault] = []
    node = {"benchmarks": ["mmlu"], "steps": [1], "limit": None, "heldout": 4, "heldout_split": "test", "batch_size": 1}
    evaluation = convert(Evaluation, node, "evaluation", found)
    assert found == []
    assert evaluation.include_path is None


def test_settings_that_kinds_share_are_one_leaf() -> None:
    assert leaves()["method.beta"].kinds == {"dpo"}
    assert leaves()["method.adapter.r"].kinds == {"sft", "dpo"}
    assert leaves()["method.kind"].rule.choices == ("sft", "dpo")
    assert leaves()["peft.r"].kinds is None
    assert {"seed", "root", "hub.mirror"} <= set(leaves())


def test_below_an_operational_node_everything_is_operational() -> None:
    assert not leaves()["hub.mirror"].scientific
    assert not leaves()["model.shape.layers"].scientific
    assert leaves()["seed"].scientific


@pytest.mark.parametrize("words", [["+grid=quickstart"], ["+grid=main", "method=dpo", "method.init=sft", "seed=0"]])
def test_a_run_survives_its_job_file(words: list[str]) -> None:
    for run in expand(*words).runs:
        plain = json.loads(json.dumps(run_to_plain(run)))
        assert run_from_plain(plain) == run


def test_a_damaged_job_file_is_told() -> None:
    plain = dataclasses.asdict(trained(expand("model=tiny"))[0].config)
    plain["method"]["kind"] = "spo"
    plain["peft"]["r"] = 0
    with pytest.raises(InputError) as caught:
        config_from_plain(plain)
    assert {fault.where for fault in caught.value.faults} == {"method.kind", "peft.r"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("mistal_7b", "did you mean 'mistral_7b'?"),
        ("zzz", "allowed: mistral_7b, peft.alpha"),
        ("alpha", "did you mean 'peft.alpha'?"),
    ],
)
def test_a_near_miss_is_named_otherwise_what_is_allowed(word: str, expected: str) -> None:
    assert suggest(word, ["mistral_7b", "peft.alpha"]) == expected


def test_faults_are_shown_once_each_with_their_count() -> None:
    fault = Fault("a", "is wrong", "do b")
    assert InputError([fault, fault]).render().splitlines() == [
        "peft_align: 1 fault in the input; nothing was started.",
        "  - a: is wrong (do b)",
    ]
    assert "2 faults" in InputError([fault, Fault("c", "too")]).render()


# --- Texts go into paths, scripts and records


@pytest.mark.parametrize("text", ["gpu\ncurl x | sh", "a\rb", "a\tb", "\x1b[2J", "a\x00b", "a\x85b"])
def test_a_text_with_a_control_character_is_a_fault_that_does_not_show_it(text: str) -> None:
    value, faults = checked(text, str)
    assert value is None
    assert faults == ["here: has a line break or another control character (write it in one line)"]


def test_where_lines_are_meant_line_breaks_and_tabs_are_taken_and_nothing_else() -> None:
    assert checked("a\n\tb", str, lines=True) == ("a\n\tb", [])
    assert checked(["\n\n"], list[str], lines=True) == (["\n\n"], [])
    assert checked("a\x1bb", str, lines=True)[1]
    assert {key for key, leaf in leaves().items() if leaf.rule.lines} == {"resources.setup"}


@pytest.mark.parametrize("text", ["https://me:hunter2@host", "sk-proj-Ab3dEf6hIj9kLmN0pQrS"])
def test_a_text_that_holds_a_secret_is_a_fault_that_does_not_show_it(text: str) -> None:
    for value, hint in ((text, str), ([text], list[str]), ({"a": text}, dict[str, str]), (text, str | None)):
        found, faults = checked(value, hint)
        assert text not in str(found)
        assert len(faults) == 1
        assert "hunter2" not in faults[0]
        assert "sk-proj" not in faults[0]


def test_a_text_of_another_form_than_is_asked_for_is_a_fault_that_does_not_show_it() -> None:
    form = ("[a-z]+", "is no small word", "e.g. abc")
    assert checked("abc", str, form=form) == ("abc", [])
    assert checked("ABC\n".strip(), str, form=form) == (None, ["here: is no small word (e.g. abc)"])
