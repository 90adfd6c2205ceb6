"""A run's directory: attempts are put in place as a whole, whatever kills them, and one process works on a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_align.store.records import Damaged, Digests, inventory, read_json, write_json
from peft_align.store.runs import FORMAT, PRODUCTS, RunDir, damage, step_name
from peft_align.store.shapes import TRAIN

STEPS = ("step-000002", "step-000004")
MUTATIONS = ("unlink", "rename", "replace", "rmdir", "mkdir", "remove", "link")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def record_of(content: str) -> dict[str, Any]:
    checkpoints = {"4": {"files": {}, "digest": content}}
    return {"format": FORMAT, "of": content, "checkpoints": checkpoints, "metrics": {}, "parents": {}, "inputs": {}}


def write(folder: Path, content: str) -> None:
    """Products and record of one attempt, told apart by their content."""
    for name in ("adapter", *(f"checkpoints/{step}" for step in STEPS)):
        (folder / name).mkdir(parents=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name / file).write_text(content, encoding="utf-8")
    (folder / "metrics.jsonl").write_text(content, encoding="utf-8")
    write_json(folder / "train.json", record_of(content))


def products(directory: RunDir) -> set[str]:
    """The contents of all products in place; 'missing' for each that is not there."""
    folders = [directory.adapter, *(directory.path / "checkpoints" / step for step in STEPS)]
    files = [f / name for f in folders for name in ("adapter_model.safetensors", "adapter_config.json")]
    files.append(directory.path / "metrics.jsonl")
    return {path.read_text(encoding="utf-8") if path.is_file() else "missing" for path in files}


def prepared(root: Path, *, old: bool) -> RunDir:
    """A run with a complete attempt 'new' and its last state, and what was there before it."""
    directory = RunDir(root, "run")
    if old:
        write(directory.path, "old")
    write(directory.attempt, "new")
    (directory.attempt / "scratch").mkdir()
    write_json(directory.state / "step-000050" / "record.json", {})
    return directory


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Have the count-th change of the file system never happen; returns the log of all that were begun."""
    log: list[str] = []

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            log.append(f"{name} {args[0]}")
            if len(log) == count:
                raise Killed
            return real(*args, **more)

        return call

    for name in MUTATIONS:
        monkeypatch.setattr(os, name, guarded(name, getattr(os, name)))
    return log


def steps_of_a_commit(root: Path, *, old: bool) -> int:
    """How many changes of the file system a commit makes."""
    directory = prepared(root, old=old)
    with pytest.MonkeyPatch.context() as patch:
        log = kill_at(patch, -1)
        assert directory.commit_attempt()
    return len(log)


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "the first"])
def test_an_attempt_is_put_in_place_as_a_whole(tmp_path: Path, old: bool) -> None:
    directory = prepared(tmp_path, old=old)
    assert directory.commit_attempt()
    assert (directory.train_record() or {})["of"] == "new"
    assert products(directory) == {"new"}
    assert not directory.attempt.exists()
    assert not directory.state.exists()
    assert not directory.commit_attempt()
    assert products(directory) == {"new"}


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "the first"])
def test_a_kill_at_any_step_of_a_commit_is_made_good_by_the_next(tmp_path: Path, old: bool) -> None:
    count = steps_of_a_commit(tmp_path / "counted", old=old)
    assert count >= len(PRODUCTS) + 2
    killed = 0
    for k in range(1, count + 1):
        directory = prepared(tmp_path / f"killed-{k}", old=old)
        with pytest.MonkeyPatch.context() as patch:
            log = kill_at(patch, k)
            try:
                directory.commit_attempt()
            except Killed:
                killed += 1
        record = directory.train_record()
        assert record is None or products(directory) == {record["of"]}, log
        directory.commit_attempt()
        assert (directory.train_record() or {})["of"] == "new", log
        assert products(directory) == {"new"}, log
        assert not directory.state.exists(), log
    assert killed == count


def test_kills_one_after_the_other_are_made_good_too(tmp_path: Path) -> None:
    directory = prepared(tmp_path, old=True)
    for _ in range(100):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, 3)
            try:
                directory.commit_attempt()
                break
            except Killed:
                record = directory.train_record()
                assert record is None or products(directory) == {record["of"]}
    assert (directory.train_record() or {})["of"] == "new"
    assert products(directory) == {"new"}


def test_states_are_those_with_a_record_the_newest_first(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    assert (directory.states(), directory.reached()) == ([], [0, 0, 0])
    for step in (50, 1_000_000, 999_999):
        write_json(directory.state / step_name(step) / "record.json", {})
    (directory.state / "step-2000000").mkdir()  # a kill came before its record
    write_json(directory.state / "step-x" / "record.json", {})
    write_json(directory.state / "record.json", {"step": 3_000_000})  # of earlier versions
    assert [folder.name for folder in directory.states()] == ["step-1000000", "step-999999", "step-000050"]
    assert directory.reached() == [0, 1_000_000, 0]


@pytest.mark.parametrize("damage", [None, "", '{"of": "ne'])
def test_an_attempt_without_a_whole_record_changes_nothing(tmp_path: Path, damage: str | None) -> None:
    directory = prepared(tmp_path, old=True)
    record = directory.attempt / "train.json"
    record.unlink() if damage is None else record.write_text(damage, encoding="utf-8")
    assert not directory.commit_attempt()
    assert (directory.train_record() or {})["of"] == "old"
    assert products(directory) == {"old"}


HOLD = """
import sys, time
from pathlib import Path
from peft_align.store.runs import RunDir
with RunDir(Path(sys.argv[1]), "run").lock() as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def holder(root: Path) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_run_is_held_against_another_process_and_let_go_when_that_is_killed(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    process = holder(tmp_path)
    try:
        assert directory.is_locked()
        with directory.lock() as mine:
            assert not mine
        assert directory.is_locked()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not directory.is_locked()
    with directory.lock() as mine:
        assert mine


def test_the_lock_of_one_run_is_not_that_of_another(tmp_path: Path) -> None:
    with RunDir(tmp_path, "one").lock() as one, RunDir(tmp_path, "two").lock() as two:
        assert one
        assert two
        with RunDir(tmp_path, "one").lock() as again:
            assert not again


def test_the_lock_is_let_go_after_an_exception(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")

    def fail() -> None:
        with directory.lock():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not directory.is_locked()


def test_asking_whether_a_run_is_locked_never_keeps_it_from_being_locked(tmp_path: Path) -> None:
    directory, stop = RunDir(tmp_path, "run"), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            directory.is_locked()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        refused = 0
        for _ in range(100):
            with directory.lock() as mine:
                refused += not mine
    finally:
        stop.set()
        asking.join()
    assert refused == 0


def test_a_record_of_another_format_counts_as_none(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    write_json(directory.path / "train.json", {"of": "old"})
    write_json(directory.evaluation("mmlu") / "record.json", {"format": FORMAT + 1})
    assert directory.train_record() is None
    assert directory.evaluation_record("mmlu") is None


def test_a_product_is_checked_against_its_record_when_it_is_read(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    with pytest.raises(Damaged, match="no record"):
        directory.product()
    write(directory.path, "fine")
    files = ("adapter_model.safetensors", "adapter_config.json")
    entry = {"files": inventory(directory.adapter, list(files), Digests(tmp_path / "digests.json")), "digest": "d"}
    record = record_of("fine") | {"checkpoints": {"2": entry, "4": entry}}
    write_json(directory.path / "train.json", record)
    assert directory.product() == directory.adapter
    assert directory.product(2) == directory.checkpoint(2)
    (directory.checkpoint(2) / files[0]).write_text("rotn", encoding="utf-8")  # as long as before
    assert directory.product(4) == directory.checkpoint(4)
    with pytest.raises(Damaged):
        directory.product(2)
    assert directory.train_record() == record
    directory.discard_record("rotten")
    assert directory.train_record() is None
    assert damage(directory.path / "train.json", TRAIN) == "rotten"


def test_asking_whether_a_run_is_locked_makes_nothing(tmp_path: Path) -> None:
    assert not RunDir(tmp_path, "run").is_locked()
    assert list(tmp_path.iterdir()) == []


def test_progress_and_failure_are_recorded_and_forgotten(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    directory.report_progress(stage="train", step=2)
    progress = directory.progress() or {}
    assert (progress["stage"], progress["step"], progress["pid"]) == ("train", 2, os.getpid())
    directory.fail("train", "out of memory", log="here")
    assert directory.progress() is None
    failure = directory.failure() or {}
    assert (failure["stage"], failure["reason"], failure["log"]) == ("train", "out of memory", "here")
    directory.clear_state()
    directory.clear_state()
    assert directory.failure() is None


def test_paths_are_as_documented(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    assert step_name(100) == "step-000100"
    assert directory.checkpoint(100) == tmp_path / "runs/run/checkpoints/step-000100"
    assert directory.evaluation("mmlu") == tmp_path / "runs/run/evaluations/mmlu"
    shutil.rmtree(tmp_path)
    assert read_json(directory.path / "train.json") is None


def test_what_killed_processes_left_goes_and_what_is_to_be_gone_on_with_stays(tmp_path: Path) -> None:
    directory = RunDir(tmp_path, "run")
    write(directory.path, "done")
    for name in ("evaluations/a/record.json", "evaluations/a/unfinished.jsonl", "evaluations/b/unfinished.jsonl",
                 "evaluations/a/.record.json.abcdefgh.tmp", ".progress.json.abcdefgh.tmp", "attempt/metrics.jsonl",
                 "state/record.json", "state.new/record.json"):  # fmt: skip
        (directory.path / name).parent.mkdir(parents=True, exist_ok=True)
        (directory.path / name).touch()

    def left() -> set[str]:
        files = {p.relative_to(directory.path).as_posix() for p in directory.path.rglob("*") if p.is_file()}
        return files - products_of(directory)

    directory.remove_leftovers(is_trained=False)
    evaluated = {"evaluations/a/record.json", "evaluations/b/unfinished.jsonl"}
    assert left() == {*evaluated, "attempt/metrics.jsonl", "state/record.json", "state.new/record.json"}
    directory.remove_leftovers(is_trained=True)
    assert left() == evaluated
    assert products(directory) == {"done"}


def products_of(directory: RunDir) -> set[str]:
    """The files of the products in place, and the record."""
    folders = ("adapter", *(f"checkpoints/{step}" for step in STEPS))
    files = {f"{f}/{name}" for f in folders for name in ("adapter_model.safetensors", "adapter_config.json")}
    return {*files, "metrics.jsonl", "train.json"}


# --- Links that somebody put where a training writes and deletes


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """Someone's folder, with names that a run uses too."""
    folder = tmp_path / "thesis"
    write(folder, "thesis")
    (folder / "scratch").mkdir()
    write_json(folder / "record.json", {"of": "thesis"})
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "place",
    [
        "attempt",
        "state",
        "state.new",
        "attempt/checkpoints",
        "attempt/checkpoints/step-000002",
        "attempt/adapter",
        "state/x",
    ],
)
def test_a_link_in_the_place_of_an_attempt_or_a_state_is_removed_and_nothing_behind_it(
    tmp_path: Path, thesis: Path, place: str
) -> None:
    before, directory = content_of(thesis), RunDir(tmp_path, "run")
    path = directory.path / place
    path.parent.mkdir(parents=True)
    path.symlink_to(thesis)
    assert not directory.commit_attempt()
    assert not path.is_symlink()
    assert content_of(thesis) == before


def test_a_file_of_an_attempt_that_is_a_link_is_removed(tmp_path: Path, thesis: Path) -> None:
    directory = RunDir(tmp_path, "run")
    directory.attempt.mkdir(parents=True)
    (directory.attempt / "metrics.jsonl").symlink_to(thesis / "metrics.jsonl")
    directory.drop_links()
    assert list(directory.attempt.iterdir()) == []
    assert (thesis / "metrics.jsonl").read_text(encoding="utf-8") == "thesis"


@pytest.mark.parametrize("name", ["adapter", "checkpoints"])
def test_a_product_that_is_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path, thesis: Path, name: str) -> None:
    before, directory = content_of(thesis), prepared(tmp_path, old=True)
    shutil.rmtree(directory.path / name)
    (directory.path / name).symlink_to(thesis)
    assert directory.commit_attempt()
    assert products(directory) == {"new"}
    assert content_of(thesis) == before
