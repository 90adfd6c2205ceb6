"""BeaverTails in the study's sense: the three preferences on real rows."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from peft_align.config.schema import Dataset, Preference
from peft_align.data import beavertails
from peft_align.data.pairs import Counts, Pair
from peft_align.data.sources import load_split
from peft_align.errors import InputError

PKU = Dataset(
    loader="beavertails",
    hub_id="PKU-Alignment/PKU-SafeRLHF",
    revision="v0",
    validation_fraction=0.0,
    expected_rows=None,
)


def row(**changes: object) -> dict[str, object]:
    return {
        "prompt": "q",
        "response_0": "zero",
        "response_1": "one",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    } | changes


def chosen(rule: str, *rows: dict[str, object]) -> tuple[list[str], dict[str, int]]:
    counts = Counts()
    return [pair.chosen for pair in beavertails.pairs(rows, rule, "train", counts)], dict(counts.dropped)


def test_harmless_takes_the_safe_response_of_rows_with_exactly_one() -> None:
    both, neither = row(is_response_1_safe=True), row(is_response_0_safe=False)
    assert chosen("harmless", row(), both, neither) == (["zero"], {"not exactly one safe response": 2})


def test_helpful_takes_the_better_response_of_every_row() -> None:
    assert chosen("helpful", row(), row(better_response_id=0)) == (["one", "zero"], {})
    assert chosen("helpful", row(better_response_id=None)) == ([], {"no better response named": 1})


def test_length_controlled_takes_the_better_response_where_lengths_differ_by_a_tenth_of_the_longer_at_most() -> None:
    def lengths(zero: int, one: int) -> dict[str, object]:
        return row(response_0="a" * zero, response_1="b" * one)

    kept = [lengths(90, 100), lengths(100, 90), lengths(9, 10), row(response_0=" aa  ", response_1="bb")]
    assert chosen("helpful_length_controlled", *kept) == (["b" * 100, "b" * 90, "b" * 10, "bb"], {})
    dropped = [lengths(89, 100), lengths(100, 89), lengths(8, 9), row(response_0=None), row()]
    reason = "lengths differ by more than 10 percent"
    assert chosen("helpful_length_controlled", *dropped) == ([], {reason: 5})
    unnamed = row(response_0="two", better_response_id=None)
    assert chosen("helpful_length_controlled", unnamed) == ([], {"no better response named": 1})


def test_length_controlled_is_the_part_of_helpful_with_equal_lengths_on_real_rows(mirror: Path) -> None:
    helpful, controlled = (
        load_split(PKU, Preference(rule), "train", str(mirror)) for rule in ("helpful", "helpful_length_controlled")
    )

    def alike(pair: Pair) -> bool:
        return abs(len(pair.chosen) - len(pair.rejected)) <= max(len(pair.chosen), len(pair.rejected)) / 10

    texts = [(pair.prompt, pair.chosen, pair.rejected) for pair in controlled.pairs]
    assert texts == [(pair.prompt, pair.chosen, pair.rejected) for pair in helpful.pairs if alike(pair)]
    assert 100 < len(texts) < len(helpful.pairs)
    counts = controlled.counts
    assert counts.read == counts.kept + counts.dropped.total()
    assert counts.dropped["lengths differ by more than 10 percent"] > 1000


def test_the_mixture_is_both_sets_together(mirror: Path) -> None:
    sets = {
        rule: load_split(PKU, Preference(rule), "train", str(mirror)).pairs
        for rule in ("harmless", "helpful", "mixture")
    }

    def texts(rule: str) -> list[tuple[object, ...]]:
        return sorted((str(p.prompt), p.chosen, p.rejected) for p in sets[rule])

    assert texts("mixture") == sorted(texts("harmless") + texts("helpful"))


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split's file."""
    with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_harmless_pairs_equal_the_published_mixed_safety_pairs_row_for_row(mirror: Path, shared: Path) -> None:
    """The published pairs are another program's: v0's rows of mixed safety, the safe response named.

    The folder holds 3,535 of its 5,135 (2,840 in train, 695 in test), and the mirror the rows that they came from: the
    whole of both must be equal, split by split, with as many copies of each. Our filters drop none of them, since all
    have a prompt and two different responses that are not empty; the only rows that go are those the rule does not
    apply to.
    """
    total = 0
    for name in ("train", "test"):
        published = Counter(
            (row["prompt"].strip(), row["safe_response"].strip(), row["unsafe_response"].strip())
            for row in rows_of(shared / "peers/pku_saferlhf/mixed_pairs", name)
        )
        split = load_split(PKU, Preference("harmless"), name, str(mirror))
        assert Counter((pair.prompt[0].content, pair.chosen, pair.rejected) for pair in split.pairs) == published
        assert set(split.counts.dropped) == {"not exactly one safe response"}
        assert split.counts.matching == split.counts.kept == published.total()
        total += published.total()
    assert total > 3500


def test_matching_counts_the_rows_of_the_rule_before_other_filters() -> None:
    rows = [row(), row(response_0=""), row(prompt=None), row(better_response_id=None), row(is_response_1_safe=True)]
    matching = {}
    for rule in beavertails.RULES:
        counts = Counts()
        pairs = list(beavertails.pairs(rows, rule, "train", counts))
        matching[rule] = counts.matching
        assert (
            counts.plain()["matching"]
            == counts.matching
            == len(pairs) + sum(counts.dropped[reason] for reason in ("empty response", "prompt is not text"))
        )
    assert matching == {"helpful": 4, "harmless": 4, "mixture": 8, "helpful_length_controlled": 0}


def test_the_pinned_revision_is_what_is_read(mirror: Path) -> None:
    split = load_split(PKU, Preference("helpful"), "test", str(mirror))
    assert split.source["name"] == "PKU-Alignment/PKU-SafeRLHF"
    assert list(split.source["files"]) == ["test.jsonl.gz"]
    assert len(split.source["digest"]) == 64


def test_data_that_is_nowhere_is_one_clear_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"PKU-SafeRLHF@v0.*hub.mirror=DIR"):
        load_split(PKU, Preference("helpful"), "test", str(tmp_path))
