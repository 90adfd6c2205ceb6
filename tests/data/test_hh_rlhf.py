"""HH-RLHF: real rows and the pitfalls found in them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from peft_align.config.schema import Dataset, Preference
from peft_align.data import hh_rlhf
from peft_align.data.pairs import Counts, Message, Pair
from peft_align.data.sources import load_split

HH = Dataset(
    loader="hh_rlhf",
    hub_id="Anthropic/hh-rlhf",
    revision=None,
    validation_fraction=0.05,
    expected_rows=None,
)


def read(*rows: dict[str, object]) -> tuple[list[Pair], Counts]:
    counts = Counts()
    return list(hh_rlhf.pairs(rows, "harmless", "train", counts)), counts


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def test_a_dialogue_is_split_at_its_last_assistant_turn() -> None:
    (pair,), counts = read(
        {"chosen": dialogue("hi", "hello", "and?", "yes"), "rejected": dialogue("hi", "hello", "and?", "no")}
    )
    assert pair.prompt == (Message("user", "hi"), Message("assistant", "hello"), Message("user", "and?"))
    assert (pair.chosen, pair.rejected) == ("yes", "no")
    assert counts.plain() == {"read": 1, "matching": 1, "kept": 1, "dropped": {}, "dropped_rows": {}}


def test_blank_lines_and_role_words_inside_a_response_stay_in_it() -> None:
    good = "first\n\nsecond Human: not a turn"
    (pair,), _ = read({"chosen": dialogue("q", good), "rejected": dialogue("q", "no")})
    assert pair.chosen == good


def test_turns_of_one_role_in_a_row_are_joined() -> None:
    text = "\n\nHuman: one\n\nHuman: two\n\nAssistant: a"
    (pair,), _ = read({"chosen": text, "rejected": text[:-1] + "b"})
    assert pair.prompt == (Message("user", "one\n\ntwo"),)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (dialogue("a", "x"), dialogue("b", "y"), "prompts differ"),
        (dialogue("a", "x"), dialogue("a", ""), "empty response"),
        (dialogue("a", " "), dialogue("a", "y"), "empty response"),
        (dialogue("a", "x"), dialogue("a", "x "), "responses are equal"),
        ("no turns", dialogue("a", "x"), "no assistant turn"),
        (None, dialogue("a", "x"), "response is not text"),
    ],
)
def test_unusable_rows_are_dropped_and_counted_by_reason(chosen: object, rejected: object, reason: str) -> None:
    pairs, counts = read({"chosen": chosen, "rejected": rejected})
    assert pairs == []
    told = {"read": 1, "matching": 1, "kept": 0, "dropped": {reason: 1}, "dropped_rows": {reason: ["train:0"]}}
    assert counts.plain() == told


def test_the_first_rows_that_are_dropped_for_a_reason_are_named() -> None:
    empty, fine = {"chosen": dialogue("a", "x"), "rejected": dialogue("a", "")}, dialogue("a", "x")
    _, counts = read({"chosen": fine, "rejected": dialogue("a", "y")}, *[empty] * 12)
    assert counts.dropped["empty response"] == 12
    assert counts.plain()["dropped_rows"] == {"empty response": [f"train:{i}" for i in range(1, 11)]}


@pytest.mark.parametrize("rule", ["harmless", "helpful"])
def test_every_real_row_is_kept_or_counted_and_nothing_of_its_text_is_lost(mirror: Path, rule: str) -> None:
    for name in ("train", "test"):
        split = load_split(HH, Preference(rule), name, str(mirror))
        counts = split.counts
        assert counts.read == counts.matching == counts.kept + counts.dropped.total()
        assert counts.kept > 0.98 * counts.read
        assert set(counts.dropped) <= {"prompts differ", "empty response", "responses are equal"}
        for pair in split.pairs:
            assert pair.prompt[0].role == "user"
            assert pair.prompt[-1].role == "user"
            roles = [message.role for message in pair.prompt]
            assert all(a != b for a, b in itertools.pairwise(roles))


def test_the_rows_whose_prompts_differ_are_those_known_upstream(mirror: Path) -> None:
    differing = {
        rule: sum(
            load_split(HH, Preference(rule), name, str(mirror)).counts.dropped["prompts differ"]
            for name in ("train", "test")
        )
        for rule in ("harmless", "helpful")
    }
    assert differing["harmless"] <= 5
    assert differing["helpful"] <= 9
    assert sum(differing.values()) > 0


def test_validation_is_split_off_by_prompt(mirror: Path) -> None:
    train = load_split(HH, Preference("harmless"), "train", str(mirror)).pairs
    validation = load_split(HH, Preference("harmless"), "validation", str(mirror)).pairs
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in validation}
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.1


def test_files_that_are_links_to_blobs_elsewhere_are_read_as_the_hubs_cache_lays_them(
    mirror: Path, tmp_path: Path
) -> None:
    folder, blobs = tmp_path / "Anthropic/hh-rlhf/harmless-base", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for name in ("train", "test"):
        original = mirror / f"Anthropic/hh-rlhf/harmless-base/{name}.jsonl.gz"
        (blobs / name).write_bytes(original.read_bytes())
        (folder / f"{name}.jsonl.gz").symlink_to(blobs / name)
    split = load_split(HH, Preference("harmless"), "test", str(tmp_path))
    assert list(split.source["files"]) == ["harmless-base/test.jsonl.gz"]
    assert split.source["digest"] == load_split(HH, Preference("harmless"), "test", str(mirror)).source["digest"]
