"""Records are whole or absent; digests are those of what lies there now."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flips import flipped

from peft_align.errors import InputError
from peft_align.store import records
from peft_align.store.records import (
    Damaged,
    Digests,
    atomic_write,
    cache_dir,
    complete,
    digest_of,
    forget_damage,
    inventory,
    link_tree,
    notice_of,
    read_json,
    remove_tree,
    set_aside,
    sha256,
    verify,
    write_json,
)
from peft_align.store.runs import damage


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "text": "ü ± ”", "path": Path("x")}
    write_json(tmp_path / "deeper" / "record.json", content)
    assert read_json(tmp_path / "deeper" / "record.json") == content | {"path": "x"}


@pytest.mark.parametrize("old", [None, "old"])
def test_an_exception_while_writing_leaves_what_was_there(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "record.json"
    if old is not None:
        path.write_text(old, encoding="utf-8")

    def broken() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        broken()
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["record.json"])
    assert old is None or path.read_text(encoding="utf-8") == old


@pytest.mark.parametrize("name", ["fsync", "open"])
def test_a_failure_to_reach_the_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"old": 1})

    def full(*args: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(records.os, name, full)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"new": 1})
    monkeypatch.undo()
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "record.json", []
    real: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))
        real(descriptor)

    monkeypatch.setattr(records.os, "fsync", fsync)
    write_json(path, {"a": 1})
    assert len(seen) == 2
    assert (seen[0][0].endswith(".tmp"), seen[0][1]) == (True, False)
    assert seen[1] == (tmp_path.name, True)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"[1]", b"3", b"null", b"\xff\xfe", b'{"a": 1} x'])
def test_a_damaged_record_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    assert read_json(path) is None


def test_a_record_in_which_one_bit_is_another_is_none_or_has_its_content(tmp_path: Path) -> None:
    path, content = tmp_path / "record.json", {"format": 1, "digest": "0a1b", "loss": [0.25, 1e-05], "text": "ü ” é"}
    write_json(path, content)
    for place in flipped(path):
        found = read_json(path)
        assert found is None or {key: found.get(key) for key in content} == content, place


def test_a_record_that_was_written_without_a_seal_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in ({"a": 1}, {}, {"b": {"seal": 1}}):
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        assert read_json(path) == content
        write_json(path, content)
        assert read_json(path) == content


def test_a_record_that_was_set_aside_is_absent_and_says_why_until_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    assert damage(path, {}) is None
    write_json(path, {"a": 1})
    set_aside(path, "weights are damaged")
    assert read_json(path) is None
    assert damage(path, {}) == "weights are damaged"
    assert (read_json(notice_of(path)) or {})["record"] == {"a": 1}
    forget_damage(path)
    forget_damage(path)
    assert (damage(path, {}), list(tmp_path.iterdir())) == (None, [])
    path.write_text("{", encoding="utf-8")
    assert damage(path, {}) == "its train.json is damaged: no JSON object"


@pytest.mark.parametrize("known", ["size", "sha256"])
def test_a_product_is_verified_by_what_its_record_knows(tmp_path: Path, known: str) -> None:
    entry = {"size": 3, **({"sha256": hashlib.sha256(b"123").hexdigest()} if known == "sha256" else {})}
    (tmp_path / "file").write_bytes(b"123")
    verify(tmp_path, {"file": entry})
    for content in (b"1234", *([b"124"] if known == "sha256" else [])):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(Damaged, match="is damaged"):
            verify(tmp_path, {"file": entry})
    (tmp_path / "file").unlink()
    with pytest.raises(Damaged, match="is missing"):
        verify(tmp_path, {"file": entry})


def test_an_absent_record_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_json(tmp_path / "nothing.json") is None
    assert read_json(tmp_path / "file" / "below.json") is None


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content is really read."""
    seen: list[Path] = []

    def read(path: Path) -> str:
        seen.append(path)
        return sha256(path)

    monkeypatch.setattr(records, "sha256", read)
    return seen


def test_a_digest_is_read_once_while_the_file_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "weights", tmp_path / "digests.json"
    path.write_bytes(b"abc")
    seen = counted(monkeypatch)
    digests = Digests(memory)
    expected = hashlib.sha256(b"abc").hexdigest()
    assert [digests.of(path), digests.of(path)] == [expected, expected]
    digests.save()
    assert Digests(memory).of(path) == expected
    assert seen == [path]


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_digest_is_read_again_when_size_or_time_changed(tmp_path: Path, change: str) -> None:
    path, memory = tmp_path / "weights", tmp_path / "digests.json"
    path.write_bytes(b"abc")
    stat = path.stat()
    digests = Digests(memory)
    old = digests.of(path)
    digests.save()
    path.write_bytes(b"abcd" if change == "size" else b"xyz")
    time = stat.st_mtime_ns + (1 if change == "time" else 0)
    os.utime(path, ns=(time, time))
    new = sha256(path)
    assert new != old
    assert digests.of(path) == new
    assert Digests(memory).of(path) == new


def test_a_digest_is_that_of_the_file_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    link = tmp_path / "link"
    digests = Digests(tmp_path / "digests.json")
    link.symlink_to("one")
    before = digests.of(link)
    link.unlink()
    link.symlink_to("two")
    assert (before, digests.of(link)) == (sha256(tmp_path / "one"), sha256(tmp_path / "two"))


def test_digests_of_another_process_are_kept_and_a_damaged_memory_is_no_fault(tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    one, two = Digests(memory), Digests(memory)
    for name, digests in (("a", one), ("b", two)):
        (tmp_path / name).write_text(name, encoding="utf-8")
        digests.of(tmp_path / name)
    one.save()
    two.save()
    assert {Path(name).name for name in read_json(memory) or {}} == {"a", "b"}
    for content in ("{", json.dumps({str((tmp_path / "a").resolve()): "what"})):
        memory.write_text(content, encoding="utf-8")
        assert Digests(memory).of(tmp_path / "a") == sha256(tmp_path / "a")


def test_a_memory_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    digests = Digests(tmp_path / "file" / "digests.json")
    digests.of(tmp_path / "file")
    digests.save()


def test_an_inventory_has_sizes_and_digests_and_one_digest_of_all(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"22")
    (tmp_path / "a").write_bytes(b"1")
    found = inventory(tmp_path, ["b", "a"], Digests(tmp_path / "digests.json"))
    assert list(found) == ["a", "b"]
    assert found["b"] == {"size": 2, "sha256": hashlib.sha256(b"22").hexdigest()}
    assert digest_of(found) == digest_of(dict(reversed(found.items())))
    assert digest_of(found) != digest_of({"a": found["b"], "b": found["a"]})
    assert digest_of(found) != digest_of({"c": found["a"], "b": found["b"]})


def test_what_is_incomplete_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert complete(tmp_path, {"a": {"size": 3}}) is None
    assert complete(tmp_path, {"a": {"size": 4}}) == f"{tmp_path.name}/a has 3 bytes, not 4"
    assert complete(tmp_path, {"a": {"size": 3}, "b": {"size": 0}}) == f"{tmp_path.name}/b is missing"


@pytest.mark.parametrize("has_links", [True, False])
def test_a_second_copy_of_a_folder_has_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    (tmp_path / "a" / "deeper").mkdir(parents=True)
    (tmp_path / "a" / "deeper" / "file").write_bytes(b"content")
    if not has_links:

        def refuse(*args: object) -> None:
            raise OSError("not supported")

        monkeypatch.setattr(records.os, "link", refuse)
    link_tree(tmp_path / "a", tmp_path / "b")
    one, two = (tmp_path / name / "deeper" / "file" for name in "ab")
    assert two.read_bytes() == b"content"
    assert one.samefile(two) == has_links


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PEFT_ALIGN_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "peft_align"
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


# --- Who may read and write what is made


@pytest.mark.parametrize(
    ("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640), (0o002, 0o664), (0, 0o664)]
)
def test_a_record_has_the_mode_that_the_user_gives_new_files_and_is_never_writable_for_all(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "record.json", {})
        assert os.umask(umask) == umask, "as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "record.json").stat().st_mode) == mode


def test_what_a_program_makes_is_never_writable_for_all(tmp_path: Path) -> None:
    program = (
        "import os, pathlib; os.umask(0)\n"
        "from peft_align.store.records import keep_others_from_writing, write_json\n"
        "keep_others_from_writing()\n"
        "write_json(pathlib.Path('a/b/record.json'), {}); open('log', 'a').close(); os.system('touch child')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    made = list(tmp_path.rglob("*"))
    assert len(made) == 5
    assert not [path for path in made if path.stat().st_mode & stat.S_IWOTH]


def test_a_cache_that_everybody_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cache"
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(place))
    assert cache_dir() == place, "it will be made"
    place.mkdir()
    assert cache_dir() == place
    place.chmod(0o1777)
    with pytest.raises(InputError, match="PEFT_ALIGN_CACHE"):
        cache_dir()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize(("of_parent", "refused"), [(0o1777, True), (0o755, False)])
def test_a_cache_of_another_user_is_refused_where_anybody_could_have_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_parent: int, refused: bool
) -> None:
    place = tmp_path / "shared" / "peft_align"
    place.mkdir(parents=True)
    os.chown(place, 12345, 12345)
    place.parent.chmod(of_parent)
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(place))
    if refused:
        with pytest.raises(InputError, match="another user"):
            cache_dir()
    else:
        assert cache_dir() == place


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "attempt").symlink_to(tmp_path / "mine")
    remove_tree(tmp_path / "attempt")
    remove_tree(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.tex").is_file()
    remove_tree(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []
