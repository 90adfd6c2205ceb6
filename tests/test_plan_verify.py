"""plan --verify reads all that runs have: what is damaged is told, set aside, and made again by the next sweep."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained

from peft_align.grid.serialize import write_identity
from peft_align.plan import verb
from peft_align.store.damage import find_damage
from peft_align.store.records import notice_of, read_json
from peft_align.store.runs import RunDir

WORDS = [
    "model=tiny", "dataset=everyday", "train.max_steps=4", "train.checkpoint_steps=[2,4]", "peft=lora",
    "evaluation.benchmarks=[everyday_mc]", "evaluation.steps=[4]", "root=outputs",
]  # fmt: skip
MEASURED: dict[str, Any] = {"seconds": {"total": 1.0}, "peak_memory_bytes": {"resident": 1, "gpu": None}}
PRODUCTS = {
    "checkpoints/step-000002/adapter_model.safetensors": "retrain",
    "adapter/adapter_config.json": "retrain",
    "metrics.jsonl": "retrain",
    "train.json": "retrain",
    "evaluations/*/samples.jsonl.gz": "evaluate everyday_mc",
    "evaluations/*/record.json": "evaluate everyday_mc",
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that is done, in the folder that the command is given in."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sweep, root = expand(*WORDS), tmp_path / "outputs"
    for run in trained(sweep):
        finish_training(root, run, **MEASURED)
    for item in plan(sweep, root):
        write_identity(item.run, RunDir(root, item.run.id))
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)])
    return RunDir(root, trained(sweep)[0].id)


def verified(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code of plan --verify, and what it says."""
    code = verb([*WORDS, "--verify", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def flip(path: Path) -> None:
    """Another byte in the middle, in the same size and as if nothing had been written."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_is_whole_is_found_whole(directory: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = verified(capsys)
    assert (code, found["damaged"], found["to_do"]) == (0, [], 0)
    assert verb([*WORDS, "--verify"]) == 0
    assert "compared with the records: 0 damaged" in capsys.readouterr().out
    assert verb(WORDS) == 0
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_changed_byte_is_found_and_only_that_is_to_do(
    directory: RunDir, capsys: pytest.CaptureFixture[str], product: str
) -> None:
    (path,) = directory.path.glob(product)
    flip(path)
    code, found = verified(capsys)
    assert code == 1
    (entry,) = found["damaged"]
    assert (entry["run_id"], entry["left"]) == (directory.id, "")
    assert f"/{path.name} is damaged" in entry["what"]  # the adapter and its checkpoint are one file of two names
    assert found["to_do"] == 1
    (told,) = [run["to_do"] for run in found["run_list"] if run["to_do"]]
    assert told.startswith(PRODUCTS[product])
    assert entry["what"] in told
    code, again = verified(capsys)
    assert (code, again["damaged"], again["to_do"]) == (0, [], 1)  # remembered, not found once more
    assert verb(WORDS) == 0
    assert f"/{path.name} is damaged" in capsys.readouterr().out.replace("\n", "")


def test_what_is_made_again_is_as_if_nothing_had_been(directory: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    flip(directory.adapter / "adapter_model.safetensors")
    assert verified(capsys)[0] == 1
    notice = notice_of(directory.path / "train.json")
    assert (read_json(notice) or {})["record"]["checkpoints"]
    finish_training(directory.root, trained(expand(*WORDS))[0], **MEASURED)
    assert not notice.exists()
    assert verified(capsys)[0] == 0


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_damaged_description_of_a_run_is_written_again(
    directory: RunDir, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = directory.path / "run.json"
    before = read_json(path)
    flip(path) if how == "flip" else path.unlink()
    code, found = verified(capsys)
    assert (code, found["to_do"]) == (1, 0)
    assert "written again" in found["damaged"][0]["what"]
    assert read_json(path) == before
    assert verified(capsys)[0] == 0


def test_a_run_that_is_worked_on_is_left_to_who_does(directory: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    flip(directory.adapter / "adapter_model.safetensors")
    with directory.lock() as mine:
        assert mine
        assert verified(capsys)[0] == 0
        assert directory.train_record() is not None
    assert verified(capsys)[0] == 1


def test_damage_that_cannot_be_set_aside_is_told_all_the_same(
    directory: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(directory.path / "metrics.jsonl")

    def refuse(*args: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("peft_align.store.records.write_json", refuse)
    (damage,) = find_damage(directory)
    assert damage.left == "cannot be set aside: Read-only file system"
    assert directory.train_record() is not None


def test_records_of_before_the_seal_and_the_digest_of_the_metrics_are_read(
    directory: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory.path / "train.json"
    record = read_json(path) or {}
    del record["metrics"]["metrics.jsonl"]["sha256"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert verified(capsys)[0] == 0
