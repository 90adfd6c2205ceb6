"""A journal keeps what was appended, whatever happens to its last line and whatever its texts hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from flips import flipped
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_align.store.journal import Journal, read_entries

HEAD = {"model": "abc", "prompts": "def", "steps": (1, 2)}  # a tuple: a list when it is read again
TEXTS = [
    "plain", "", "two\nlines", "a\rb", "a\r\nb", "line\u2028separator", "paragraph\u2029separator", "next\x85line",
    "\x0b\x0c\x1c\x1d\x1e\x00\x7f", "ü ± ” 猫 👍🏽", '"quoted" \\n {"id": 1}',
]  # fmt: skip


def filled(path: Path, *batches: list[dict[str, Any]]) -> Journal:
    journal = Journal(path, HEAD)
    for batch in batches:
        journal.append(batch)
    return journal


def test_what_was_appended_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "journal.jsonl"
    journal = filled(path, [{"id": "a", "n": 1}, {"id": "b", "n": None}], [], [{"id": "c", "more": {"x": [0.5]}}])
    wanted = [{"id": "a", "n": 1}, {"id": "b", "n": None}, {"id": "c", "more": {"x": [0.5]}}]
    assert journal.entries == wanted
    again = Journal(path, HEAD)
    assert again.entries == wanted
    again.append([{"id": "d"}])
    assert Journal(path, HEAD).entries == [*wanted, {"id": "d"}]
    assert read_entries(path, HEAD) == [*wanted, {"id": "d"}]


def test_entries_are_in_the_file_when_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", HEAD)
    for i in range(3):
        journal.append([{"id": i}])
        assert read_entries(tmp_path / "journal", HEAD) == journal.entries == [{"id": n} for n in range(i + 1)]


@pytest.mark.parametrize("lost", range(1, 12))
def test_a_last_line_that_is_not_whole_is_cut_off(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "journal"
    filled(path, [{"id": "a", "text": "ü"}], [{"id": "b", "text": "üü"}])
    whole = path.read_bytes()
    assert len(whole.splitlines()[-1]) > 12
    path.write_bytes(whole[:-lost])  # even without its newline alone
    assert read_entries(path, HEAD) == [{"id": "a", "text": "ü"}]
    assert path.read_bytes() == whole[:-lost]  # a reader changes nothing: another process may be writing
    journal = Journal(path, HEAD)
    assert journal.entries == [{"id": "a", "text": "ü"}]
    journal.append([{"id": "b", "text": "üü"}])
    assert path.read_bytes() == whole


def test_nothing_is_taken_from_behind_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path, [{"id": "a"}, {"id": "b"}, {"id": "c"}])
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\x00" * 12  # as a file system may leave it when the power fails
    path.write_bytes(b"\n".join(lines))
    assert Journal(path, HEAD).entries == [{"id": "a"}]
    assert path.read_bytes() == b"\n".join(lines[:2]) + b"\n"


def test_no_bit_can_be_another_without_the_line_being_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    entries = [{"id": "a", "answer": "[[A]]"}, {"id": "b", "answer": "[[B]]"}, {"id": "c", "answer": None}]
    filled(path, entries)
    for place in flipped(path):
        found = read_entries(path, HEAD)
        assert all({"id": e.get("id"), "answer": e.get("answer")} in entries for e in found), place
        whole = path.read_bytes()
        assert Journal(path, HEAD).entries in (entries[:n] for n in range(4)), place
        path.write_bytes(whole)


def test_answers_of_before_lines_had_a_check_are_known(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text(json.dumps({"head": HEAD}) + "\n" + json.dumps({"question": "a", "answer": "b"}) + "\n")
    assert read_entries(path, HEAD) == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize("content", [b"", b"\n", b"null\n", b'{"head"', b"\xff\xfe\n", b"[1]\n{}\n"])
def test_a_file_that_is_no_journal_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    assert read_entries(path, HEAD) == []
    journal = Journal(path, HEAD)
    assert journal.entries == []
    journal.append([{"id": "a"}])
    assert Journal(path, HEAD).entries == [{"id": "a"}]


@pytest.mark.parametrize("other", [{}, HEAD | {"model": "abd"}, HEAD | {"more": None}])
def test_a_journal_of_something_else_is_begun_anew(tmp_path: Path, other: dict[str, Any]) -> None:
    path = tmp_path / "journal"
    filled(path, [{"id": "a"}])
    assert read_entries(path, other) == []
    assert Journal(path, other).entries == []
    assert read_entries(path, HEAD) == []  # gone: the file is about `other` now
    assert read_entries(path, other) == []


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_survives_whatever_characters_it_holds(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal"
    entries = [{"id": text, "text": text}, {"id": "after", "text": "x"}]
    filled(path, entries)
    assert Journal(path, HEAD).entries == entries
    assert path.read_bytes().count(b"\n") == 3


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_any_texts_survive(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "journal"
    entries = [{"id": text, "text": text} for text in texts]
    filled(path, entries)
    assert Journal(path, HEAD).entries == entries


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    answer = json.loads('"cut in an emoji: \\ud83d"')  # as an API's JSON may spell an answer of max_tokens
    filled(path, [{"answer": answer}])
    assert Journal(path, HEAD).entries == [{"answer": answer}]


def test_a_removed_journal_is_gone_and_removing_it_again_does_nothing(tmp_path: Path) -> None:
    journal = filled(tmp_path / "journal", [{"id": "a"}])
    journal.remove()
    journal.remove()
    assert os.listdir(tmp_path) == []
    assert read_entries(tmp_path / "journal", HEAD) == []
