"""The samples of evaluations as people read them: prompt, answer, and what was said of it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.config.benchmarks import Benchmark, Generated, LmEval, OverRefusal, RealToxicity, RedInstruct

FILE = "samples.jsonl.gz"
BROKEN = (OSError, EOFError, zlib.error, ValueError, RecursionError)  # gzip's own error is an OSError
PROMPTS = ("question", "prompt", "input", "instruction", "text", "problem")  # of lm-eval's documents, in this order
# What judges say of a sample; the rest of their lines are texts and names.
SAID = ("score", "toxicity", "label", "refused", "preference")
ITS_OWN = ("worded_as_refusal",)
NO_SCORES = ("doc_id", "target")  # numbers of lm-eval's samples that are none


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt.

    Attributes:
        key: names the prompt within its benchmark.
        prompt, text: what was asked and answered.
        scores: what the benchmark and its judges say of it.
        harmful: the prompt asks for harm.
        ended: how the answer ended, where that is known: length, stop, end.
        reference: the answer that it is compared with, and whose it is.
    """

    key: str
    prompt: str
    text: str
    scores: dict[str, float | str | bool | None] = field(default_factory=dict)
    harmful: bool = False
    ended: str | None = None
    reference: tuple[str, str] | None = None


def has_texts(benchmark: Benchmark) -> bool:
    """Whether its samples may hold a prompt and an answer; of lm-eval's tasks only a sample tells."""
    return isinstance(benchmark, (Generated, LmEval))


def lines(path: Path, wanted: Collection[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of a file with their places, all or those at some places. Raises one of BROKEN."""
    last = max(wanted, default=-1) if wanted is not None else None
    with gzip.open(path, "rb") as file:
        for place, raw in enumerate(file):
            if last is not None and place > last:
                return
            if wanted is None or place in wanted:
                found = json.loads(raw)
                if not isinstance(found, dict):
                    raise ValueError(f"line {place + 1} is no sample")
                yield place, found


def sample_of(benchmark: Benchmark, line: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]]) -> Sample | None:
    """A line of samples.jsonl.gz, with what each judge said of it by the judge's name; None if it holds no answer."""
    if isinstance(benchmark, LmEval):
        return _of_task(line)
    prompt, output = line.get("prompt"), line.get("output")
    if not isinstance(prompt, str) or not isinstance(output, str):
        return None
    scores = {name: _score(line[name]) for name in ITS_OWN if name in line}
    for judge, said in judged.items():
        for name in SAID:
            if name in said:
                own = "win" if name == "preference" else name
                own = own if len(judged) == 1 else f"{own} ({judge})"
                scores[own] = _win(said[name]) if name == "preference" else _score(said[name])
    unsafe = isinstance(benchmark, OverRefusal) and line.get("safe") is False
    ended, reference = line.get("ended"), line.get("reference_output")
    return Sample(
        str(line.get("question", line.get("id"))),
        prompt,
        output,
        scores,
        isinstance(benchmark, (RealToxicity, RedInstruct)) or unsafe,
        ended if isinstance(ended, str) else None,
        (reference, str(line.get("reference_generator"))) if isinstance(reference, str) else None,
    )


def _of_task(line: Mapping[str, Any]) -> Sample | None:
    """lm-eval keeps the answers of one request in a list, one list for each request of a sample."""
    answers, doc = line.get("resps"), line.get("doc")
    first = answers[0] if isinstance(answers, list) and answers else None
    text = first[0] if isinstance(first, list) and first else None
    if not isinstance(text, str) or not isinstance(doc, Mapping):
        return None
    prompt = next((doc[name] for name in PROMPTS if isinstance(doc.get(name), str)), None)
    if prompt is None:
        return None
    scores = {
        name: _score(value)
        for name, value in line.items()
        if isinstance(value, (bool, int, float)) and name not in NO_SCORES
    }
    return Sample(f"{line.get('task')} {line.get('doc_id')}", prompt, text, scores)


def _score(value: Any) -> float | str | bool | None:
    """A score as JSON has it: a number that is not finite is a word."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        number = float(value)
        return number if abs(number) < float("inf") else str(number)
    return str(value)


def _win(preference: Any) -> float | None:
    """AlpacaEval's preference as part of a win: 1 the answer's, 0 the reference's, a half for a draw."""
    if isinstance(preference, bool) or not isinstance(preference, (int, float)):
        return None
    return 0.5 if preference in (0, 1.5) else float(preference) - 1


def is_sensitive(benchmark: Benchmark, found: Sequence[Sample]) -> bool:
    """Whether people should be asked before they are shown it: it asks for harm, or a judge found harm in an answer."""
    threshold = benchmark.threshold if isinstance(benchmark, RealToxicity) else 0.5
    for sample in found:
        for name, value in sample.scores.items():
            is_toxic = name.startswith("toxicity") and isinstance(value, float) and value >= threshold
            if is_toxic or (name.startswith("label") and value == "harmful"):
                return True
    return any(sample.harmful for sample in found)
