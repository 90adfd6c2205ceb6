"""Token ids kept on disk are those that would be made, whatever is found there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flips import flipped
from sweeping import expand, trained

from peft_align.data import tokenization
from peft_align.data.encodings import Encodings, encoding_key
from peft_align.data.pairs import Message, Pair
from peft_align.data.tokenization import TokenizedPair
from peft_align.models.loading import Base, load_base
from peft_align.training.run import training_rows

KEY = encoding_key("data", "chat", "tokenizer")


def pair(i: int) -> Pair:
    return Pair(f"row-{i}", (Message("user", f"question {i}"),), f"good {i}", f"bad {i}")


def encoded(some: range) -> dict[Pair, TokenizedPair]:
    return {pair(i): TokenizedPair(f"row-{i}", [i, i + 1], [i] * (i % 4), [7, 8, i]) for i in some}


def test_what_was_added_is_found_by_the_text_of_the_pair(tmp_path: Path) -> None:
    kept = Encodings(tmp_path, KEY)
    assert kept.of([pair(1)]) == {}
    kept.add(encoded(range(5)))
    kept.add(encoded(range(5, 9)))
    assert Encodings(tmp_path, KEY).of(map(pair, range(3, 12))) == encoded(range(3, 9))
    (renamed,) = kept.of([Pair("other", pair(2).prompt, "good 2", "bad 2")]).values()
    assert (renamed.id, renamed.prompt) == ("other", [2, 3])
    assert kept.of([Pair("row-2", pair(2).prompt, "good 2", "other")]) == {}


def test_what_is_damaged_or_of_another_key_is_made_again(tmp_path: Path) -> None:
    kept, other = Encodings(tmp_path, KEY), Encodings(tmp_path, encoding_key("other", "chat", "tokenizer"))
    kept.add(encoded(range(5)))
    whole = kept.path.read_bytes()
    assert other.of([pair(1)]) == {}
    other.path.write_bytes(whole)
    assert other.of([pair(1)]) == {}
    for damaged in (whole[:-100], whole[:600] + b"\x07" + whole[601:], b"", b"{}"):
        assert damaged != whole
        kept.path.write_bytes(damaged)
        assert kept.of([pair(1)]) == {}
    kept.add(encoded(range(2)))
    assert kept.of(map(pair, range(5))) == encoded(range(2))


def test_no_bit_can_be_another_without_it_being_found(tmp_path: Path) -> None:
    kept = Encodings(tmp_path, KEY)
    kept.add(encoded(range(2)))
    wanted = encoded(range(2))
    for place in flipped(kept.path, every=13):
        assert kept.of(map(pair, range(2))) in ({}, wanted), place


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(runs()[0].config)


def runs() -> list[Any]:
    words = ("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=2", "train.batch_size=4")
    return trained(expand(*words, "seed=0,1", "train.max_length=200"))


def test_a_second_process_encodes_only_what_is_not_there(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Pair] = []
    original = tokenization._encode
    monkeypatch.setattr(tokenization, "_encode", lambda pair, *more: done.append(pair) or original(pair, *more))
    found = []
    for run in [*runs(), *runs()]:
        base.shared.tokenized.clear()  # as in a process of its own
        found.append(training_rows(run.config, base, tmp_path))
    used = {row.id for rows, _ in found for row in rows}
    assert len(done) == len(used) < 16
    assert found[:2] == found[2:]
    base.shared.tokenized.clear()
    assert found[:2] == [training_rows(run.config, base) for run in runs()]
