"""What a sweep will write; tests/end_to_end/test_sweep.py holds it against what one leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, trained

from peft_align.config.schema import Disk
from peft_align.errors import InputError
from peft_align.grid.cost import BYTES, base_parameters, trainable_parameters
from peft_align.grid.disk import check_room, described, room_needed, told
from peft_align.store.usage import block_bytes, taken

WORDS = ("model=tiny", "dataset=everyday", "peft.r=64", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]")


def test_every_checkpoint_counts_and_what_is_done_does_not(tmp_path: Path) -> None:
    sweep = expand("model=mistral_7b", "method=dpo", "train.checkpoint_steps=[350,700]", "seed=0,1")
    run = trained(sweep)[0]
    both = room_needed(tmp_path, plan(sweep, tmp_path)).adapters
    weights = 4 * (trainable_parameters(run.config.model.shape, run.config.peft) or 0)
    assert both == pytest.approx(2 * 2 * weights, rel=0.01)  # adapter/ is linked
    finish_training(tmp_path, run)
    assert room_needed(tmp_path, plan(sweep, tmp_path)).adapters == both // 2


def test_the_last_checkpoint_is_kept_whether_it_was_asked_for_or_not(tmp_path: Path) -> None:
    words = ("model=mistral_7b", "method=dpo")
    asked, other = (expand(*words, f"train.checkpoint_steps=[{steps}]") for steps in ("350,700", "350"))
    sizes = [room_needed(tmp_path, plan(sweep, tmp_path)).adapters for sweep in (asked, other)]
    assert sizes[0] == sizes[1]


def test_where_links_do_not_work_the_adapter_is_a_copy(tmp_path: Path) -> None:
    sweep = expand("model=mistral_7b", "seed=0,1")
    done = trained(sweep)[0]
    linked = room_needed(tmp_path, plan(expand("model=mistral_7b", "seed=1"), tmp_path)).adapters
    directory = finish_training(tmp_path, done)
    assert room_needed(tmp_path, plan(sweep, tmp_path)).adapters == linked
    for path in directory.adapter.iterdir():
        copy = path.with_name("copy")
        shutil.copyfile(path, copy)
        copy.replace(path)
    assert room_needed(tmp_path, plan(sweep, tmp_path)).adapters == pytest.approx(2 * linked, rel=0.01)


@pytest.mark.parametrize(
    ("words", "at_once"),
    [
        ((), 1),
        (("launcher.workers=3",), 3),
        (("launcher=slurm",), 4),
        (("launcher=slurm", "launcher.throttle=2"), 2),
        (("launcher=debug",), 1),
        (("train.pack_runs=2",), 2),
    ],
)
def test_two_states_are_kept_of_each_run_that_is_trained_at_a_time(
    tmp_path: Path, words: tuple[str, ...], at_once: int
) -> None:
    sweep = expand("model=mistral_7b", "peft=lora", "method=dpo", "seed=range(4)", *words)
    config = trained(sweep)[0].config
    count = trainable_parameters(config.model.shape, config.peft) or 0
    one = count * (BYTES[config.peft.adapter_dtype] + 8)  # weights, and paged_adamw_32bit's moments
    assert room_needed(tmp_path, plan(sweep, tmp_path)).states == pytest.approx(2 * one * at_once, rel=0.01)
    assert room_needed(tmp_path, plan(sweep, tmp_path), devices=8).states == pytest.approx(
        2 * one * (4 if not words else min(4, 8 * 2) if "pack" in words[0] else at_once), rel=0.01
    )


def test_samples_are_as_large_as_the_like_of_them_were(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "seed=0,1")
    for run in trained(sweep):
        finish_training(tmp_path, run)
    ruled = room_needed(tmp_path, plan(sweep, tmp_path)).samples
    request = plan(sweep, tmp_path)[0].requests[0]
    folder = finish_evaluation(tmp_path, request, [metric("acc", 0.5)])
    (folder / "more.json").write_bytes(b"x" * 10_000_000)
    measured = room_needed(tmp_path, plan(sweep, tmp_path)).samples
    assert ruled < 2_000_000
    assert measured == pytest.approx(2 * taken(folder), rel=0.01)  # the other run's, the baseline's


def test_a_limit_and_short_texts_make_samples_smaller(tmp_path: Path) -> None:
    words = ("model=tiny", "dataset=everyday", "evaluation.benchmarks=[mmlu,alpaca_eval]")
    sizes = [
        room_needed(tmp_path, plan(expand(*words, *more), tmp_path)).samples
        for more in ((), ("evaluation.max_new_tokens=8",), ("evaluation.max_new_tokens=8", "evaluation.limit=1"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_merge_takes_what_it_is_saved_as(tmp_path: Path) -> None:
    words = ("+grid=merge", "model=mistral_7b", "seed=0", "merge=slerp", "method=sft", "dataset=beavertails")
    base = plan(expand(*words), tmp_path)
    (merge,) = (item.run for item in base if item.run.kind == "merge")
    full = plan(expand(*words, "merge.save=full"), tmp_path)
    assert room_needed(tmp_path, base).merges < 20_000
    weights = base_parameters(merge.config.model.shape) * 2
    assert room_needed(tmp_path, full).merges == pytest.approx(weights, rel=0.01)


def test_the_caches_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    sweep = expand("model=tiny", "dataset=everyday", "method=sft,dpo", "peft=lora", "seed=0,1")
    items = plan(sweep, tmp_path)
    needed = room_needed(tmp_path, items).caches
    sft = [item for item in items if item.run.config.method.kind == "sft"]
    assert 0 < room_needed(tmp_path, sft).caches < needed  # no reference
    (tmp_path / "reference/0123").mkdir(parents=True)
    (tmp_path / "reference/0123/00.json").write_bytes(b"x" * (needed // 2))
    assert room_needed(tmp_path, items).caches == pytest.approx(needed / 2, rel=0.01)
    assert room_needed(tmp_path, []).total == 0


def test_what_may_not_fit_is_warned_about_and_what_cannot_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = expand("model=mistral_7b", "method=dpo")
    items, root = plan(sweep, tmp_path), tmp_path / "not/there/yet"
    needed = room_needed(root, items)
    sure = needed.adapters + needed.merges

    def with_free(free: int, keep: float = 0.0, check: bool = True) -> list[str]:
        block = block_bytes(tmp_path)
        found = SimpleNamespace(f_frsize=block, f_bavail=free // block)
        monkeypatch.setattr(os, "statvfs", lambda path: found)
        settings = Disk(keep_free_gb=keep, cache_gb=1, check=check)
        check_room(root, items, settings)
        return list(told(described(root, items, settings)))

    assert len(with_free(needed.total + 10_000)) == 1
    (_, warning) = with_free(needed.total - 10_000)
    assert warning.startswith("warning: ")
    (_, warning) = with_free(needed.total + 10_000, keep=0.5)
    assert "500.0 MB are to stay so" in warning
    with pytest.raises(InputError, match=r"disk\.check=false"):
        with_free(sure - 10_000)
    with pytest.raises(InputError, match=r"disk\.keep_free_gb"):
        with_free(needed.total, keep=100)
    assert len(with_free(sure - 10_000, check=False)) == 2
    assert not root.parent.exists()
