"""What was given to Slurm, as it is found again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from peft_align.store.records import read_json, write_json
from peft_align.store.runs import FORMAT
from peft_align.store.submissions import Submission, new_submission, submissions


def array(name: str, job: str | None, *tasks: list[str]) -> dict[str, Any]:
    return {"name": name, "job": job, "tasks": list(tasks), "stages": ["train"]}


def submitted(root: Path, sweep: str = "one", *arrays: dict[str, Any]) -> Submission:
    found = new_submission(root / "sweeps" / sweep, {"name": sweep, "runs": [], "arrays": list(arrays), "report": None})
    found.save()
    return found


def test_each_submission_has_a_folder_of_its_own_however_fast_they_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20261123-120000")
    folders = [new_submission(tmp_path / "sweeps/one", {}).folder for _ in range(3)]
    assert [folder.name for folder in folders] == ["20261123-120000", "20261123-120000-1", "20261123-120000-2"]
    assert all((folder / "logs").is_dir() for folder in folders)
    assert {folder.parent for folder in folders} == {tmp_path / "sweeps/one/slurm"}


def test_what_is_not_saved_yet_is_no_submission(tmp_path: Path) -> None:
    fresh = new_submission(tmp_path / "sweeps/one", {"words": ["seed=1"], "name": "one", "runs": []})
    assert submissions(tmp_path) == []
    fresh.save()
    (found,) = submissions(tmp_path)
    assert found == fresh
    assert (found.content["words"], found.content["sweep"]) == (["seed=1"], "one")


def test_tasks_are_named_as_slurm_names_them_and_only_of_what_was_submitted(tmp_path: Path) -> None:
    found = submitted(tmp_path, "one", array("00-train", "17", ["a", "b"], ["c"]), array("01-evaluate", None, ["d"]))
    assert found.jobs == ["17"]
    assert [(task, each["name"], runs) for task, each, runs in found.tasks()] == [
        ("17_0", "00-train", ["a", "b"]),
        ("17_1", "00-train", ["c"]),
    ]
    first = found.content["arrays"][0]
    assert found.log(first, "17_1") == found.folder / "logs/00-train-1.log"


def test_submissions_are_found_oldest_first_of_all_sweeps_or_of_one(tmp_path: Path) -> None:
    made = [submitted(tmp_path, sweep) for sweep in ("b", "a", "b")]
    for submission, when in zip(made, (30.0, 10.0, 20.0), strict=True):
        submission.content["time"] = when
        submission.save()
    assert [each.folder for each in submissions(tmp_path)] == [made[i].folder for i in (1, 2, 0)]
    assert [each.folder for each in submissions(tmp_path, "b")] == [made[i].folder for i in (2, 0)]
    assert submissions(tmp_path, "c") == []
    assert submissions(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "text", ["", '{"format": 1, "arr', "[]", f'{{"format": {FORMAT + 1}, "time": 1, "arrays": []}}']
)
def test_what_is_damaged_or_of_another_format_is_passed_over(tmp_path: Path, text: str) -> None:
    damaged, fine = submitted(tmp_path, "one"), submitted(tmp_path, "two")
    (damaged.folder / "submission.json").write_text(text, encoding="utf-8")
    assert [each.folder for each in submissions(tmp_path)] == [fine.folder]


def test_what_is_saved_again_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    found = submitted(tmp_path, "one", array("00-train", None, ["a"]))
    found.content["arrays"][0]["job"] = "17"
    found.save()
    (again,) = submissions(tmp_path)
    assert again.jobs == ["17"]
    content = read_json(found.folder / "submission.json")
    assert content is not None
    write_json(found.folder / "submission.json", content)
    assert submissions(tmp_path) == [again]
