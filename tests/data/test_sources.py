"""What a split says of its data: whether it is all of it, and that a rule is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peft_align.config.schema import Dataset, Preference
from peft_align.data.pairs import Counts
from peft_align.data.sources import LOADERS, load_split, row_warning
from peft_align.errors import InputError

PKU = Dataset("beavertails", "PKU-Alignment/PKU-SafeRLHF", "v0", 0.05, {"helpful": 297394, "harmless": 46625})
HH = Dataset("hh_rlhf", "Anthropic/hh-rlhf", None, 0.05, {"helpful": 43835, "harmless": 42537})
EVERYDAY = Dataset("everyday", None, None, 0.05, None)


def warning(matching: int, rule: str = "harmless", dataset: Dataset = PKU) -> str | None:
    return row_warning(dataset, Preference(rule), Counts(matching=matching))


def test_another_number_of_rows_than_expected_is_one_line_that_names_both() -> None:
    assert warning(8123) == (
        "PKU-Alignment/PKU-SafeRLHF@v0, harmless: 8,123 rows before filters, 46,625 expected: not the full data"
    )
    assert warning(42538, dataset=HH) == (
        "Anthropic/hh-rlhf, harmless: 42,538 rows before filters, 42,537 expected: "
        "more than the full data, so not the same data"
    )


def test_the_expected_number_of_rows_and_a_rule_without_one_are_not_warned_about() -> None:
    assert warning(46625) is None
    assert warning(297394, rule="helpful") is None
    assert warning(297394) is not None
    assert warning(5, rule="mixture") is None
    assert warning(5, dataset=EVERYDAY) is None


@pytest.mark.parametrize(("dataset", "rule"), [(d, r) for d in (PKU, HH) for r in ("harmless", "helpful")])
def test_real_train_files_are_warned_about_by_their_rows_whatever_is_held_back_and_the_test_files_are_not(
    mirror: Path, dataset: Dataset, rule: str
) -> None:
    train, validation, test = (
        load_split(dataset, Preference(rule), split, str(mirror)) for split in ("train", "validation", "test")
    )
    assert dataset.expected_rows is not None
    assert train.warning is not None
    assert f" {train.counts.matching:,} rows before filters, {dataset.expected_rows[rule]:,} expected" in train.warning
    assert len(train.pairs) < train.counts.kept <= train.counts.matching
    assert validation.warning == train.warning
    assert test.warning is None
    full = replace(dataset, expected_rows={rule: train.counts.matching})
    assert load_split(full, Preference(rule), "train", str(mirror)).warning is None


def test_rows_are_counted_before_filters(mirror: Path) -> None:
    counts = load_split(HH, Preference("harmless"), "test", str(mirror)).counts
    assert counts.matching == counts.read > counts.kept


def test_rows_of_the_carried_data_are_counted_by_their_rule() -> None:
    parts = {rule: load_split(EVERYDAY, Preference(rule), "train", None).counts for rule in LOADERS["everyday"].RULES}
    assert parts["mixture"].matching == parts["harmless"].matching + parts["helpful"].matching
    assert all(counts.matching == counts.read > 0 for counts in parts.values())


@pytest.mark.parametrize(
    ("dataset", "rule", "rules"),
    [
        (HH, "mixture", "harmless, helpful"),
        (PKU, "honest", "helpful, harmless, mixture, helpful_length_controlled"),
        (EVERYDAY, "helpful_length_controlled", "helpful, harmless, mixture"),
    ],
)
def test_a_rule_that_the_loader_lacks_is_a_fault_that_names_those_it_has(
    tmp_path: Path, dataset: Dataset, rule: str, rules: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_split(dataset, Preference(rule), "train", str(tmp_path))
    (fault,) = caught.value.faults
    assert str(fault) == f"preference.rule={rule}: is not a rule of the loader {dataset.loader} (it has {rules})"
