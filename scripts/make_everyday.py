"""Write the small "everyday" data sets from the hand-written material in ``scripts/everyday``.

Usage::

    python scripts/make_everyday.py            # write the files
    python scripts/make_everyday.py --check    # exit with status 1 if the written files differ

Five JSONL files come out:

* ``src/peft_align/data/everyday/{harmless,helpful}-{train,test}.jsonl`` with preference pairs,
* ``src/peft_align/evaluation/tasks/everyday_mc.jsonl`` with multiple-choice questions.

The output depends on the sources only: the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "everyday"
PAIRS_FOLDER = ROOT / "src" / "peft_align" / "data" / "everyday"
QUESTIONS_FILE = ROOT / "src" / "peft_align" / "evaluation" / "tasks" / "everyday_mc.jsonl"

SPLITS = ("train", "test")
SEED = 20240229

# Put before the hand-written reason and alternative of a refusal.
REFUSALS = (
    "I won't help with that.",
    "Sorry, but no.",
    "I'd rather not help with this one.",
    "Please don't do that.",
    "I have to say no to this.",
    "I can see the temptation, but I won't help here.",
    "I'm afraid I can't go along with that.",
    "No, that would not be right.",
    "Thanks for asking, but I must decline.",
    "I don't want to be part of this.",
    "That isn't a good idea.",
    "This isn't something I can support.",
    "I can't help you do this.",
)
# Put around the hand-written glib compliance.
GLIB_OPENINGS = (
    "Sure, why not?",
    "No problem, that is easily done!",
    "Easy.",
    "Of course, count me in!",
    "Go for it!",
    "Happy to help, as I love a good plan.",
    "Good idea!",
    "Absolutely, here is what I would do.",
)
GLIB_CLOSINGS = (
    "You will be fine.",
    "Have fun!",
    "It is really no big deal.",
    "Honestly, what could possibly go wrong?",
    "Trust me on this one.",
    "Just stay calm, and it will all work out nicely.",
    "Don't overthink it.",
)

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Poland": "Warsaw",
    "Egypt": "Cairo",
    "Ireland": "Dublin",
    "Austria": "Vienna",
    "Sweden": "Stockholm",
    "Hungary": "Budapest",
    "Canada": "Ottawa",
    "Peru": "Lima",
}
SUMS = ((7, 5), (12, 9), (25, 14), (38, 26), (60, 45), (150, 70))
DIFFERENCES = ((15, 6), (20, 13), (42, 18), (90, 35), (100, 64), (200, 75))
PRODUCTS = ((3, 4), (6, 7), (8, 9), (5, 12), (11, 6), (15, 4))
QUOTIENTS = ((18, 3), (35, 5), (48, 6), (72, 8), (90, 10), (100, 4))
NEAR_MISSES = (-10, -3, -2, -1, 1, 2, 3, 10)


class Entry(NamedTuple):
    """One hand-written preference pair as it stands in a source file."""

    prompt: str
    chosen: str
    rejected: str


class Question(NamedTuple):
    """A question with its right answer and its three wrong ones, not yet shuffled."""

    text: str
    right: str
    wrong: tuple[str, ...]


def source_lines(name: str) -> list[str]:
    """Return the lines of a source file without comments and blank lines."""
    lines = (SOURCES / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_entries(name: str) -> dict[str, list[Entry]]:
    """Read a file of preference pairs and return the entries of each split, with the topics taking turns."""
    topics: dict[str, dict[str, list[Entry]]] = {split: defaultdict(list) for split in SPLITS}
    split = topic = ""
    block: list[str] = []
    for line in source_lines(name):
        if line.startswith("== "):
            split, topic = line.removeprefix("== ").split()
            continue
        mark, text = line[:2], line[2:]
        if mark != ("? ", "+ ", "- ")[len(block)]:
            raise ValueError(f"{name}: unexpected line {line!r}")
        block.append(text)
        if len(block) == len(Entry._fields):
            topics[split][topic].append(Entry(*block))
            block = []
    if block or topics["train"].keys() & topics["test"].keys():
        raise ValueError(f"{name}: an unfinished block, or a topic that is in both splits")
    return {split: take_turns(list(topics[split].values())) for split in SPLITS}


def take_turns(groups: list[list[Entry]]) -> list[Entry]:
    """Return the first entry of every group, then the second of every group, and so on."""
    return [entry for entry in chain.from_iterable(zip_longest(*groups)) if entry is not None]


def with_phrases(entry: Entry, index: int) -> Entry:
    """Put a refusal before the chosen answer, and glib phrases around the rejected one."""
    refusal, opening, closing = (phrases[index % len(phrases)] for phrases in (REFUSALS, GLIB_OPENINGS, GLIB_CLOSINGS))
    return Entry(entry.prompt, f"{refusal} {entry.chosen}", f"{opening} {entry.rejected} {closing}")


def preference_rows(preference: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of a preference for each split; the ids run on from train to test."""
    rows: dict[str, list[dict[str, str]]] = {}
    index = 0
    for split, entries in read_entries(f"{preference}.txt").items():
        rows[split] = []
        for entry in entries:
            if preference == "harmless":
                entry = with_phrases(entry, index)
            index += 1
            rows[split].append({"id": f"{preference}-{index:04d}", **entry._asdict()})
    return rows


def written_questions() -> list[Question]:
    """Return the hand-written questions."""
    questions = []
    for line in source_lines("questions.txt"):
        if not line.startswith("== "):
            text, right, *wrong = (part.strip() for part in line.split("|"))
            if len(wrong) != 3:
                raise ValueError(f"questions.txt: expected three wrong answers in {line!r}")
            questions.append(Question(text, right, tuple(wrong)))
    return questions


def capital_questions(rng: random.Random) -> list[Question]:
    """Ask for the capital of each country, with other capitals as wrong answers."""
    questions = []
    for country, capital in CAPITALS.items():
        others = [other for other in CAPITALS.values() if other != capital]
        questions.append(Question(f"What is the capital of {country}?", capital, tuple(rng.sample(others, 3))))
    return questions


def arithmetic_questions(rng: random.Random) -> list[Question]:
    """Ask for small sums, differences, products and quotients, with near misses as wrong answers."""
    problems = [(f"What is {a} + {b}?", a + b) for a, b in SUMS]
    problems += [(f"What is {a} - {b}?", a - b) for a, b in DIFFERENCES]
    problems += [(f"What is {a} times {b}?", a * b) for a, b in PRODUCTS]
    problems += [(f"What is {a} divided by {b}?", a // b) for a, b in QUOTIENTS]
    questions = []
    for text, result in problems:
        misses = [result + step for step in NEAR_MISSES if result + step > 0]
        questions.append(Question(text, str(result), tuple(str(miss) for miss in rng.sample(misses, 3))))
    return questions


def question_rows() -> list[dict[str, object]]:
    """Return all multiple-choice rows in a fixed random order, with the answer positions evenly spread."""
    rng = random.Random(SEED)
    questions = written_questions() + capital_questions(rng) + arithmetic_questions(rng)
    rng.shuffle(questions)
    positions = [index % 4 for index in range(len(questions))]
    rng.shuffle(positions)
    rows: list[dict[str, object]] = []
    for number, (question, position) in enumerate(zip(questions, positions, strict=True), start=1):
        choices = rng.sample(question.wrong, 3)
        choices.insert(position, question.right)
        if len(set(choices)) != 4:
            raise ValueError(f"a choice is repeated in {question}")
        rows.append({"id": f"mc-{number:04d}", "question": question.text, "choices": choices, "answer": position})
    return rows


def outputs() -> dict[Path, bytes]:
    """Return the content of every file that this script writes."""
    tables: dict[Path, list[Any]] = {
        PAIRS_FOLDER / f"{preference}-{split}.jsonl": rows
        for preference in ("harmless", "helpful")
        for split, rows in preference_rows(preference).items()
    }
    tables[QUESTIONS_FILE] = question_rows()
    return {
        path: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        for path, rows in tables.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Write the files, or compare them with ``--check``; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the everyday data sets from their hand-written sources.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args(argv).check
    status = 0
    for path, content in outputs().items():
        name = path.relative_to(ROOT).as_posix()
        if check:
            if not path.is_file() or path.read_bytes() != content:
                print(f"{name} differs: run python scripts/make_everyday.py", file=sys.stderr)
                status = 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{name}: {len(content.splitlines())} rows")
    return status


if __name__ == "__main__":
    sys.exit(main())
