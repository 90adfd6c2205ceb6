"""Judges: opened by their settings, asked in words or given texts to score. Their answers are kept by content.

An answering judge is a function from dialogues to texts (`Ask`), a scoring one from texts to `TextScore`s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.config.judges import Classifier, Endpoint, Judge, LocalLM, Profanity
from peft_align.data.pairs import Message
from peft_align.errors import WorkError
from peft_align.grid.planner import judge_identity
from peft_align.store.journal import Journal, read_entries
from peft_align.store.shapes import Maybe, wrong

Ask = Callable[[Sequence[list[Message]]], list[str | None]]
Keep = Callable[[int, str | None, dict[str, int]], None]
Tick = Callable[[int, int], None]
ANSWER = {"question": str, "answer": Maybe(str)}  # an entry of the journals


@dataclass(frozen=True)
class TextScore:
    """What a scoring judge says of a text.

    Attributes:
        score: its own figure: a logit, a probability.
        toxicity: between 0 and 1, higher is more toxic.
    """

    score: float
    toxicity: float


@dataclass
class Answers:
    """The answers of one judge, each asked once: kept by their content, on disk as they come.

    Several processes may ask the same judge: each writes a journal of its own and reads those of the others when it
    starts.
    """

    judge: Judge
    folder: Path
    mirror: str | None = None
    asked: int = 0
    known: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    unavailable: str = ""  # why it gave no answers the last time
    _answers: dict[str, str | None] | None = None
    _journal: Journal | None = None
    _model: Any = None

    def ask(self, dialogues: Sequence[list[Message]], tick: Tick = lambda done, of: None) -> list[str | None]:
        """The judge's answer to each dialogue; None where it has none to give (its API refuses the question).

        Raises:
            JudgeUnavailable: it cannot be reached; what it answered is kept.
        """
        head = {"judge": judge_identity(self.judge)}
        if self._answers is None:
            found = [entry for path in sorted(self.folder.glob("*.jsonl")) for entry in read_entries(path, head)]
            self._answers = {entry["question"]: entry["answer"] for entry in found if wrong(entry, ANSWER) is None}
        keys = [key_of(dialogue) for dialogue in dialogues]
        new = {key: dialogue for key, dialogue in zip(keys, dialogues, strict=True) if key not in self._answers}
        self.known += len(set(keys)) - len(new)
        done = len(set(keys)) - len(new)
        total = len(set(keys))
        tick(done, total)
        if new:
            if self._journal is None:
                name = f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}.jsonl"
                self._journal = Journal(self.folder / name, head)
            names, questions = list(new), list(new.values())

            def keep(i: int, answer: str | None, usage: dict[str, int]) -> None:
                nonlocal done
                assert self._journal is not None
                assert self._answers is not None
                self._journal.append([{"question": names[i], "answer": answer, **usage}])
                self._journal.entries.clear()  # once in memory is enough
                self._answers[names[i]] = answer
                self.asked += 1
                self.input_tokens += usage.get("input_tokens", 0)
                self.output_tokens += usage.get("output_tokens", 0)
                done += 1
                tick(done, total)

            if self.unavailable:  # each of many runs would wait through all the retries again
                raise JudgeUnavailable(self.unavailable)
            try:
                self._asked(questions, keep)
            except JudgeUnavailable as error:
                self.unavailable = str(error)
                raise
        return [self._answers[key] for key in keys]

    def _asked(self, questions: list[list[Message]], keep: Keep) -> None:
        if isinstance(self.judge, Endpoint):
            from peft_align.evaluation.endpoint import ask_endpoint

            answered = any(answer is not None for answer in (self._answers or {}).values())
            ask_endpoint(self.judge, questions, keep, has_answered=answered)
            return
        assert isinstance(self.judge, LocalLM)
        from peft_align.evaluation.local_judges import LanguageModel

        if self._model is None:
            self._model = LanguageModel(self.judge, self.mirror)
        self._model.ask(questions, keep)

    def details(self) -> dict[str, Any]:
        """What was asked and what it cost, for the record; then counted anew."""
        told: dict[str, Any] = {"asked": self.asked, "known": self.known}
        told |= {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
        if isinstance(self.judge, Endpoint) and self.judge.price_per_million_input is not None:
            price = self.input_tokens * self.judge.price_per_million_input
            price += self.output_tokens * (self.judge.price_per_million_output or 0.0)
            told["cost"] = round(price / 1e6, 6)
        self.asked = self.known = self.input_tokens = self.output_tokens = 0
        return told


class JudgeUnavailable(WorkError):
    """The judge gives no answers: the network, the key, the model's name. What it answered before is kept."""


def open_scorer(judge: Judge, mirror: str | None) -> Callable[[Sequence[str]], list[TextScore]]:
    """The function of a scoring judge. Raises InputError if its model cannot be had."""
    from peft_align.evaluation import local_judges

    if isinstance(judge, Classifier):
        return local_judges.classifier(judge, mirror)
    assert isinstance(judge, Profanity)
    return local_judges.profanity()


def key_of(dialogue: Sequence[Message]) -> str:
    """The content of a question as a hash."""
    plain = json.dumps([[message.role, message.content] for message in dialogue], ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def filled(template: str, **values: str) -> str:
    """The template with {name} replaced by each value; what stands in the values is left as it is."""
    pattern = re.compile("|".join(re.escape("{" + name + "}") for name in values))
    return pattern.sub(lambda match: values[match[0][1:-1]], template)


def first_bit(text: str) -> bool:
    """A coin that falls the same way for the same text."""
    return bool(hashlib.sha256(text.encode()).digest()[0] & 1)


def ask_labels(
    samples: Sequence[dict[str, Any]], question: str, prompt: str, labels: Sequence[str], ask: Ask
) -> list[tuple[str | None, str | None]]:
    """The label that the judge gives each sample's output, and its whole answer.

    Args:
        samples: what is judged.
        question: the field of a sample that is put for {question}; its output is put for {response}.
        prompt: the judge's.
        labels: that the answer may hold.
        ask: the judge.
    """
    asked = [[Message("user", filled(prompt, question=s[question], response=s["output"]))] for s in samples]
    return [(label_of(answer, labels), answer) for answer in ask(asked)]


def label_of(answer: str | None, labels: Sequence[str]) -> str | None:
    """The one label that the answer holds as [[label]]; None if it holds none, or several different ones."""
    found = {label for label in labels if f"[[{label}]]" in (answer or "")}
    return found.pop() if len(found) == 1 else None
