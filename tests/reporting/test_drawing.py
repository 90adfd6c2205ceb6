"""What vl-convert makes is made by a process of its own, whose troubles are told."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_align.errors import WorkError
from peft_align.reporting.drawing import bundle, drawn

BAR = {"data": {"values": [{"a": 1, "b": "x"}]}, "mark": "bar", "encoding": {"x": {"field": "a"}, "y": {"field": "b"}}}


def test_each_chart_is_drawn_in_both_forms() -> None:
    pictures = drawn({"one": BAR, "two": BAR})
    assert list(pictures) == ["one.svg", "one.pdf", "two.svg", "two.pdf"]
    assert pictures["one.svg"].startswith(b"<svg")
    assert pictures["two.pdf"].startswith(b"%PDF")


def test_a_chart_that_cannot_be_drawn_is_named() -> None:
    with pytest.raises(WorkError, match="figures could not be drawn: broken: Vega-Lite to SVG conversion failed"):
        drawn({"one": BAR, "broken": {"mark": "no mark"}})


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkError, match="figures could not be drawn: exit code 1"):
        drawn({"one": BAR})


def test_other_threads_go_on_while_it_draws() -> None:
    pauses, last = [], time.perf_counter()
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(drawn, {str(i): BAR for i in range(20)})
        while not waiting.done():
            time.sleep(0.001)
            pauses.append(-last + (last := time.perf_counter()))
        assert len(waiting.result()) == 40
    assert max(pauses) < sum(pauses) / 4  # where the GIL is held, the first chart alone is a pause of more


def test_the_libraries_are_one_script_that_ends_with_the_line_asked_for() -> None:
    script = bundle("window.here = vegaEmbed;")
    assert "window.here" in script
    assert len(script) > 500_000
