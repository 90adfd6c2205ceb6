"""One living process at a time has a folder: on this machine, on others, whatever the clocks say."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_align.store import leases
from peft_align.store.leases import Lost, check, hold, is_held
from peft_align.store.runs import FORMAT, RunDir

HOLDER = """
import sys, time
from pathlib import Path
from peft_align.store import leases
if len(sys.argv) > 2:
    leases.machine = lambda: sys.argv[2]
with leases.hold(Path(sys.argv[1])) as lease:
    print("held" if lease else "refused", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another(folder: Path, *machine: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder, on this machine or on another."""
    command = [sys.executable, "-c", HOLDER, str(folder), *machine]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def no_flocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without them, as Lustre is when it is mounted so."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def from_elsewhere(folder: Path, **more: Any) -> Path:
    """The lease of a process on another machine, whose flock is not seen here."""
    path = folder / "lease" / "000003"
    path.parent.mkdir(parents=True)
    (folder / "lock").touch()
    content = {"machine": "elsewhere", "host": "node7", "pid": 1, "born": "1"}
    path.write_text(json.dumps(content | more))
    return path


def taken(folder: Path, **more: Any) -> bool:
    with hold(folder, **more) as lease:
        return lease is not None


def test_one_process_has_it_and_the_next_when_it_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number in (1, 2, 3):
        with hold(folder) as lease:
            assert lease is not None
            assert lease.number == number
            assert is_held(folder)
            assert not taken(folder)
        assert not is_held(folder)
    assert sorted(os.listdir(folder / "lease")) == ["000003", "000003.free"], "what is past is cleared away"


@pytest.mark.parametrize("flocks", [True, False])
def test_a_killed_holder_on_this_machine_is_followed_at_once(
    flocks: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not flocks:
        request.getfixturevalue("no_flocks")
    with another(tmp_path) as process:
        assert is_held(tmp_path)
        assert not taken(tmp_path)
        process.kill()
        process.wait()
        assert not is_held(tmp_path)
        assert taken(tmp_path)


def test_a_process_with_the_id_of_a_dead_holder_is_not_taken_for_it(tmp_path: Path, no_flocks: None) -> None:
    own = {"machine": leases.machine(), "pid": os.getpid()}
    from_elsewhere(tmp_path, **own, born="1")
    assert taken(tmp_path)


def test_a_living_holder_elsewhere_is_waited_for_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SILENCE", 0.3)
    path = from_elsewhere(tmp_path)
    for _ in range(10):
        os.utime(path)
        assert not taken(tmp_path)
        assert is_held(tmp_path)
        time.sleep(0.1)


def test_a_holder_elsewhere_that_is_silent_for_long_enough_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "SILENCE", 0.3)
    from_elsewhere(tmp_path)
    assert not taken(tmp_path)
    assert is_held(tmp_path)
    time.sleep(0.35)
    assert not is_held(tmp_path)
    with hold(tmp_path) as lease:
        assert lease is not None
        assert lease.number == 4


@pytest.mark.parametrize("years", [-30, 0, 30])
def test_no_clock_decides_that_a_holder_is_dead(years: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = from_elsewhere(tmp_path)
    there = time.time() + years * 365 * 86400
    os.utime(path, (there, there))
    assert not taken(tmp_path)
    assert is_held(tmp_path)
    monkeypatch.setattr(time, "time", lambda: there + 10 * leases.SILENCE)
    assert not taken(tmp_path)


def test_people_are_told_at_once_what_the_clock_says(tmp_path: Path) -> None:
    path = from_elsewhere(tmp_path)
    assert is_held(tmp_path, by_clock=True)
    old = time.time() - 2 * leases.SILENCE
    os.utime(path, (old, old))
    assert not is_held(tmp_path, by_clock=True)


def test_a_task_that_was_started_again_follows_itself_at_once(tmp_path: Path) -> None:
    from_elsewhere(tmp_path, task="12_3", start=0)
    assert not taken(tmp_path, task=("12_4", 1))
    assert not taken(tmp_path, task=("12_3", 0)), "another process of the same allocation"
    assert taken(tmp_path, task=("12_3", 1))


def test_a_task_that_the_scheduler_knows_to_be_over_is_followed_at_once(tmp_path: Path) -> None:
    from_elsewhere(tmp_path, task="12_3", start=0)
    assert not taken(tmp_path, ended="12_4")
    assert taken(tmp_path, ended="12_3")


def test_a_holder_that_was_taken_for_dead_may_not_write_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDir(tmp_path, "run")
    directory.attempt.mkdir(parents=True)
    with directory.lock() as mine:
        assert mine
        directory.report_progress(stage="train")
        saved = {"4": {"files": {"a": {"size": 0, "sha256": "0" * 64}}, "digest": "d"}}
        record = {"format": FORMAT, "run": "run", "checkpoints": saved, "metrics": {}, "parents": {}, "inputs": {}}
        (directory.attempt / "train.json").write_text(json.dumps(record))
        after = directory.path / "lease/000002"
        after.write_text("{}")
        before = {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
        for write in (
            directory.check,
            lambda: directory.report_progress(stage="train"),
            lambda: directory.fail("train", "for no reason"),
            directory.commit_attempt,
        ):
            with pytest.raises(Lost):
                write()
        directory.end_progress()
    assert {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()} == before


def test_a_living_holder_gives_signs_of_life_that_another_machine_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(leases, "_beats", [])
    with hold(tmp_path) as lease:
        assert lease is not None
        seen = set()
        for _ in range(6):
            seen.add(lease.path.stat().st_mtime_ns)
            time.sleep(0.1)
        assert len(seen) > 2
        (tmp_path / "lease/000002").write_text("{}")
        time.sleep(0.2)
        assert lease.lost


@pytest.mark.usefixtures("no_flocks")
def test_of_many_who_take_over_a_dead_holder_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flocks, as on machines that do not see each other's."""
    monkeypatch.setattr(leases, "SILENCE", 0.0)
    inside, most, turns = [0], [0], [0]
    counting = threading.Lock()

    def compete() -> None:
        for _ in range(40):
            with hold(tmp_path) as lease:
                if lease is None:
                    continue
                with counting:
                    inside[0] += 1
                    turns[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                check(tmp_path)
                with counting:
                    inside[0] -= 1

    from_elsewhere(tmp_path)
    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert turns[0] > 6


def test_a_damaged_lease_is_that_of_a_machine_that_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_elsewhere(tmp_path).write_bytes(b"\xff\x00")
    assert not taken(tmp_path)
    monkeypatch.setattr(leases, "SILENCE", 0.0)
    assert taken(tmp_path)


def test_a_look_at_a_folder_writes_nothing(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_holder_elsewhere_can_be_held_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose flocks reach all machines tells at once that the holder lives."""
    monkeypatch.setattr(leases, "SILENCE", 0.0)
    with another(tmp_path, "elsewhere"):
        assert is_held(tmp_path)
        assert not taken(tmp_path)
