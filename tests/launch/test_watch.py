"""What is shown of runs: their states in one line each, the ends of their logs, whatever stands in them."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from sweeping import expand

from peft_align.launch.watch import LOG_BYTES, State, line, table, tail
from peft_align.store.runs import RunDir
from peft_align.terminal import plain_console, say

NASTY = "\x1b[2J\x1b]52;c;cm0=\x07[bold]x[/bold]\u202e\nDONE everything is well"


def test_a_state_is_one_line_whatever_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    say(line(State(f"run{NASTY}", "failed", f"train: ValueError: {NASTY}")))
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 1
    assert told.rstrip("\n").isprintable()
    assert "[bold]x[/bold]\\u202e\\nDONE" in told


def test_the_live_table_shows_reasons_as_they_are() -> None:
    console = plain_console(file=io.StringIO(), width=400, force_terminal=True)
    states = [State("a", "failed", f"train: {NASTY}"), State("b", "running", f"evaluate {NASTY}", step="1/2")]
    console.print(table(states, time.time()))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in written
    assert "\x1b]" not in written
    assert written.count("[bold]x[/bold]\\u202e\\nDONE") == 2


def test_the_end_of_a_log_is_its_last_lines_as_they_stood_at_last(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(b"first\r\n" + b"".join(b"line %d\n" % i for i in range(30)) + b"0%\r50%\r100%\nat last \xff")
    assert tail(log).splitlines()[1:] == [*(f"  | line {i}" for i in range(17, 30)), "  | 100%", "  | at last \ufffd"]
    log.write_bytes(b"a\r\nb\r\n")
    assert tail(log).splitlines()[1:] == ["  | a", "  | b"]


def test_of_a_large_log_no_more_is_read_than_its_end(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with log.open("wb") as file:
        file.truncate(2**40)  # it takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe end\n")
    assert tail(log).endswith("| the end")
    assert len(tail(log)) <= LOG_BYTES + 1000


@pytest.mark.parametrize("name", ["/dev/zero", "/", "/proc/self/mem/x", "absent", "x\x00y"])
def test_what_is_no_log_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert tail(Path(name)) == "  (no log)"


def test_status_shows_a_hostile_log_and_reason_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_align import status

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    words = ("model=tiny", "dataset=everyday", "method=sft", "peft=lora")
    run = expand(*words).runs[0]
    directory = RunDir(tmp_path / "outputs", run.id)
    directory.path.mkdir(parents=True)
    directory.log.write_text(f"{NASTY}\n", encoding="utf-8")
    directory.fail("train", f"ValueError: {NASTY} https://me:hidden@host", log=str(directory.log))
    assert "hidden" not in (directory.path / "failed.json").read_text(encoding="utf-8")
    assert status.verb([*words]) == 0
    told = capsys.readouterr().out
    assert told.replace("\n", "").isprintable()
    assert "  | \\x1b[2J\\x1b]52;c;cm0=\\x07[bold]x[/bold]\\u202e" in told
