"""What is done and what is missing, from the disk alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_evaluation, finish_training, metric, plan, source, trained

from peft_align.grid.planner import Item, adapter_digest, requests
from peft_align.grid.runs import Run, Sweep
from peft_align.store.records import Digests, read_json, write_json
from peft_align.store.runs import RunDir

WORDS = ("model=tiny", "dataset=everyday", "train.max_steps=4", "evaluation.benchmarks=[preference,everyday_mc]")
DATA = "Anthropic/hh-rlhf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are remembered in a folder of the test."""
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def complete(root: Path, sweep: Sweep, mirror: str | None = None, inputs: Any = None) -> None:
    """Have everything of a sweep on disk."""
    for run in trained(sweep):
        finish_training(root, run, inputs=inputs)
    for item in plan(sweep, root, mirror):
        for request in item.requests:
            finish_evaluation(root, request, [metric("acc", 0.5)], inputs)


def only(sweep: Sweep, root: Path, mirror: str | None = None) -> Item:
    """The state of the sweep's only training run."""
    (item,) = [item for item in plan(sweep, root, mirror) if item.run.kind == "train"]
    return item


def test_nothing_on_disk_is_everything_to_do_and_leaves_nothing_there(tmp_path: Path) -> None:
    train, baseline = plan(expand(*WORDS), tmp_path / "root")
    assert train.why == "train; evaluate everyday_mc, preference"
    assert baseline.why == "evaluate everyday_mc, preference"
    assert not train.done
    assert not (tmp_path / "root").exists()


def test_with_every_record_and_product_it_is_done(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    complete(tmp_path, sweep)
    items = plan(sweep, tmp_path)
    assert [(item.done, item.why) for item in items] == [(True, ""), (True, "")]


def test_trained_but_not_evaluated_is_to_be_evaluated(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    finish_training(tmp_path, trained(sweep)[0])
    item = only(sweep, tmp_path)
    assert item.to_make is None
    assert item.why == "evaluate everyday_mc, preference"
    finish_evaluation(tmp_path, item.requests[0], [metric("accuracy", 0.5)])
    assert only(sweep, tmp_path).why == "evaluate everyday_mc"


def test_the_same_run_of_another_sweep_is_done_too(tmp_path: Path) -> None:
    complete(tmp_path, expand(*WORDS))
    assert only(expand(*WORDS, "seed=0"), tmp_path).done
    assert not only(expand(*WORDS, "seed=1"), tmp_path).done


PRODUCTS = [
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "checkpoints/step-000004/adapter_model.safetensors",
    "metrics.jsonl",
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_missing_product_is_told_and_to_be_made_again(tmp_path: Path, product: str) -> None:
    sweep = expand(*WORDS)
    complete(tmp_path, sweep)
    path = RunDir(tmp_path, trained(sweep)[0].id).path / product
    path.unlink()
    item = only(sweep, tmp_path)
    assert item.to_make == f"retrain: {path.parent.name}/{path.name} is missing"
    assert not item.done


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_of_another_size_is_told_with_both_sizes(tmp_path: Path, product: str) -> None:
    sweep = expand(*WORDS)
    complete(tmp_path, sweep)
    path = RunDir(tmp_path, trained(sweep)[0].id).path / product
    size = path.stat().st_size
    path.unlink()  # the adapter is linked to its checkpoint
    path.write_bytes(b"x" * (size + 1))
    assert only(sweep, tmp_path).to_make == f"retrain: {path.parent.name}/{path.name} has {size + 1} bytes, not {size}"


@pytest.mark.parametrize("damage", ["", '{"run":', "[]", None])
def test_a_training_record_that_is_not_whole_counts_as_none(tmp_path: Path, damage: str | None) -> None:
    sweep = expand(*WORDS)
    complete(tmp_path, sweep)
    record = RunDir(tmp_path, trained(sweep)[0].id).path / "train.json"
    record.unlink() if damage is None else record.write_text(damage, encoding="utf-8")
    assert only(sweep, tmp_path).to_make == (
        "train" if damage is None else "retrain: its train.json is damaged: no JSON object"
    )


def test_an_evaluation_without_its_samples_is_to_be_done_again(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    complete(tmp_path, sweep)
    item = only(sweep, tmp_path)
    (RunDir(tmp_path, item.run.id).evaluation(item.requests[0].name) / "samples.jsonl.gz").unlink()
    why = only(sweep, tmp_path).why
    assert why.startswith("evaluate preference (")
    assert "samples.jsonl.gz is missing" in why


def test_a_lacking_step_is_to_be_retrained_for(tmp_path: Path) -> None:
    complete(tmp_path, expand(*WORDS))
    more = expand(*WORDS, "train.checkpoint_steps=[1,2,4]")
    assert only(more, tmp_path).to_make == "retrain for steps 1, 2"
    finish_training(tmp_path, trained(more)[0])
    assert only(more, tmp_path).to_make is None
    assert only(expand(*WORDS), tmp_path).done  # fewer steps need nothing


def test_each_step_is_evaluated(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "train.checkpoint_steps=[2,4]")
    finish_training(tmp_path, trained(sweep)[0])
    asked = [(request.step, request.benchmark) for request in only(sweep, tmp_path).requests]
    assert asked == [(2, "preference"), (2, "everyday_mc"), (4, "preference"), (4, "everyday_mc")]


def test_a_retrained_adapter_is_evaluated_anew(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    complete(tmp_path, sweep)
    (run,) = trained(sweep)
    record = read_json(RunDir(tmp_path, run.id).path / "train.json") or {}
    record["checkpoints"]["4"]["digest"] = "another"
    write_json(RunDir(tmp_path, run.id).path / "train.json", record)
    assert only(sweep, tmp_path).why == "evaluate everyday_mc, preference"


@pytest.mark.parametrize(
    ("word", "again"),
    [
        ("evaluation.limit=4", "evaluate everyday_mc"),
        ("evaluation.heldout=8", "evaluate preference"),
        ("evaluation.heldout_split=validation", "evaluate preference"),
        ("evaluation.batch_size=1", ""),
        ("train.micro_batch_size=1", ""),
        ("launcher.workers=2", ""),
    ],
)
def test_a_score_counts_only_for_the_conditions_it_was_taken_under(tmp_path: Path, word: str, again: str) -> None:
    complete(tmp_path, expand(*WORDS))
    item, baseline = plan(expand(*WORDS, word), tmp_path)
    assert (item.why, baseline.why) == (again, again)


def mirror_with_data(folder: Path) -> Path:
    """A mirror that holds a dataset."""
    path = folder / DATA / "harmless-base" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("first\n", encoding="utf-8")
    return path


def test_changed_data_is_told_with_both_digests(tmp_path: Path) -> None:
    path = mirror_with_data(tmp_path / "mirror")
    mirror = str(tmp_path / "mirror")
    sweep = expand("model=tiny", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]", f"hub.mirror={mirror}")
    before = source(tmp_path / "mirror" / DATA, Digests())
    complete(tmp_path, sweep, mirror, {"data": before})
    assert only(sweep, tmp_path, mirror).done

    path.write_text("other\n", encoding="utf-8")  # as long as before
    os.utime(path, ns=(1, 1))
    after = source(tmp_path / "mirror" / DATA, Digests())
    item = only(sweep, tmp_path, mirror)
    assert before["digest"] != after["digest"]
    assert item.to_make == f"retrain: data changed: was {before['digest'][:12]}, is {after['digest'][:12]}"

    path.unlink()
    missing = only(sweep, tmp_path, mirror)
    assert missing.to_make == f"retrain: data changed: was {before['digest'][:12]}, is missing file"


def test_data_that_is_not_on_this_machine_is_not_held_against_a_run(tmp_path: Path) -> None:
    mirror_with_data(tmp_path / "mirror")
    sweep = expand("model=tiny", "train.max_steps=4", "evaluation.benchmarks=[everyday_mc]")
    complete(tmp_path, sweep, None, {"data": source(tmp_path / "mirror" / DATA, Digests())})
    assert only(sweep, tmp_path).done


def test_changed_benchmark_data_is_told_for_its_evaluations_alone(tmp_path: Path) -> None:
    path = mirror_with_data(tmp_path / "mirror")
    mirror = str(tmp_path / "mirror")
    sweep = expand(*WORDS, f"hub.mirror={mirror}")
    complete(tmp_path, sweep, mirror)
    item = only(sweep, tmp_path, mirror)
    second = item.requests[1]
    finish_evaluation(tmp_path, second, [metric("acc", 0.5)], {DATA: source(tmp_path / "mirror" / DATA, Digests())})
    assert only(sweep, tmp_path, mirror).done
    path.write_text("something else\n", encoding="utf-8")
    item = only(sweep, tmp_path, mirror)
    assert item.to_make is None
    assert item.why.startswith(f"evaluate {second.benchmark} ({DATA} changed: was ")


def test_a_failure_is_kept_beside_what_is_to_do(tmp_path: Path) -> None:
    sweep = expand(*WORDS)
    RunDir(tmp_path, trained(sweep)[0].id).fail("train", "out of memory")
    item = only(sweep, tmp_path)
    assert item.failure == "train: out of memory"
    assert not item.done


def test_a_set_asked_by_two_blocks_alike_is_scored_once() -> None:
    run = trained(expand(*WORDS))[0]
    doubled = Run(**{**vars(run), "scorings": [*run.scorings, *run.scorings]})
    assert len(requests(doubled, None)) == len(requests(run, None)) == 2


def test_a_run_whose_parent_is_another_adapter_now_is_to_be_retrained(tmp_path: Path) -> None:
    sweep = expand("method=dpo", "method.init=sft", *WORDS)
    parent, child = [run for run in sweep.runs if run.kind == "train"]
    of_parent = finish_training(tmp_path, parent)
    digest = str(adapter_digest(of_parent.train_record()))
    finish_training(tmp_path, child)
    trains = {item.run.id: item.to_make for item in plan(sweep, tmp_path)}
    assert (trains[parent.id], trains[child.id]) == (None, None)

    record = of_parent.train_record() or {}
    record["checkpoints"]["4"]["digest"] = "0123456789abcdef"
    write_json(of_parent.path / "train.json", record)
    trains = {item.run.id: item.to_make for item in plan(sweep, tmp_path)}
    assert trains[child.id] == f"retrain: its parent {parent.id} changed: was {digest[:12]}, is 0123456789ab"
