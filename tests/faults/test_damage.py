"""Products that are cut, changed by a bit, emptied or deleted: found, made again, and nothing else with them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from audit import Fault
from disturbed import OUTCOMES, Disturbed, sum_up
from sweeps import RUNS, Server, prepare

from peft_align.store.runs import RunDir

Disturb = Callable[..., Disturbed]
# What plan --verify finds: a file, and what is made again with it (relative to the run).
TRAINED = ("train.json", "adapter", "checkpoints", "metrics.jsonl")
RECORDED = {
    "training record": ("*-dpo-*/train.json", TRAINED),
    "adapter weights": ("*-sft-*/adapter/adapter_model.safetensors", TRAINED),
    "adapter config": ("*-sft-*/adapter/adapter_config.json", TRAINED),
    "checkpoint": ("*-dpo-*/checkpoints/step-000001/adapter_model.safetensors", TRAINED),
    "metrics": ("*-dpo-*/metrics.jsonl", TRAINED),
    "evaluation record": ("*-sft-*/evaluations/preference-*/record.json", ()),
    "evaluation samples": ("*-sft-*/evaluations/everyday_mc-*/samples.jsonl.gz", ()),
    "texts": ("*-dpo-*/evaluations/real_toxicity-*/samples.jsonl.gz", ()),
    "judgement record": ("*-dpo-*/evaluations/real_toxicity-*/judgements/*/record.json", ()),
    "judgement samples": ("*-dpo-*/evaluations/real_toxicity-*/judgements/*/samples.jsonl.gz", ()),
    "merge record": ("merge-*/merge.json", ("merge.json", "merged")),
    "saved merge": ("merge-*/merged/adapter/adapter_model.safetensors", ("merge.json", "merged")),
    "description of a run": ("*-sft-*/run.json", ("run.json",)),
}
HARMS = ("flip", "cut", "empty", "delete")
# What checks itself when it is read, or is of no consequence.
UNRECORDED = {
    "reference buckets": "outputs/reference/*/*.json",
    "token ids": "outputs/tokenized/*.npz",
    "manifest": "outputs/sweeps/*/sweep.json",
    "tables": "outputs/sweeps/*/results.*",
    "job files": "outputs/sweeps/*/jobs/*",
    "locks": "outputs/runs/*/lock",
    "digests in the cache": "",
}


def harm(path: Path, how: str) -> None:
    """Harm a file in its place, as a disk would: other names of it are harmed too."""
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "flip" and content:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder, hard links and times of change included."""
    subprocess.run(["cp", "-a", f"{folder}/.", str(to)], check=True)
    (to / "changes").unlink(missing_ok=True)
    return to


def to_do(sweep: Disturbed) -> set[str]:
    plan = json.loads(sweep.command(None, "plan", "--json").told)
    assert len(plan["run_list"]) == RUNS
    return {run["id"] for run in plan["run_list"] if run["to_do"]}


def found_and_mended(sweep: Disturbed, pattern: str, again: Sequence[str], how: str) -> None:
    """Harm one product; plan --verify finds it, the next sweep makes that again and touches nothing else."""
    path = sorted((sweep.root / "runs").glob(pattern))[0]
    run = path.relative_to(sweep.root / "runs").parts[0]
    scope = [f"{sweep.root}/runs/{run}/{name}" for name in again] or [str(path.parent)]
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (sweep.root / "runs").rglob("*") if p.is_file()}
    harm(path, how)
    sweep.count += 1
    told = sweep.server.run(sweep.folder, "plan", *sweep.words, "--verify", "--json")
    damaged = json.loads(told.told)["damaged"]
    is_absent = how == "delete" and path.name in ("train.json", "merge.json", "record.json")
    assert told.code == (0 if is_absent else 1), (path, how, told.told[-2000:])
    assert [entry["run_id"] for entry in damaged] == ([] if is_absent else [run]), (path, how)
    assert to_do(sweep) == (set() if path.name == "run.json" else {run}), (path, how)
    ended = sweep.server.run(sweep.folder, "sweep", *sweep.words)
    assert ended.code == 0, (path, how, ended.told[-3000:])
    sweep.found += [
        f"redone: {p} after {how} of {path}"
        for p, stamp in before.items()
        if not any(str(p).startswith(place) for place in scope)
        and p.name not in ("train.log", "run.json", "lock", "history.jsonl")
        and p.parent.name != "lease"
        and (not p.is_file() or (p.stat().st_ino, p.stat().st_mtime_ns) != stamp)
    ]
    assert not list(sweep.root.rglob("*.damaged.json"))
    verified = sweep.server.run(sweep.folder, "plan", *sweep.words, "--verify")
    assert (verified.code, to_do(sweep)) == (0, set()), (path, how)


@pytest.mark.slow
@pytest.mark.parametrize("product", ["adapter weights", "texts"])
def test_a_few_bits(disturb: Disturb, undisturbed: Path, tmp_path: Path, product: str) -> None:
    sweep = disturb(f"a bit flipped (cut): {product}", copied(undisturbed, tmp_path))
    found_and_mended(sweep, *RECORDED[product], "flip")
    sweep.end()


@pytest.mark.acceptance
@pytest.mark.parametrize("product", RECORDED)
def test_what_is_recorded(disturb: Disturb, undisturbed: Path, tmp_path: Path, product: str) -> None:
    sweep = disturb(f"{product}: {', '.join(HARMS)}", copied(undisturbed, tmp_path))
    for how in HARMS:
        found_and_mended(sweep, *RECORDED[product], how)
    sweep.end()


@pytest.mark.acceptance
@pytest.mark.parametrize("product", UNRECORDED)
def test_what_checks_itself(disturb: Disturb, undisturbed: Path, tmp_path: Path, product: str, server: Server) -> None:
    """The runs that read what is shared are trained again after each harm."""
    sweep = disturb(f"{product}: {', '.join(HARMS)}", copied(undisturbed, tmp_path))
    for how in HARMS:
        pattern = UNRECORDED[product]
        paths = sorted(sweep.folder.glob(pattern)) if pattern else [server.cache / "digests.json"]
        assert paths
        for path in paths:
            harm(path, how)
        sweep.count += len(paths)
        for record in (sweep.root / "runs").glob("*-dpo-*/train.json"):
            record.unlink()
        ended = sweep.server.run(sweep.folder, "sweep", *sweep.words)
        assert ended.code == 0, (product, how, ended.told[-3000:])
    sweep.end()


@pytest.fixture(scope="module")
def interrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was killed in the last step of a DPO run, whose failure of before is remembered."""
    folder = prepare(tmp_path_factory.mktemp("interrupted"))
    sweep = Disturbed("", server, folder, {})
    place = r"open .*-helpful-dpo-[^/]*/attempt/metrics\.jsonl"
    sweep.command(Fault(match=place, nth=2, do="kill_all", who=("worker",)))
    (run,) = (folder / "outputs/runs").glob("*-helpful-dpo-*")
    directory = RunDir(folder / "outputs", run.name)
    progress = (run / "progress.json").read_bytes()
    directory.fail("train", "it fell over")
    (run / "progress.json").write_bytes(progress)
    assert {path.name for path in run.iterdir()} >= {"state", "attempt", "failed.json", "history.jsonl"}
    return folder


def of_an_attempt(folder: Path) -> Iterator[str]:
    """What an interrupted run has."""
    (run,) = (folder / "outputs/runs").glob("*-helpful-dpo-*")
    yield from sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name != "train.log")


@pytest.mark.acceptance
def test_what_an_interrupted_run_has(
    disturb: Disturb, interrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names, since = list(of_an_attempt(interrupted)), len(OUTCOMES)
    assert len(names) > 8
    for name in names:
        for how in HARMS:
            folder = copied(interrupted, tmp_path_factory.mktemp("attempt"))
            sweep = disturb(f"{name} of an interrupted run: {how}", folder)
            (path,) = (sweep.root / "runs").glob(f"*-helpful-dpo-*/{name}")
            harm(path, how)
            sweep.count += 1
            sweep.end()
    sum_up(f"each of {len(names)} files of an interrupted run: {', '.join(HARMS)}", since)
