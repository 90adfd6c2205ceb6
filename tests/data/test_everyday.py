"""The everyday data sets: as their generator writes them, and fit for their purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(str(files("peft_align")))
PREFERENCES = ("harmless", "helpful")
MINIMUM_ROWS = {"train": 100, "test": 32}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(preference: str, split: str) -> list[dict[str, Any]]:
    """Return the preference pairs of one split."""
    return read_rows(PACKAGE / "data" / "everyday" / f"{preference}-{split}.jsonl")


def questions() -> list[dict[str, Any]]:
    """Return the multiple-choice questions."""
    return read_rows(PACKAGE / "evaluation" / "tasks" / "everyday_mc.jsonl")


def normalised(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_committed_files_are_what_the_generator_writes() -> None:
    script = ROOT / "scripts" / "make_everyday.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("split", sorted(MINIMUM_ROWS))
def test_pairs_are_well_formed(preference: str, split: str) -> None:
    rows = pairs(preference, split)
    assert len(rows) >= MINIMUM_ROWS[split]
    for row in rows:
        assert list(row) == ["id", "prompt", "chosen", "rejected"]
        assert row["id"].startswith(f"{preference}-")
        assert all(isinstance(text, str) and text and text == text.strip() for text in row.values())
        assert normalised(row["chosen"]) != normalised(row["rejected"])


@pytest.mark.parametrize("preference", PREFERENCES)
def test_train_and_test_share_no_prompt_and_no_answer(preference: str) -> None:
    train, test = pairs(preference, "train"), pairs(preference, "test")
    for key in ("id", "prompt", "chosen", "rejected"):
        assert not {normalised(row[key]) for row in train} & {normalised(row[key]) for row in test}


def test_ids_and_prompts_are_unique_across_the_files() -> None:
    rows = [row for preference in PREFERENCES for split in MINIMUM_ROWS for row in pairs(preference, split)]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({normalised(row["prompt"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("split", sorted(MINIMUM_ROWS))
def test_length_does_not_give_the_better_answer_away(preference: str, split: str) -> None:
    rows = pairs(preference, split)
    ratio = mean(len(row["chosen"]) for row in rows) / mean(len(row["rejected"]) for row in rows)
    assert 1 / 1.25 <= ratio <= 1.25
    longer = mean(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert 0.25 <= longer <= 0.75


def test_questions_are_well_formed() -> None:
    rows = questions()
    assert len(rows) >= 120
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "question", "choices", "answer"]
        assert len(row["choices"]) == 4
        assert len(set(row["choices"])) == 4
        assert row["answer"] in range(4)


def test_answer_positions_are_balanced() -> None:
    rows = questions()
    positions = Counter(row["answer"] for row in rows)
    assert all(0.15 <= positions[position] / len(rows) <= 0.35 for position in range(4))
