"""Whatever lies in the place of a record, a note or a manifest: plan, status and report say what they can."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeping import expand, finish_sweep, shipped, trained

from peft_align.cli import Asked
from peft_align.config.command_line import parse
from peft_align.errors import InputError
from peft_align.grid.planner import Planner
from peft_align.launch.watch import observe
from peft_align.plan import describe
from peft_align.report import write_report
from peft_align.store.runs import RunDir
from peft_align.store.shapes import EVALUATION, JUDGEMENT, MERGE, NOTES, SUBMISSION, TRAIN, sound, wrong
from peft_align.store.submissions import submissions, unreadable
from peft_align.store.sweeps import latest_manifest

WORDS = (
    *("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=4"),
    "evaluation.benchmarks=[everyday_mc]",
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which a sweep is done."""
    root = tmp_path_factory.mktemp("done") / "outputs"
    finish_sweep(root, *WORDS)
    return root


def look(root: Path) -> None:
    """What plan, status and report do."""
    asked = Asked(parse(WORDS), expand(*WORDS), Planner(root, None), shipped())
    items = asked.plan()
    json.dumps(describe(asked, items), default=str)
    for item in items:
        observe(asked.planner, item)
        RunDir(root, item.run.id).attempts()
    write_report(asked, items)
    submissions(root)
    unreadable(root)
    with suppress(InputError):
        latest_manifest(root)


def mutated(draw: st.DrawFn, node: Any) -> Any:
    """A record with something else at one place of it, or something missing."""
    if not isinstance(node, (dict, list)) or not node or draw(st.integers(0, 3)) == 0:
        return draw(values)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 3)) == 0:
        kept = [k for k in keys if k != key]
        return {k: node[k] for k in kept} if isinstance(node, dict) else [node[k] for k in kept]
    changed = mutated(draw, node[key])
    if isinstance(node, dict):
        return {**node, key: changed}
    return [changed if i == key else each for i, each in enumerate(node)]


PLACES = ("train.json", "record.json", "progress.json", "failed.json", "history.jsonl", "sweep.json", "submission.json")
EXAMPLES: dict[str, Any] = {
    "progress.json": {"stage": "train", "step": 2, "of": 4, "loss": 1.5, "time": 1e9, "pid": 1, "eta": 3, "task": None},
    "failed.json": {"stage": "train", "kind": "failed", "reason": "x", "reached": [0, 0, 0], "log": "train.log"},
    "history.jsonl": {"kind": "failed", "reached": [1, 0, 0], "stage": "train"},
    "submission.json": {
        "format": 1,
        "time": 1e9,
        "sweep": "adhoc-0",
        "name": "adhoc",
        "user": "me",
        "runs": ["a"],
        "report": None,
        "arrays": [{"name": "00-train", "job": "7", "tasks": [["a"]], "stages": ["train"]}],
    },
}


@quick
@given(data=st.data())
def test_plan_status_and_report_stumble_over_no_file(done: Path, tmp_path: Path, data: st.DataObject) -> None:
    root = tmp_path / "outputs"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(done, root)
    run = RunDir(root, trained(expand(*WORDS))[0].id)
    for name in data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2, unique=True)):
        place = {
            "record.json": next(iter(run.path.glob("evaluations/*/record.json"))),
            "sweep.json": root / "sweeps/adhoc-0/sweep.json",
            "submission.json": root / "sweeps/adhoc-0/slurm/1/submission.json",
        }.get(name, run.path / name)
        known = json.loads(place.read_bytes()) if place.is_file() else EXAMPLES[name]
        place.parent.mkdir(parents=True, exist_ok=True)
        if data.draw(st.integers(0, 3)) == 0:
            place.write_bytes(data.draw(st.binary(max_size=60)))
        else:
            place.write_text(json.dumps(data.draw(st.composite(mutated)(known))), encoding="utf-8")
    if data.draw(st.booleans()):
        (run.path / "train.json").unlink()
    look(root)


@quick
@given(record=values)
def test_a_shape_is_checked_without_stumbling_over_anything(record: Any) -> None:
    for shape in (TRAIN, MERGE, EVALUATION, JUDGEMENT, SUBMISSION, *NOTES.values()):
        assert wrong(record, shape) is None or isinstance(wrong(record, shape), str)
    if isinstance(record, dict):
        assert sound(record).items() <= record.items() or any(v != v for v in record.values())


@pytest.mark.parametrize(
    ("value", "shape", "told"),
    [
        ({"a": 1}, {"a": int}, None),
        ({"a": 1, "b": []}, {"a": int}, None),
        ({}, {"a?": int}, None),
        ({}, {"a": int}, "a is missing"),
        ({"a": True}, {"a": int}, "a is not a whole number"),
        ({"a": 2**60}, {"a": int}, "a is not a whole number"),
        ({"a": {"b": "1"}}, {"a": {"b": float}}, "a.b is not a number"),
        (3, {"a": int}, "it is no mapping"),
    ],
)
def test_what_is_not_of_its_shape_is_told_with_its_place(value: Any, shape: Any, told: str | None) -> None:
    assert wrong(value, shape) == told
