"""Training states that are damaged, half written or cannot be written: the one before leads to the same end."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import interrupted, left, run_of, steps_of_states, trained, trajectory

from peft_align.grid.runs import Run
from peft_align.models.loading import Base, load_base
from peft_align.store.records import read_json, write_json
from peft_align.store.runs import RunDir
from peft_align.training import recorder, state
from peft_align.training.numerics import TrainingFailed
from peft_align.training.run import train

SMALL = (
    "model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=4", "train.batch_size=2",
    "train.max_length=100", "train.state_every=1", "train.learning_rate=1e-2",
)  # fmt: skip
FILES = (
    "weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "metrics.jsonl",
    "record.json",
)  # fmt: skip


class Killed(BaseException):
    """The process is gone: nothing that would clean up after it does."""


def changes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes what is on disk."""
    if name == "io_open":
        mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
        return any(letter in str(mode) for letter in "wax+")
    return name != "os_open" or bool(args[1] & os.O_CREAT)


class Disk:
    """Counts the changes of the disk while it is watched, and fails at one of them.

    Attributes:
        made: how many there were since `fail` was told.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.watched, self.made, self.at, self.error = False, 0, 0, OSError()
        self.failed: BaseException | None = None
        for module, name in (
            *((os, name) for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "truncate", "open")),
            (io, "open"),
            (builtins, "open"),
        ):
            label = "os_open" if (module, name) == (os, "open") else "io_open" if name == "open" else name
            monkeypatch.setattr(module, name, self._counted(label, getattr(module, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.watched and changes(name, args, kwargs):
                self.made += 1
                if isinstance(self.failed, Killed):
                    raise self.failed
                if self.made == self.at:
                    self.failed = self.error
                    raise self.error
            return real(*args, **kwargs)

        return call

    def fail(self, at: int, error: BaseException) -> None:
        """Raise an error at a change to come; if it is Killed, at all later ones, too."""
        self.at, self.error, self.made, self.failed = at, error, 0, None

    @contextmanager
    def during(self) -> Iterator[None]:
        self.watched = True
        try:
            yield
        finally:
            self.watched = False


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(run_of(*SMALL).config)


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the run undisturbed."""
    root = tmp_path_factory.mktemp("whole")
    trained(run_of(*SMALL), root, base)
    return root


@pytest.fixture(scope="module")
def stopped(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the run stopped after its third step: it has the states of steps 3 and 2."""
    root = tmp_path_factory.mktemp("stopped")
    interrupted(run_of(*SMALL), root, base, 3)
    return root


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def steps_made(run: Run, root: Path, base: Base) -> list[int]:
    """Train to the end; the steps that were made."""
    steps: list[int] = []
    train(run, RunDir(root, run.id), base, lambda metrics, step: steps.append(step))
    return steps


def assert_same(root: Path, whole: Path, run: Run) -> None:
    """Weights, metrics and losses are those of the run undisturbed, to the bit; nothing else is left."""
    assert left(root, run) == left(whole, run)
    assert trajectory(root, run) == trajectory(whole, run)
    ours, theirs = (RunDir(folder, run.id) for folder in (root, whole))
    assert (ours.train_record() or {})["loss"] == (theirs.train_record() or {})["loss"]
    assert sorted(path.name for path in ours.path.iterdir()) == sorted(path.name for path in theirs.path.iterdir())


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["a bit", "half", "all"])
@pytest.mark.parametrize("name", FILES)
def test_the_state_before_a_damaged_one_is_gone_on_from(
    name: str,
    damage: Callable[[Path], None],
    whole: Path,
    stopped: Path,
    base: Base,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, root = run_of(*SMALL), tmp_path / "cut"
    shutil.copytree(stopped, root)
    newest, _ = RunDir(root, run.id).states()
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    damage(newest / name)
    assert steps_made(run, root, base) == [3, 4]
    told = capsys.readouterr().out
    if (name, damage) != ("record.json", Path.unlink):  # without one, it was never whole
        what = "missing" if damage is Path.unlink else "damaged"
        assert f"the training state step-000003 is passed over: {newest / name} is {what}" in told
    assert_same(root, whole, run)


def test_without_a_whole_state_training_begins_again(whole: Path, stopped: Path, base: Base, tmp_path: Path) -> None:
    run, root = run_of(*SMALL), tmp_path / "cut"
    shutil.copytree(stopped, root)
    for folder, name in zip(RunDir(root, run.id).states(), ("weights.safetensors", "optimizer.pt"), strict=True):
        flip(folder / name)
    assert steps_made(run, root, base) == [1, 2, 3, 4]
    assert_same(root, whole, run)


def test_metrics_that_were_damaged_since_are_those_of_the_state(
    whole: Path, stopped: Path, base: Base, tmp_path: Path
) -> None:
    run, root = run_of(*SMALL), tmp_path / "cut"
    shutil.copytree(stopped, root)
    flip(RunDir(root, run.id).attempt / "metrics.jsonl")
    assert steps_made(run, root, base) == [4]
    assert_same(root, whole, run)


def test_a_flipped_bit_of_a_record_is_seen_or_changes_nothing_that_it_says(stopped: Path, tmp_path: Path) -> None:
    """Of some bits nothing depends: the last digit of a float may stand for the same number, e is E."""
    run, root = run_of(*SMALL), tmp_path / "cut"
    shutil.copytree(stopped, root)
    folder = RunDir(root, run.id).states()[0]
    path, content = folder / "record.json", (folder / "record.json").read_bytes()
    inputs = json.loads(content)["inputs"]
    record = state._verified(folder, inputs, {4})
    assert record["step"] == 3
    seen = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 7]) + content[at + 1 :])
        try:
            assert state._verified(folder, inputs, {4}) == record, at
        except state.Damaged:
            seen += 1
    assert seen > 0.98 * len(content)


def test_a_checkpoint_that_is_damaged_leads_back_to_the_state_before_it(base: Base, tmp_path: Path) -> None:
    run, cut = run_of(*SMALL, "train.checkpoint_steps=[3,4]"), tmp_path / "cut"
    trained(run, tmp_path / "whole", base)
    directory = interrupted(run, cut, base, 3)
    flip(directory.attempt / "checkpoints" / "step-000003" / "adapter_model.safetensors")
    assert steps_made(run, cut, base) == [3, 4]
    assert_same(cut, tmp_path / "whole", run)


def test_a_checkpoint_that_is_asked_for_since_is_made_by_going_back(base: Base, tmp_path: Path) -> None:
    run, more = run_of(*SMALL), run_of(*SMALL, "train.checkpoint_steps=[3,4]")
    assert run.id == more.id
    interrupted(run, tmp_path / "cut", base, 3)
    trained(more, tmp_path / "whole", base)
    assert steps_made(more, tmp_path / "cut", base) == [3, 4]
    assert_same(tmp_path / "cut", tmp_path / "whole", more)


@pytest.mark.parametrize(("keep", "kept"), [(1, [3]), (2, [3, 2]), (9, [3, 2, 1])])
def test_as_many_states_are_kept_as_are_asked_for(keep: int, kept: list[int], base: Base, tmp_path: Path) -> None:
    run = run_of(*SMALL, f"train.keep_states={keep}")
    assert run.id == run_of(*SMALL).id
    assert steps_of_states(interrupted(run, tmp_path, base, 3)) == kept


def test_a_state_of_other_data_is_not_gone_on_from(stopped: Path, base: Base, tmp_path: Path) -> None:
    run, root = run_of(*SMALL), tmp_path / "cut"
    shutil.copytree(stopped, root)
    for folder in RunDir(root, run.id).states():
        record = read_json(folder / "record.json") or {}
        record["inputs"]["data"] = "another digest"
        write_json(folder / "record.json", record)
    assert steps_made(run, root, base) == [1, 2, 3, 4]


def test_a_state_as_earlier_versions_kept_it_is_passed_over(
    whole: Path, stopped: Path, base: Base, tmp_path: Path
) -> None:
    run, root = run_of(*SMALL), tmp_path / "cut"
    shutil.copytree(stopped, root)
    directory = RunDir(root, run.id)
    newest, before = directory.states()
    for name in FILES:
        (newest / name).rename(directory.state / name)
    newest.rmdir()
    before.rename(directory.state.with_name("state.new"))
    assert steps_made(run, root, base) == [1, 2, 3, 4]
    assert_same(root, whole, run)


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["state", "end"])
def test_a_kill_before_any_change_that_saving_a_state_makes_loses_no_earlier_one(
    to_the_end: bool,
    whole: Path,
    stopped: Path,
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
) -> None:
    """From the state of step 2, step 3 is made and its state saved, which is to take the place of the other."""
    run = run_of(*SMALL, "train.keep_states=1")
    inputs = json.loads((RunDir(stopped, run.id).states()[0] / "record.json").read_text())["inputs"]
    reference = {folder.name: folder for folder in RunDir(stopped, run.id).states()}
    save, found = recorder.save_state, []

    def killed(directory: RunDir, *args: Any) -> bool:
        """Whether a kill before the next change, of the disk as it is, comes before all are made; what is left then."""
        copy = RunDir(tmp_path / str(len(found)), run.id)
        shutil.copytree(directory.root, copy.root)
        disk.fail(len(found) + 1, Killed())
        try:
            with disk.during():
                save(copy, *args)
        except Killed:
            folder, record = state.find_state(copy, inputs, {4}) or (None, {"step": 0})
            assert folder is not None
            for name in set(FILES) - {"record.json", "metrics.jsonl", "trainer_state.json"}:  # which tell the time
                assert (folder / name).read_bytes() == (reference[folder.name] / name).read_bytes(), name
            found.append(record["step"])
            return True
        return False

    def watched(*args: Any) -> str | None:
        while killed(*args):
            pass
        return save(*args)

    root = tmp_path / "root"
    shutil.copytree(stopped, root)
    shutil.rmtree(RunDir(root, run.id).states()[0])
    monkeypatch.setattr(recorder, "save_state", watched)
    assert steps_made(run, root, base) == [3, 4]
    monkeypatch.setattr(recorder, "save_state", save)
    assert_same(root, whole, run)
    for number in range(len(found)) if to_the_end else ():
        assert steps_made(run, tmp_path / str(number), base)[-1] == 4
        assert_same(tmp_path / str(number), whole, run)
    assert found == sorted(found), "once the new one is whole it stays"
    assert found.count(2) > 15, found
    assert found.count(3) > 5, found


def test_a_kill_before_any_change_that_finding_a_state_makes_changes_nothing(
    stopped: Path, tmp_path: Path, disk: Disk
) -> None:
    run = run_of(*SMALL)
    inputs = json.loads((RunDir(stopped, run.id).states()[0] / "record.json").read_text())["inputs"]
    kills = 0
    while True:
        kills += 1
        root = tmp_path / str(kills)
        shutil.copytree(stopped, root)
        directory = RunDir(root, run.id)
        flip(directory.states()[0] / "optimizer.pt")
        stray = directory.attempt / "checkpoints" / "step-000003" / "adapter_config.json"
        stray.parent.mkdir(parents=True)
        stray.write_text("{}")
        disk.fail(kills, Killed())
        died = True
        try:
            with disk.during():
                state.find_state(directory, inputs, {4})
            died = False
        except Killed:
            pass
        found = state.find_state(directory, inputs, {4})
        assert found is not None
        assert found[0].name == "step-000002"
        assert [path.name for path in directory.state.iterdir()] == ["step-000002"]
        assert not stray.parent.exists()
        lines = (directory.attempt / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        if not died:
            break
    assert kills > 8, kills


def test_a_disk_that_is_full_at_any_change_costs_a_state_and_nothing_else(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state of each step fails at one change later than that of the step before."""
    run = run_of(*(word for word in SMALL if "max_steps" not in word), "train.max_steps=40")
    trained(run, tmp_path / "whole", base)
    save, made, lost = recorder.save_state, [], []

    def watched(directory: RunDir, trainer: Any, step: int, *args: Any) -> str | None:
        disk.fail(step, OSError(errno.ENOSPC, "No space left on device"))
        with disk.during():
            why = save(directory, trainer, step, *args)
        made.append(disk.made)
        if why:
            lost.append(step)
            assert "No space left on device" in why
        newest = next(s for s in range(step, 0, -1) if s not in lost) if len(lost) < step else None
        assert steps_of_states(directory)[:1] == ([newest] if newest else [])
        return why

    monkeypatch.setattr(recorder, "save_state", watched)
    record = trained(run, tmp_path / "full", base)
    assert len(record["loss"]) == 40
    assert len(lost) > 12, lost
    assert lost[-1] < 39, "and a state that nothing fails of is saved again"
    assert max(made) < 39, "there were steps to fail at every change"
    assert capsys.readouterr().out.count("cannot be written: [Errno 28] No space left on device") == len(lost)
    assert_same(tmp_path / "full", tmp_path / "whole", run)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond so many bytes fails, in every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 20_000], ids=["safetensors", "torch.save"])
def test_what_libraries_say_of_a_full_disk_is_understood(
    size: int, whole: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, save = run_of(*SMALL), recorder.save_state

    def limited(*args: Any) -> str | None:
        with files_of_at_most(size):
            return save(*args)

    monkeypatch.setattr(recorder, "save_state", limited)
    trained(run, tmp_path, base)
    assert capsys.readouterr().out.count("warning: the training state of step") == 3
    assert_same(tmp_path, whole, run)


def test_a_checkpoint_that_cannot_be_written_fails_the_run_which_goes_on_when_there_is_room(
    whole: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, save = run_of(*SMALL), recorder.save_adapter

    def limited(*args: Any) -> Any:
        with files_of_at_most(100):
            return save(*args)

    monkeypatch.setattr(recorder, "save_adapter", limited)
    with pytest.raises(TrainingFailed, match=r"the checkpoint of step 4 cannot be written: .*File too large"):
        trained(run, tmp_path, base)
    monkeypatch.undo()
    assert steps_made(run, tmp_path, base) == [4]
    assert_same(tmp_path, whole, run)


@pytest.mark.parametrize("what", ["metrics.jsonl", "the adapter", "the record"])
def test_a_product_that_cannot_be_written_fails_the_run_with_the_reason(
    what: str, whole: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_align.training import run as module

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {"metrics.jsonl": (recorder, "atomic_write"), "the adapter": (module, "link_tree")}
    monkeypatch.setattr(*place.get(what, (module, "write_json")), full)
    run = run_of(*SMALL)
    with pytest.raises(TrainingFailed, match=rf"^{what} cannot be written: \[Errno 28\] No space left on device$"):
        trained(run, tmp_path, base)
    monkeypatch.undo()
    assert steps_made(run, tmp_path, base) == [4]
    assert_same(tmp_path, whole, run)
