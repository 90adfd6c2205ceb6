"""Rooms import only from those below them; what people wait for imports no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peft_align

SOURCE = Path(peft_align.__file__).parent
# From the ground up; rooms of one level do not know each other.
LEVELS = [
    {"secrecy"}, {"terminal"}, {"errors"}, {"config"}, {"store"}, {"grid"}, {"data"}, {"models"},
    {"training", "evaluation"}, {"reporting", "launch"},
]  # fmt: skip
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("peft_align."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    file = SOURCE / f"{room}.py"
    files = [file] if file.is_file() else sorted((SOURCE / room).rglob("*.py"))
    for path in files:
        for other in imported_rooms(path) - {room}:
            assert LEVEL.get(other, 99) < LEVEL[room], f"{path.relative_to(SOURCE)} imports {other}"


def test_no_file_is_longer_than_400_lines() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
