"""Frozen code: a copy for each content, that nothing changes any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_align.store import code
from peft_align.store.code import code_digest, freeze, package


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in the place of this one, and a conf/ beside it."""
    folder = tmp_path / "src/peft_align"
    for name, text in (("__init__.py", "version = 1\n"), ("data/rows.jsonl", "{}\n"), ("conf.py", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "data/__pycache__").mkdir()
    (folder / "data/__pycache__/rows.pyc").write_bytes(b"compiled")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text("seed: 0\n", encoding="utf-8")
    (tmp_path / "conf/published.csv").write_text("table,model\n", encoding="utf-8")
    monkeypatch.setattr(code, "package", lambda: folder)
    code_digest.cache_clear()
    return folder


@pytest.fixture
def own(tmp_path: Path) -> list[Path]:
    """Two folders of a user's own options."""
    folders = [tmp_path / "own", tmp_path / "more options"]
    for folder in folders:
        (folder / "model").mkdir(parents=True)
        (folder / "model/mine.yaml").write_text(f"# {folder.name}\n", encoding="utf-8")
    return folders


def frozen(tmp_path: Path, dirs: list[Path] | None = None) -> Path:
    return freeze(tmp_path / "sweep", tmp_path / "conf", dirs or [])


def test_code_options_and_the_users_own_are_copied_without_what_python_compiled(
    tmp_path: Path, checkout: Path, own: list[Path]
) -> None:
    place = frozen(tmp_path, own)
    found = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    assert found == [
        "conf/config.yaml",
        "conf/published.csv",
        "config-0/model/mine.yaml",
        "config-1/model/mine.yaml",
        "src/peft_align/__init__.py",
        "src/peft_align/conf.py",
        "src/peft_align/data/rows.jsonl",
    ]
    assert (place / "config-1/model/mine.yaml").read_text() == "# more options\n"
    assert place.parent == tmp_path / "sweep/code"


def test_the_same_content_is_copied_once(tmp_path: Path, checkout: Path) -> None:
    place = frozen(tmp_path)
    kept = (place / "src/peft_align/__init__.py").stat().st_ino
    (checkout / "__pycache__").mkdir()
    (checkout / "__pycache__/new.pyc").write_bytes(b"compiled")
    assert frozen(tmp_path) == place
    assert (place / "src/peft_align/__init__.py").stat().st_ino == kept
    assert [path.name for path in (tmp_path / "sweep/code").iterdir()] == [place.name]


@pytest.mark.parametrize("edited", ["src/peft_align/__init__.py", "conf/config.yaml", "own/model/mine.yaml"])
def test_what_is_edited_is_another_copy_and_the_first_stays_as_it_was(
    tmp_path: Path, checkout: Path, own: list[Path], edited: str
) -> None:
    first = frozen(tmp_path, own)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    (tmp_path / edited).write_text("changed: true\n", encoding="utf-8")
    assert frozen(tmp_path, own) != first
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_file_that_is_renamed_is_another_content(tmp_path: Path, checkout: Path) -> None:
    first = frozen(tmp_path)
    (checkout / "conf.py").rename(checkout / "konf.py")
    assert frozen(tmp_path) != first


def test_options_of_the_user_in_another_order_are_another_content(
    tmp_path: Path, checkout: Path, own: list[Path]
) -> None:
    assert frozen(tmp_path, own) != frozen(tmp_path, own[::-1])


def test_a_copy_that_a_kill_left_half_made_is_made_anew(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(code, "sync_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            frozen(tmp_path)
    assert list((tmp_path / "sweep/code").iterdir()) == []
    place = frozen(tmp_path)
    assert (place / "src/peft_align/__init__.py").read_text() == "version = 1\n"
    assert [path.name for path in (tmp_path / "sweep/code").iterdir()] == [place.name]


def test_the_digest_is_that_of_the_code_alone(tmp_path: Path, checkout: Path) -> None:
    first = code_digest()
    assert len(first) == 16
    assert int(first, 16) >= 0
    (tmp_path / "conf/config.yaml").write_text("seed: 1\n", encoding="utf-8")
    code_digest.cache_clear()
    assert code_digest() == first
    (checkout / "__init__.py").write_text("version = 2\n", encoding="utf-8")
    code_digest.cache_clear()
    assert code_digest() != first
    code_digest.cache_clear()


def test_the_package_is_the_one_that_runs_and_needs_no_torch_to_be_frozen() -> None:
    import peft_align

    assert package() == Path(peft_align.__file__).parent
    ask = "import sys, peft_align.store.code as c; c.code_digest(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout == "False\n"


def test_of_options_what_is_no_option_is_left_where_it_is(tmp_path: Path, checkout: Path, own: list[Path]) -> None:
    (own[0] / ".#mine.yaml").symlink_to("an-editors-lock")
    (own[0] / "notes.txt").write_text("not read by anybody", encoding="utf-8")
    (own[0] / "model/loop").symlink_to(own[0])
    place = frozen(tmp_path, own[:1])
    assert [path.name for path in (place / "config-0").rglob("*") if path.is_file()] == ["mine.yaml"]


def test_results_that_lie_among_the_options_are_not_copied(tmp_path: Path, checkout: Path) -> None:
    (tmp_path / "mine.yaml").write_text("", encoding="utf-8")
    for name in ("runs", "sweeps/one"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
    (tmp_path / "outputs/sweeps/one/old.yaml").write_text("", encoding="utf-8")
    place = freeze(tmp_path / "outputs/sweeps/one", tmp_path / "conf", [tmp_path])
    names = [path.relative_to(place / "config-0").as_posix() for path in (place / "config-0").rglob("*.yaml")]
    assert sorted(names) == ["conf/config.yaml", "mine.yaml"]
    assert freeze(tmp_path / "outputs/sweeps/one", tmp_path / "conf", [tmp_path]) == place


def test_options_behind_a_link_are_part_of_the_copy_and_of_its_name(
    tmp_path: Path, checkout: Path, own: list[Path]
) -> None:
    (own[0] / "train").symlink_to(own[1] / "model")
    before = frozen(tmp_path, own[:1])
    assert (before / "config-0/train/mine.yaml").read_text() == "# more options\n"
    (own[1] / "model/mine.yaml").write_text("# edited\n", encoding="utf-8")
    after = frozen(tmp_path, own[:1])
    assert after != before
    assert (after / "config-0/train/mine.yaml").read_text() == "# edited\n"
