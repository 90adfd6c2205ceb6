"""Whatever stands in a row: each loader keeps it as a pair of texts, or counts it by its reason."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_align.data.hh_rlhf import parse_dialogue
from peft_align.data.pairs import Counts, Pair
from peft_align.data.places import find_fault, place_of
from peft_align.data.sources import LOADERS

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
pieces = st.sampled_from(
    ["\n\nHuman:", "\n\nAssistant:", "Human:", "\n\n", " ", "a", "</s>", "<|im_start|>", "\ud83d", "é"]
)
dialogues = st.lists(pieces, max_size=8).map("".join)
values = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | dialogues | st.lists(dialogues, max_size=2)
RULES = [(name, rule) for name, loader in LOADERS.items() for rule in loader.RULES]


@quick
@given(data=st.data())
@pytest.mark.parametrize(("loader", "rule"), RULES)
def test_every_row_is_kept_whole_or_counted_by_its_reason(loader: str, rule: str, data: st.DataObject) -> None:
    module = LOADERS[loader]
    ids = st.sampled_from(["harmless-1", "helpful-1", "other"]) | values
    row = st.fixed_dictionaries({}, optional={name: ids if name == "id" else values for name in module.columns(rule)})
    rows = data.draw(st.lists(row, max_size=4))
    counts = Counts()
    pairs: list[Pair] = list(module.pairs(rows, rule, "train", counts))
    assert counts.kept == len(pairs)
    assert counts.kept + sum(n for r, n in counts.dropped.items() if r not in counts.unmatched) == counts.matching
    assert counts.dropped.keys() == counts.first.keys()
    assert all(0 <= first < len(rows) for first in counts.first.values())
    for pair in pairs:
        assert pair.prompt
        assert pair.prompt[-1].role == "user"
        texts = [*(message.content for message in pair.prompt), pair.chosen, pair.rejected]
        assert all(text and text == text.strip() for text in texts)
        assert pair.chosen != pair.rejected


@quick
@given(text=dialogues)
def test_turns_of_a_dialogue_alternate_and_keep_the_text(text: str) -> None:
    turns = parse_dialogue(text)
    roles = [turn.role for turn in turns]
    assert all(a != b for a, b in itertools.pairwise(roles))
    assert all(turn.content.strip() == turn.content != "" for turn in turns)
    for turn in turns:
        for part in turn.content.split("\n\n"):
            assert part in text


@quick
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("ab"), values, max_size=2) | values, max_size=4), packed=st.booleans()
)
def test_what_is_wrong_with_a_file_is_found_without_stumbling(tmp_path: Path, rows: list[Any], packed: bool) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    fault = find_fault([str(path)], ["a", "b"])
    if fault is not None:
        assert str(path) in fault.where
        assert fault.remedy
    for i in range(len(rows)):
        assert place_of([str(path)], i) == f"{path}, line {i + 1}"


@quick
@given(content=st.binary(max_size=80), packed=st.booleans(), cut=st.integers(0, 200))
def test_any_bytes_are_looked_at(tmp_path: Path, content: bytes, packed: bool, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((gzip.compress(content) if packed else content)[:cut])
    fault = find_fault([str(path)], ["a"])
    assert fault is None or str(path) in fault.where
