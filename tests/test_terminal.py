"""What people are shown holds nothing that a terminal obeys, and is otherwise what it was."""

from __future__ import annotations

import io
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from peft_align.errors import Fault, InputError
from peft_align.terminal import one_line, plain, plain_console, say, say_what_ends_us

ATTACKS = {
    "clears the screen": "\x1b[2J\x1b[H",
    "a link": "\x1b]8;;https://evil.example\x07here\x1b]8;;\x07",
    "writes the clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "a control of one byte": "\x9b31m",
    "goes back over the line": "all is well\rrm -rf",
    "erases": "abc\b\b\b",
    "turns the text round": "\u202egpj.exe\u202c",
    "isolates": "\u2066x\u2069",
    "is not seen": "a\u200bb\ufeff\U000e0041",
    "breaks the line": "a\u2028b\u2029c\x85d",
    "half a character": "\ud83d",
    "ends the text": "a\x00b",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_a_terminal_would_obey_is_written_out(attack: str) -> None:
    found = plain(attack)
    assert found.isprintable()
    assert "\\" in found
    assert found.encode("ascii").decode("unicode_escape") == attack, "it can be read what was there"


def test_what_people_write_stays() -> None:
    text = "naïve 日本語 العربية हिन्दी 👩\u200d🔬 ✓ × ±\n\tsecond line"
    assert plain(text) == text


@given(st.text())
def test_nothing_obeyed_is_left_of_any_text(text: str) -> None:
    found = plain(text)
    assert not [
        c for c in found if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200c\u200d"
    ]
    assert plain(found) == found
    assert len(one_line(text).splitlines()) <= 1
    found.encode()  # half a character would raise


@given(st.text())
def test_a_console_shows_any_text_and_makes_nothing_of_it(text: str) -> None:
    console = plain_console(file=io.StringIO(), force_terminal=True, width=10_000)
    table = Table(box=None)
    table.add_column("[bold]x[/bold]")
    table.add_row(text)
    console.print(table)
    console.print(text)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert set(re.findall(r"\x1b[^m]*m?", written)) <= {"\x1b[1m", "\x1b[0m"}, (
        "the head of the table is bold, that is all"
    )


@pytest.mark.parametrize(
    "markup", ["[bold]x[/bold]", "[link=https://evil.example]x[/link]", "[red]x", "[/]", ":warning:"]
)
def test_markup_in_a_name_is_a_name(markup: str) -> None:
    console = plain_console(file=io.StringIO(), force_terminal=True, width=100)
    table = Table(title=markup, box=None)
    table.add_column(markup)
    table.add_row(markup)
    console.print(table, markup)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count(markup) == 4


def test_a_fault_is_one_line_that_a_terminal_does_not_obey() -> None:
    told = InputError([Fault("model.hub_id=\x1b[2Jx", "is not\n  - there: all is well", "a\rb")]).render()
    assert len(told.splitlines()) == 2
    assert "\\x1b[2Jx" in told


def test_what_is_said_is_plain_and_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    say("\x1b[2Jsee https://me:hidden@host/v1 \ud83d")
    assert capsys.readouterr().out == "\\x1b[2Jsee https://***@host/v1 \\ud83d\n"


def test_an_error_that_nobody_caught_is_told_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    say_what_ends_us()
    try:
        raise ValueError("\x1b]52;c;x\x07 at https://me:hidden@host")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    told = capsys.readouterr().err
    assert "ValueError: \\x1b]52;c;x\\x07 at https://***@host" in told
    assert "test_terminal.py" in told
