"""What the benchmarks that generate texts share: their rows, the model's answers, what is cut from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_align.config.benchmarks import Generated
from peft_align.data.pairs import Message
from peft_align.data.templates import STOPS
from peft_align.data.tokenization import cut_prompt, prompt_ids
from peft_align.errors import Fault, InputError
from peft_align.evaluation.scores import Metric, mean_metric, rate_metric
from peft_align.store.hub import find_repository, names_below
from peft_align.store.journal import Journal
from peft_align.store.records import Digests, digest_of, inventory

if TYPE_CHECKING:  # judging behind an API needs no torch
    from peft_align.models.loading import Base

Sample = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One prompt of a benchmark.

    Attributes:
        id: names it within the benchmark.
        text: what the model is given: the user's turn, or plain text to go on with.
        more: what else its sample keeps: what the judge needs.
    """

    id: str
    text: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """The questions of a benchmark, and the files that they were read from."""

    questions: list[Question]
    inputs: dict[str, dict[str, Any]]


def generate_samples(
    benchmark: Generated,
    questions: Sequence[Question],
    base: Base,
    model: Any,
    template: str,
    batch_size: int,
    journal: Callable[[dict[str, Any]], Journal],
    tick: Callable[[int, int], None],
) -> tuple[list[Sample], Journal]:
    """Have the model answer; what an interrupted attempt had answered is taken from its journal.

    Args:
        benchmark: its generation settings.
        questions: what is asked.
        base: for its tokenizer.
        model: the base with or without an adapter.
        template: of dialogues.
        batch_size: prompts per forward pass.
        journal: opens the journal of this evaluation, given what its entries depend on.
        tick: called with the number of texts done, and of all.

    Returns:
        A sample for each question, or several (`samples_per_prompt`), in order; and the journal, to be removed when
        they are recorded.
    """
    from peft_align.evaluation.generation import Prompt, Settings, Text, generate

    asked: list[tuple[Question, Prompt]] = []
    for question in questions:
        ids = _encoded(question.text, base.tokenizer, template, benchmark)
        for i in range(benchmark.samples_per_prompt):
            name = question.id if benchmark.samples_per_prompt == 1 else f"{question.id}/{i}"
            asked.append((question, Prompt(name, ids, seed_of(benchmark.seed, name))))
    prompts = [prompt for _, prompt in asked]
    digest = hashlib.sha256(json.dumps([[p.id, p.ids] for p in prompts]).encode()).hexdigest()
    kept = journal({"model": base.source["digest"], "prompts": digest})
    answers = {entry["id"]: entry for entry in kept.entries}
    tick(len(answers), len(prompts))

    def keep(texts: list[Text]) -> None:
        entries = [{"id": t.id, "raw": t.text, "tokens": t.tokens, "ended": t.ended} for t in texts]
        kept.append(entries)
        answers.update({entry["id"]: entry for entry in entries})
        tick(len(answers), len(prompts))

    stops = (*benchmark.stop, *(STOPS[template] if benchmark.use_template else ()))
    settings = Settings(benchmark.max_new_tokens, benchmark.temperature, benchmark.top_p, stops)
    generate(model, base.tokenizer, prompts, settings, batch_size=batch_size, done=set(answers), keep=keep)
    samples = []
    for question, prompt in asked:
        raw = answers[prompt.id]["raw"]
        output = without_thinking(raw) if benchmark.strip_thinking else raw
        output = output.strip() if benchmark.use_template else output
        asked_of = {"question": question.id, "prompt": question.text}
        samples.append({**asked_of, "output": output, **answers[prompt.id], **question.more})
    return samples, kept


def _encoded(text: str, tokenizer: Any, template: str, benchmark: Generated) -> list[int]:
    if benchmark.use_template:
        ids = prompt_ids([Message("user", text)], tokenizer, template)
    else:
        # what spells a special token in the data is text, as in training
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
    return cut_prompt(ids, benchmark.max_prompt_tokens, tokenizer.bos_token_id)


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for each text, the same in every run of the benchmark."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def without_thinking(text: str) -> str:
    """What a reasoning model says after its thoughts; nothing if it did not come to an end of them."""
    _, closed, rest = text.rpartition("</think>")
    text = rest if closed else text
    return re.sub(r"<think>.*", "", text, flags=re.DOTALL)


def length_metrics(samples: Sequence[Sample]) -> list[Metric]:
    """How long the texts are, and which share was cut off by the largest length."""
    clusters = [sample["question"] for sample in samples]
    return [
        mean_metric("response_words", [len(s["output"].split()) for s in samples], None, clusters=clusters),
        mean_metric("response_tokens", [s["tokens"] for s in samples], None, clusters=clusters),
        rate_metric("cut_off_rate", [s["ended"] == "length" for s in samples], None, clusters=clusters),
    ]


def read_rows(
    repo: str, config: str | None, split: str, mirror: str | None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """All rows of a split, from the mirror or the hub, and the digest of their files. Raises InputError.

    A config that is a JSON file of that name is read as it is: tatsu-lab/alpaca_eval is declared by a loading script,
    which datasets does not run any more.
    """
    import datasets

    patterns = [f"{config}*", "README.md"] if config else None
    folder, _ = find_repository(repo, None, "dataset", mirror, patterns=patterns)
    try:
        if config and (folder / f"{config}.json").is_file():
            name = f"{config}.json"
            return json.loads((folder / name).read_text(encoding="utf-8")), {repo: source_of(folder, [name])}
        builder = datasets.load_dataset_builder(str(folder), config)
        paths = list((builder.config.data_files or {}).get(split, []))
        if not paths:
            raise InputError([Fault(str(folder), f"has no files of a split '{split}'")])
        names_below(folder, paths)
        builder.download_and_prepare()
        rows = list(builder.as_dataset(split=split))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # what datasets lets through varies with the damage
        cause = error.__cause__ or error
        reason = " ".join((str(cause) or type(cause).__name__).split())[:200]
        raise InputError([Fault(repo, f"cannot be read: {reason}", "fetch it again")]) from None
    return rows, {repo: source_of(folder, names_below(folder, paths))}


def check_texts(repo: str, rows: Sequence[Any], names: Sequence[str], inside: str = "") -> None:
    """Raises InputError unless every row has these texts; `inside`: a mapping of each row that holds them."""
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        node = row.get(inside) if inside and isinstance(row, dict) else row
        for name in names:
            if isinstance(node, dict) and isinstance(node.get(name), str):
                continue
            key = f"{inside}.{name}" if inside else name
            has = f"it has {', '.join(map(str, list(row)[:8]))}" if isinstance(row, dict) else "it is no row"
            what = f"row {i} (counted from 0) has no text {key}; {has}"
            raise InputError([Fault(repo, what, "fetch it again, or mend the row")])


def source_of(folder: Path, names: list[str]) -> dict[str, Any]:
    """Files of a folder with their digests, as a record keeps them."""
    files = inventory(folder, names, Digests())
    return {"files": files, "digest": digest_of(files)}
