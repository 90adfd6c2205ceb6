"""An exported folder is there as a whole or not at all, and what people made of one is never written over."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_align.errors import InputError
from peft_align.store import exports
from peft_align.store.exports import RECORD, REPLACED, UNCHANGED, WRITTEN, export_fault, write_export
from peft_align.store.records import Damaged, read_json, sha256

TEXTS = {"README.md": "a card\n"}
FACTS = {"format": 1, "run": "a"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "run/adapter"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"abc")
    (folder / "config").write_bytes(b"{}")
    return folder


def files(folder: Path) -> dict[str, dict[str, object]]:
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_copies_are_whole_and_none_of_the_run_s_own(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep/exports/a"
    assert write_export(target, source, files(source), TEXTS, FACTS) == WRITTEN
    assert {path.name for path in target.iterdir()} == {"weights", "config", "README.md", RECORD}
    assert (target / "weights").stat().st_ino != (source / "weights").stat().st_ino
    (target / "weights").write_bytes(b"edited")
    assert (source / "weights").read_bytes() == b"abc"
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_the_same_again_touches_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_export(target, source, files(source), TEXTS, FACTS)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (target, *target.iterdir())}
    assert write_export(target, source, files(source), TEXTS, FACTS) == UNCHANGED
    assert before == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (target, *target.iterdir())}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]


def test_an_export_that_nobody_touched_is_written_again_where_more_is_known(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_export(target, source, files(source), TEXTS, FACTS)
    assert write_export(target, source, files(source), {"README.md": "more seeds\n"}, FACTS) == REPLACED
    assert (target / "README.md").read_text() == "more seeds\n"
    assert export_fault(target) == {**FACTS, "files": (read_json(target / RECORD) or {})["files"]}


@pytest.mark.parametrize("change", ["edited", "added", "removed", "record"])
def test_what_was_changed_since_is_not_written_over(source: Path, tmp_path: Path, change: str) -> None:
    target = tmp_path / "a"
    write_export(target, source, files(source), TEXTS, FACTS)
    if change == "removed":
        (target / "README.md").unlink()
    elif change == "record":
        (target / RECORD).write_text("{}", encoding="utf-8")
    else:
        (target / ("README.md" if change == "edited" else "LICENSE")).write_text("mine", encoding="utf-8")
    before = contents(target)
    told = "is no export of peft_align" if change == "record" else "was changed since it was exported"
    with pytest.raises(InputError, match=told):
        write_export(target, source, files(source), {"README.md": "more"}, FACTS)
    assert contents(target) == before


def test_what_is_none_of_ours_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder/sub").mkdir(parents=True)
    for name, told in (("file", "is no folder"), ("link", "is no folder"), ("folder", "is no export of peft_align")):
        with pytest.raises(InputError, match=told):
            write_export(tmp_path / name, source, files(source), TEXTS, FACTS)
    (tmp_path / "empty").mkdir()
    assert write_export(tmp_path / "empty", source, files(source), TEXTS, FACTS) == WRITTEN


@pytest.mark.parametrize("damage", [b"abd", b"ab", None])
def test_a_damaged_file_is_refused_by_its_own_name_and_leaves_nothing(
    source: Path, tmp_path: Path, damage: bytes | None
) -> None:
    known = files(source)
    (source / "weights").unlink()
    if damage is not None:
        (source / "weights").write_bytes(damage)
    with pytest.raises(Damaged, match=str(source / "weights")):
        write_export(tmp_path / "a", source, known, TEXTS, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("at", ["sync_tree", "_put"])
def test_a_kill_at_any_moment_leaves_no_half_made_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    target = tmp_path / "a"

    def killed(*paths: Path) -> None:
        if at == "_put":  # between its two renames
            target.replace(target.with_name(".a.old.tmp"))
        raise KeyboardInterrupt

    write_export(target, source, files(source), TEXTS, FACTS)
    with monkeypatch.context() as patch:
        patch.setattr(exports, at, killed)
        with pytest.raises(KeyboardInterrupt):
            write_export(target, source, files(source), {"README.md": "more"}, FACTS)
    assert target.exists() == (at != "_put")
    assert write_export(target, source, files(source), {"README.md": "more"}, FACTS) == REPLACED
    assert (target / "README.md").read_text() == "more"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]
