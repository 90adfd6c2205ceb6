"""clean: what it finds, what it never touches, and that a kill in the middle loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_judgement, finish_training, metric, plan, trained

from peft_align.clean import verb as clean
from peft_align.errors import InputError
from peft_align.grid.runs import Sweep
from peft_align.launch import queue
from peft_align.launch.leftovers import WHAT
from peft_align.store.records import write_json
from peft_align.store.runs import RunDir
from peft_align.store.submissions import new_submission
from peft_align.store.sweeps import write_manifest
from peft_align.store.usage import taken

Verb = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "seed=0,1", "benchmark.over_refusal.judge=local_lm")
BENCHMARKS = "evaluation.benchmarks=[everyday_mc,over_refusal]"
OLD = time.time() - 40 * 86400


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of converted models of its own, and no Slurm."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(cache))
    monkeypatch.setattr(queue, "is_there", lambda: False)
    return cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished sweep of two runs and a baseline, with one of everything that can go."""
    root, sweep = tmp_path / "outputs", asked()
    for run in trained(sweep):
        finish_training(root, run)
    for item in plan(sweep, root):
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)])
        for judgement in item.judgements:
            finish_judgement(root, judgement, [metric("refusal_rate", 0.5)])
    write_manifest(root / "sweeps/adhoc-1", [*WORDS, BENCHMARKS], [], [run.id for run in sweep.runs])
    first, second = (RunDir(root, run.id) for run in trained(sweep))
    written(first.state / "optimizer.pt", 30_000)
    written(first.attempt / "scratch/rest", 10_000)
    written(second.path / "state.new/weights.safetensors", 20_000)
    written(second.path / ".record.json.k3.tmp", 9, old=True)
    written(second.path / ".record.json.k4.tmp", 9)
    for i, name in enumerate(("a", "b")):
        written(root / f"reference/{name}/00.json", 50_000, old=True)
        written(root / f"tokenized/{name}.npz", 50_000, old=True)
        for path in (root / "reference" / name, root / f"tokenized/{name}.npz"):
            os.utime(path, (OLD + i, OLD + i))
    written(root / "judges/local_lm-1/answers.jsonl", 1_000, old=True)
    written(first.evaluation("mmlu-step-000004-0123") / "record.json", 100)
    written(next((second.path / "evaluations").glob("over*")) / "judgements/gpt4-0123/record.json", 100)
    written(RunDir(root, "of-nobody").path / "train.json", 100)
    os.utime(RunDir(root, "of-nobody").path, (OLD, OLD))
    written(first.log, 100, old=True)
    written(root / "best.yaml", 100, old=True)
    return root


def asked(*more: str) -> Sweep:
    return expand(*WORDS, BENCHMARKS, *more)


def written(path: Path, size: int, *, old: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    if old:
        os.utime(path, (OLD, OLD))
    return path


def found(root: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """What a command line lists, by kind."""
    capsys.readouterr()
    assert clean([f"root={root}", *words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["bytes"] == sum(group["bytes"] for group in content["groups"].values())
    return {what: {entry["path"] for entry in group["paths"]} for what, group in content["groups"].items()}


def files(root: Path) -> dict[str, bytes]:
    """Everything under the root, but for locks, which are taken and let go."""
    paths = (p for p in root.rglob("*") if p.is_file() and p.name != "lock" and p.parent.name != "lease")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def done(root: Path) -> list[tuple[str, bool]]:
    return [(item.run.id, item.done) for item in plan(asked(), root)]


def test_without_a_flag_it_lists_and_touches_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(root)
    assert clean([f"root={root}", *WHAT, "disk.cache_gb=0"]) == 0
    shown = capsys.readouterr().out
    assert files(root) == before
    assert all(f"{what}: " in shown for what in WHAT)
    assert "nothing was removed: the same command with --yes removes it" in shown


def test_by_itself_it_finds_only_what_no_result_depends_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run.id for run in trained(asked()))
    listed = found(root, "disk.cache_gb=0.00016", capsys=capsys)
    assert listed == {
        "states": {f"runs/{first}/state", f"runs/{first}/attempt", f"runs/{second}/state.new"},
        "temporary": {f"runs/{second}/.record.json.k3.tmp"},
        "caches": {"reference/a", "tokenized/a.npz"},  # the two that were used before the others
        "code": set(),
    }


def test_what_is_removed_is_what_was_listed_and_plan_says_the_same(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, known = files(root), done(root)
    assert all(finished for _, finished in known)
    listed = set.union(*found(root, "disk.cache_gb=0", capsys=capsys).values())
    assert clean([f"root={root}", "disk.cache_gb=0", "--yes"]) == 0
    gone = before.keys() - files(root).keys()
    assert gone == {name for name in before if any(Path(name).is_relative_to(path) for path in listed)}
    assert len(gone) == 8
    assert done(root) == known
    assert found(root, "disk.cache_gb=0", capsys=capsys) == {
        w: set() for w in ("states", "temporary", "caches", "code")
    }


def test_what_is_asked_for_by_name_is_found_and_nothing_of_a_sweep(
    root: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (run.id for run in trained(asked()))
    written(own_cache / "models/converted/model.safetensors", 100)
    judged = next((RunDir(root, second).path / "evaluations").glob("over*")).name
    listed = found(root, "evaluations", "runs", "logs", "models", capsys=capsys)
    assert listed == {
        "evaluations": {
            f"runs/{first}/evaluations/mmlu-step-000004-0123",
            f"runs/{second}/evaluations/{judged}/judgements/gpt4-0123",
        },
        "runs": {"runs/of-nobody"},
        "logs": {f"runs/{first}/train.log"},
        "models": {str(own_cache / "models/converted")},
    }
    assert clean([f"root={root}", "evaluations", "runs", "logs", "models", "--yes"]) == 0
    assert all(finished for _, finished in done(root))
    assert not (root / "runs/of-nobody").exists()
    assert not (own_cache / "models/converted").exists()
    assert found(root, "logs", "days=60", capsys=capsys) == {"logs": set()}


def test_evaluations_of_a_sweep_that_cannot_be_asked_for_any_more_stay(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run.id for run in asked().runs]
    write_manifest(root / "sweeps/gone-1", ["+grid=of_a_folder_that_is_gone"], [], runs)
    assert clean([f"root={root}", "evaluations", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["groups"]["evaluations"]["paths"] == []
    assert any("+grid=of_a_folder_that_is_gone" in note for note in content["notes"])


def test_a_parent_of_a_run_that_a_sweep_names_is_not_nobodys(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = trained(asked())[0].id
    write_json(RunDir(root, child).path / "run.json", {"id": child, "parents": ["of-nobody"]})
    assert found(root, "runs", capsys=capsys) == {"runs": set()}


def test_a_run_that_a_process_holds_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (RunDir(root, run.id) for run in trained(asked()))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), first.id], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert clean([f"root={root}", "states", "evaluations", "logs", "--yes"]) == 0
    finally:
        holder.communicate(b"\n")
    assert f"runs/{first.id} is left alone: a process works on it" in capsys.readouterr().out
    assert (first.state / "optimizer.pt").is_file()
    assert first.evaluation("mmlu-step-000004-0123").is_dir()
    assert first.log.is_file()
    assert not (second.path / "state.new").exists()


HOLD = """
import sys
from pathlib import Path
from peft_align.store.runs import RunDir
with RunDir(Path(sys.argv[1]), sys.argv[2]).lock() as mine:
    assert mine
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    first, second = (RunDir(root, run.id) for run in trained(asked()))
    for name, place in (("state", second.state), ("run", root / "runs/linked"), ("ref", root / "reference/linked")):
        written(elsewhere / name / "kept", 10_000, old=True)
        os.utime(elsewhere / name, (OLD, OLD))
        place.symlink_to(elsewhere / name)
    (first.attempt / "scratch/link").symlink_to(elsewhere / "run")
    written(elsewhere / "sweeps/s/code/0123/kept", 10, old=True)
    (root / "sweeps").rename(tmp_path / "sweeps")
    (root / "sweeps").symlink_to(elsewhere / "sweeps")
    before = files(elsewhere)
    assert clean([f"root={root}", "states", "temporary", "caches", "code", "disk.cache_gb=0", "--yes"]) == 0
    assert not first.attempt.exists()
    assert files(elsewhere) == before
    assert (second.state.is_symlink(), (root / "reference/linked").is_symlink()) == (True, True)


def test_states_and_attempts_of_runs_that_are_not_done_are_what_they_go_on_from(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (RunDir(root, run.id) for run in trained(asked()))
    first.discard_record("for a test")
    next(second.checkpoint(4).iterdir()).unlink()  # it is to be trained again
    assert found(root, "states", capsys=capsys) == {"states": set()}


def test_a_complete_attempt_that_was_not_put_in_place_yet_is_no_leftover(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = RunDir(root, trained(asked())[0].id)
    write_json(first.attempt / "train.json", first.train_record() or {})
    listed = found(root, "states", capsys=capsys)["states"]
    assert not any(first.id in path for path in listed)


@pytest.fixture
def submitted(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three snapshots: of jobs 1 (ended) and 2 (living), and of scripts that were only written."""
    living: dict[str, queue.Task] = {}
    for name, job in (("ended", "1"), ("living", "2"), ("dry", None)):
        sweep = root / "sweeps/main-1"
        written(sweep / "code" / name / "src/x.py", 100)
        told = {"name": "main", "runs": [], "report": None, "folder": str((sweep / "code" / name).resolve())}
        submission = new_submission(sweep, {**told, "dry_run": job is None})
        submission.content["arrays"] = [{"name": "00-train", "job": job, "tasks": [["a"]], "stages": ["train"]}]
        submission.save()
    living["2_0"] = queue.Task("2_0", "RUNNING", "x", "")
    monkeypatch.setattr(queue, "is_there", lambda: True)
    monkeypatch.setattr(queue, "live_tasks", lambda jobs, users=(): living)
    return living


def test_frozen_code_goes_when_the_jobs_that_run_it_have_ended(
    root: Path, submitted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert found(root, "code", capsys=capsys) == {"code": {"sweeps/main-1/code/ended"}}
    submitted.clear()
    both = {"sweeps/main-1/code/ended", "sweeps/main-1/code/living"}
    assert found(root, "code", capsys=capsys) == {"code": both}


def test_without_slurm_frozen_code_stays(
    root: Path, submitted: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(queue, "is_there", lambda: False)
    assert clean([f"root={root}", "code"]) == 0
    assert "frozen code is left alone" in capsys.readouterr().out


class Killed(BaseException):
    """As a kill ends a program: nothing catches it."""


def test_a_kill_at_any_moment_loses_nothing_and_the_same_command_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"root={root}", "states", "temporary", "caches", "runs", "disk.cache_gb=0", "--yes"]
    listed = set.union(*found(root, *words[1:-1], capsys=capsys).values())
    kept = {name for name in files(root) if not any(Path(name).is_relative_to(path) for path in listed)}
    known, left = done(root), 0
    kills = 0
    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir", "replace"):
            patch.setattr(os, name, _dying(getattr(os, name), lambda: left))
        while True:
            left = kills + 1  # the next call of these but so many is not made any more
            _dying.made = 0  # type: ignore[attr-defined]
            try:
                assert clean(words) == 0
                break
            except Killed:
                kills += 1
            assert kept <= files(root).keys()
            assert done(root) == known
            assert kills < 500
    assert kills > 8
    assert files(root).keys() == kept
    assert list(root.rglob("*.removed")) == []


def _dying(real: Callable[..., Any], left: Callable[[], int]) -> Callable[..., Any]:
    """A call that is made so many times together with its like, and then kills."""

    def call(*words: Any, **more: Any) -> Any:
        _dying.made += 1  # type: ignore[attr-defined]
        if _dying.made > left():  # type: ignore[attr-defined]
            raise Killed
        return real(*words, **more)

    return call


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stats"], "did you mean 'states'?"),
        (["cache_gb=3"], "did you mean 'disk.cache_gb'?"),
        (["days=-1"], "days: -1 is out of range"),
        (["days=1,2"], "has one value here"),
        (["--all"], "no such flag"),
        (["+grid=main"], "main"),
        (["root=nowhere"], "there are no results there"),
    ],
)
def test_a_wrong_word_is_told_and_nothing_is_removed(root: Path, words: list[str], told: str) -> None:
    before = files(root)
    given = [] if any(word.startswith("root=") for word in words) else [f"root={root}"]
    with pytest.raises(InputError) as caught:
        clean([*given, *words, "--yes"])
    assert told in caught.value.render()
    assert files(root) == before


def test_the_program_imports_no_torch_and_its_examples_are_three(verb: Verb, root: Path) -> None:
    text = verb("clean", "--help", check=True).stdout
    assert sum(line.strip().startswith("python -m peft_align.clean") for line in text.splitlines()) == 3
    assert all(f"\n  {what} " in text for what in WHAT)
    command = "import sys; from peft_align.clean import verb; verb(sys.argv[1:]); print(sorted({*sys.modules} & HEAVY))"
    heavy = command.replace("HEAVY", "{'torch', 'pandas', 'scipy', 'transformers', 'datasets'}")
    done = subprocess.run([sys.executable, "-c", heavy, f"root={root}", *WHAT], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_sizes_count_a_file_with_two_names_once_and_follow_no_link(tmp_path: Path) -> None:
    written(tmp_path / "a/one", 100_000)
    os.link(tmp_path / "a/one", tmp_path / "a/two")
    alone = taken(tmp_path / "a/one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/link").symlink_to(tmp_path / "a")
    assert alone >= 100_000
    assert taken(tmp_path / "a") == alone + taken(tmp_path / "b") - taken(tmp_path / "b/link")
    assert taken(tmp_path / "a/one", tmp_path / "a/two", tmp_path / "none") == alone
