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


def test_what_people_are_shown_goes_through_one_place() -> None:
    """terminal.py makes texts of others harmless: nobody else prints, or makes a console."""
    for path in SOURCE.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        if path.name != "terminal.py":
            assert not called & {"print", "Console", "rich.print", "traceback.print_exc"}, path


def test_models_of_others_are_loaded_without_their_code_and_their_pickles() -> None:
    loads = 0
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                of = ast.unparse(node.func.value)
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                loads += of.startswith("Auto")
                assert not of.startswith("Auto") or said["trust_remote_code"] == "False", path
                assert not of.startswith("AutoModel") or said["use_safetensors"] == "True", path
    assert loads >= 4
