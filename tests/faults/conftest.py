"""What the tests of faults share: a process that starts sweeps at once, what an undisturbed sweep leaves, the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbed import OUTCOMES, Disturbed, table
from sweeps import WORDS, Server, prepare, products

Disturb = Callable[..., Disturbed]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("profanity_check")
    with Server(tmp_path_factory.mktemp("server") / "cache") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing happened to."""
    folder = prepare(tmp_path_factory.mktemp("undisturbed"))
    ended = server.run(folder, "sweep", *WORDS)
    assert ended.code == 0, ended.told[-3000:]
    return folder


@pytest.fixture(scope="session")
def reference(undisturbed: Path) -> dict[str, Any]:
    return products(undisturbed / "outputs")


@pytest.fixture
def disturb(server: Server, reference: dict[str, Any], tmp_path: Path) -> Disturb:
    """A sweep to disturb, under a name of the fault."""

    def begin(name: str, folder: Path = tmp_path, **more: Any) -> Disturbed:
        return Disturbed(name, server, folder, reference, **more)

    return begin


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.write_line("")
        terminalreporter.write_line(table())
