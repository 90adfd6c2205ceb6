"""What a model answers to a benchmark's questions: encoded as it should be, kept as it comes, never made twice."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, shipped

from peft_align.config.benchmarks import Generated
from peft_align.data.templates import VICUNA_SYSTEM
from peft_align.errors import InputError
from peft_align.evaluation.texts import (
    Question,
    Sample,
    generate_samples,
    length_metrics,
    read_rows,
    seed_of,
    without_thinking,
)
from peft_align.grid.benchmarks import find_benchmark
from peft_align.models.loading import Base, load_base
from peft_align.store.journal import Journal

QUESTIONS = [
    Question("0", "Hello, who are you?", {"kind": "small talk"}),
    Question("1", "Why is the sky blue? Answer in one sentence.", {"kind": "physics"}),
    Question("2", "Count.", {"kind": "arithmetic"}),
    Question("3", "Name three fruits and three vegetables that are red, and say where they grow."),
    Question("4", "ü ± ” \u2028 猫"),
]


@pytest.fixture(scope="module")
def base() -> Base:
    words = ("model=tiny", "dataset=everyday", "method=dpo", "peft=lora", "peft.compute_dtype=fp32")
    return load_base(expand(*words, "evaluation.benchmarks=[preference]").runs[0].config)


def benchmark_of(name: str = "alpaca_eval", **tuned: Any) -> Generated:
    faults: list[Any] = []
    found = find_benchmark(shipped(), name, None, {"max_new_tokens": 6, "temperature": 1, **tuned}, faults)
    assert isinstance(found, Generated), faults
    return found


def raw(**tuned: Any) -> Generated:
    """Plain text to go on with."""
    return benchmark_of("real_toxicity", **tuned)


@dataclasses.dataclass
class Asking:
    """Asks the tiny model, with a journal in a file."""

    base: Base
    path: Path
    ticks: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __call__(
        self,
        benchmark: Generated,
        questions: Sequence[Question] = QUESTIONS,
        size: int = 2,
        base: Base | None = None,
        template: str = "vicuna",
    ) -> list[Sample]:
        own = base or self.base
        samples, self.journal = generate_samples(
            benchmark, questions, own, own.model, template, size, self.open, lambda *done: self.ticks.append(done)
        )
        return samples

    def open(self, head: dict[str, Any]) -> Journal:
        return Journal(self.path, head)


@pytest.fixture
def ask(base: Base, tmp_path: Path) -> Asking:
    return Asking(base, tmp_path / "evaluation" / "unfinished.jsonl")


@pytest.fixture
def calls(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the model's own generate had."""
    counted: list[int] = []
    generate: Callable[..., Any] = base.model.generate

    def counting(*words: Any, **named: Any) -> Any:
        counted.append(len(named["input_ids"]))
        return generate(*words, **named)

    monkeypatch.setattr(base.model, "generate", counting)
    return counted


@contextmanager
def heard(base: Base) -> Iterator[list[list[int]]]:
    """The prompts as the model reads them, where each is a batch of its own and one token is asked for."""
    prompts: list[list[int]] = []

    def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        (ids,) = kwargs["input_ids"].tolist()
        prompts.append(ids)

    hook = base.model.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield prompts
    finally:
        hook.remove()


def test_each_question_has_its_sample_in_order_with_what_the_judge_needs(ask: Asking) -> None:
    samples = ask(benchmark_of())
    assert [(s["id"], s["question"], s["prompt"]) for s in samples] == [(q.id, q.id, q.text) for q in QUESTIONS]
    assert [s.get("kind") for s in samples] == ["small talk", "physics", "arithmetic", None, None]
    for sample in samples:
        assert sample["output"] == sample["raw"].strip()
        assert (sample["ended"], sample["tokens"]) in {("length", 6), *(("end", n) for n in range(1, 7))}
    assert len({sample["raw"] for sample in samples}) == 5


def test_a_second_call_with_the_journal_generates_nothing_anew(ask: Asking, calls: list[int]) -> None:
    first = ask(benchmark_of())
    assert calls == [2, 2, 1]
    content = ask.path.read_bytes()
    assert ask.ticks == [(0, 5), (2, 5), (4, 5), (5, 5)]
    ask.ticks.clear()
    assert ask(benchmark_of()) == first
    assert calls == [2, 2, 1]
    assert ask.ticks == [(5, 5)]
    assert ask.path.read_bytes() == content
    ask.journal.remove()
    assert ask(benchmark_of()) == first
    assert calls == [2, 2, 1] * 2


@pytest.mark.parametrize("lost", [1, 20])
def test_only_samples_that_a_kill_took_from_the_journal_are_generated_again(
    ask: Asking, calls: list[int], lost: int
) -> None:
    first = ask(benchmark_of(), size=1)
    assert calls == [1] * 5
    content = ask.path.read_bytes()
    ask.path.write_bytes(content[:-lost])  # the last line is torn
    assert ask(benchmark_of(), size=1) == first
    assert calls == [1] * 6
    assert ask.path.read_bytes() == content


def test_a_torn_batch_is_generated_as_a_whole_and_only_its_lost_samples_are_kept(ask: Asking, calls: list[int]) -> None:
    first = ask(benchmark_of(), size=4)
    content = ask.path.read_bytes()
    lines = content.splitlines(keepends=True)
    ask.path.write_bytes(b"".join(lines[:3]) + lines[3][:7])  # the head and two of the first four
    assert ask(benchmark_of(), size=4) == first
    assert calls == [4, 1, 4, 1]
    assert ask.path.read_bytes() == content


def test_a_journal_about_other_prompts_is_begun_anew(ask: Asking, calls: list[int]) -> None:
    ask(benchmark_of())
    calls.clear()
    other = [*QUESTIONS[:4], Question("4", "another")]
    found = ask(benchmark_of(), other)
    assert calls == [2, 2, 1]
    assert found[4]["prompt"] == "another"
    assert [entry["id"] for entry in ask.journal.entries] == sorted("01234", key=lambda i: -len(other[int(i)].text))
    ask(benchmark_of(), QUESTIONS[:2])
    assert calls == [2, 2, 1, 2]
    ask(benchmark_of(max_prompt_tokens=8), QUESTIONS[:2])
    assert calls == [2, 2, 1, 2, 2]
    ask(benchmark_of(max_prompt_tokens=8), QUESTIONS[:2], template="mistral")
    assert calls == [2, 2, 1, 2, 2, 2]


def test_a_journal_about_another_base_is_begun_anew(ask: Asking, calls: list[int], base: Base) -> None:
    ask(benchmark_of())
    ask(benchmark_of(), base=dataclasses.replace(base, source=base.source | {"digest": "another"}))
    assert calls == [2, 2, 1] * 2
    ask(benchmark_of(), base=dataclasses.replace(base, source=base.source | {"digest": "another"}))
    assert calls == [2, 2, 1] * 2
    ask(benchmark_of())
    assert calls == [2, 2, 1] * 3


def test_several_samples_of_a_prompt_have_ids_and_texts_of_their_own(ask: Asking) -> None:
    sampled = raw(samples_per_prompt=3, temperature=1, max_new_tokens=12)
    samples = ask(sampled, size=4)
    assert [s["id"] for s in samples] == [f"{q.id}/{i}" for q in QUESTIONS for i in range(3)]
    assert [s["question"] for s in samples] == [q.id for q in QUESTIONS for _ in range(3)]
    assert len({s["output"] for s in samples}) == 15
    alone = ask(sampled, QUESTIONS[2:3], size=1)
    assert alone == samples[6:9]
    assert ask(dataclasses.replace(sampled, samples_per_prompt=2), QUESTIONS[2:3]) == samples[6:8]
    other = ask(dataclasses.replace(sampled, seed=1), QUESTIONS[:1])
    assert not {s["output"] for s in other} & {s["output"] for s in samples}


def test_one_sample_of_a_prompt_bears_the_questions_id(ask: Asking) -> None:
    assert [s["id"] for s in ask(raw(temperature=1))] == list("01234")


def test_seeds_differ_and_stay_the_same() -> None:
    seeds = {seed_of(seed, f"{q}/{i}") for seed in range(3) for q in range(50) for i in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "0") == 5303414058334976765


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Hello.", "Hello."),
        ("<think>Hm.</think>Hello.", "Hello."),
        ("<think>\nHm.\n\n</think>\n\nHello.\n", "\n\nHello.\n"),
        ("Hm.</think>Hello.", "Hello."),  # the template wrote <think> itself
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>It goes on\nand on", ""),
        ("First. <think>It goes on", "First. "),
        ("<think>a</think>b <think>It goes on", "b "),
        ("I think.", "I think."),
        ("", ""),
    ],
)
def test_thoughts_are_cut_even_where_they_do_not_end(text: str, rest: str) -> None:
    assert without_thinking(text) == rest


@pytest.mark.parametrize(
    ("benchmark", "output"),
    [
        (benchmark_of(), "An answer."),
        (benchmark_of(strip_thinking=False), "<think>Hm.</think> An answer."),
        (raw(), " <think>Hm.</think> An answer. \n"),
        (raw(strip_thinking=True), " An answer. \n"),
    ],
    ids=["answer", "answer with thoughts", "continuation", "continuation without thoughts"],
)
def test_thoughts_and_outer_blanks_are_cut_only_where_they_are_to_be(
    ask: Asking, benchmark: Generated, output: str
) -> None:
    """What the model is taken to have written stands in its journal."""
    written = " <think>Hm.</think> An answer. \n"
    ask(benchmark, QUESTIONS[:1])
    head = json.loads(ask.path.read_text(encoding="utf-8").splitlines()[0])["head"]
    (entry,) = Journal(ask.path, head).entries
    ask.path.unlink()
    Journal(ask.path, head).append([entry | {"raw": written}])
    (sample,) = ask(benchmark, QUESTIONS[:1])
    assert (sample["output"], sample["raw"]) == (output, written)


def test_a_dialogue_stands_in_the_models_template(ask: Asking, base: Base) -> None:
    with heard(base) as prompts:
        ask(benchmark_of(max_new_tokens=1), QUESTIONS[:1])
    (ids,) = prompts
    assert ids[0] == base.tokenizer.bos_token_id
    assert base.tokenizer.decode(ids[1:]) == f"{VICUNA_SYSTEM} USER: Hello, who are you? ASSISTANT:"


@pytest.mark.parametrize("text", ["Hello, who", "", " and then", "x" * 40], ids=["text", "empty", "blank", "long"])
def test_plain_text_begins_with_one_bos_and_nothing_else_is_added(ask: Asking, base: Base, text: str) -> None:
    bos = base.tokenizer.bos_token_id
    with heard(base) as prompts:
        (sample,) = ask(raw(max_new_tokens=1), [Question("0", text)])
    (ids,) = prompts
    assert ids[0] == bos
    assert ids.count(bos) == 1
    assert base.tokenizer.decode(ids[1:]) == text
    assert len(ids) == 1 + len(text)  # of a token a byte: no end token, no blank
    assert sample["output"] == sample["raw"]  # the blank that a continuation begins with stays


@pytest.mark.parametrize("text", ["He wrote </s> and", "<s> is a tag", "<pad><pad>"])
def test_a_special_token_spelled_in_plain_text_is_text(ask: Asking, base: Base, text: str) -> None:
    """As in dialogues and in training: what spells one in the data is the data's."""
    with heard(base) as prompts:
        ask(raw(max_new_tokens=1), [Question("0", text)])
    (ids,) = prompts
    assert ids[0] == base.tokenizer.bos_token_id
    assert not set(ids[1:]) & set(base.tokenizer.all_special_ids)
    assert base.tokenizer.decode(ids[1:]) == text


def test_a_prompt_that_is_too_long_loses_its_beginning_and_keeps_its_bos(ask: Asking, base: Base) -> None:
    text = "The beginning of it all, and its end"
    with heard(base) as prompts:
        ask(raw(max_new_tokens=1, max_prompt_tokens=16), [Question("0", text)])
        ask(benchmark_of(max_new_tokens=1, max_prompt_tokens=24), [Question("0", text)])
        ask(raw(max_new_tokens=1, max_prompt_tokens=37), [Question("0", text)])
    bos = base.tokenizer.bos_token_id
    assert prompts[0] == [bos, *base.tokenizer(text[-15:], add_special_tokens=False)["input_ids"]]
    assert len(prompts[1]) == 24
    assert prompts[1][0] == bos
    assert base.tokenizer.decode(prompts[1][1:]) == f"{text} ASSISTANT:"[-23:]
    assert base.tokenizer.decode(prompts[2][1:]) == text  # just fits


def test_a_template_has_stops_and_plain_text_has_none(ask: Asking, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    generate: Callable[..., Any] = base.model.generate

    def reading(*words: Any, **named: Any) -> Any:
        ended.append(" ".join(stop for each in named["stopping_criteria"] for stop in each.stops))
        return generate(*words, **named)

    monkeypatch.setattr(base.model, "generate", reading)
    ask(benchmark_of(stop=["###"]), QUESTIONS[:1])
    ask(benchmark_of(), QUESTIONS[:1], template="mistral")
    ask(raw(), QUESTIONS[:1])
    assert ended == ["### USER:", "[INST]", ""]


def test_lengths_are_told_with_errors_of_the_questions() -> None:
    answers = [("0", "a b c", 5, "end"), ("0", "a b c", 5, "end"), ("1", "", 1, "end"), ("1", "", 1, "length")]
    samples = [{"question": q, "output": o, "tokens": t, "ended": e} for q, o, t, e in answers]
    words, tokens, cut = length_metrics(samples)
    assert (words.name, words.value, words.n, words.higher_is_better) == ("response_words", 1.5, 4, None)
    assert words.stderr == pytest.approx(1.5)  # of two questions with 3 and 0
    assert (tokens.name, tokens.value) == ("response_tokens", 3)
    assert (cut.name, cut.value, cut.bound) == ("cut_off_rate", 0.25, None)
    assert length_metrics(samples[:3])[2].bound == pytest.approx(1 - 0.05 ** (1 / 2))


def test_rows_of_a_real_dataset_come_in_order_with_the_digest_of_their_files(mirror: Path) -> None:
    rows, inputs = read_rows("tatsu-lab/alpaca_eval", "alpaca_eval", "eval", str(mirror))
    path = mirror / "tatsu-lab/alpaca_eval/alpaca_eval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        assert rows == [json.loads(line) for line in file]
    assert list(inputs) == ["tatsu-lab/alpaca_eval"]
    assert inputs["tatsu-lab/alpaca_eval"]["files"][path.name]["size"] == path.stat().st_size
    assert len(inputs["tatsu-lab/alpaca_eval"]["files"]) == 1


def test_rows_of_a_json_file_named_as_the_config_are_read_as_they_are(mirror: Path, tmp_path: Path) -> None:
    rows, _ = read_rows("tatsu-lab/alpaca_eval", "alpaca_eval", "eval", str(mirror))
    folder = tmp_path / "tatsu-lab/alpaca_eval"
    folder.mkdir(parents=True)
    (folder / "alpaca_eval.json").write_text(json.dumps(rows[:20]), encoding="utf-8")
    (folder / "alpaca_eval.py").write_text("raise RuntimeError('a loading script must not be run')\n", encoding="utf-8")
    found, inputs = read_rows("tatsu-lab/alpaca_eval", "alpaca_eval", "eval", str(tmp_path))
    assert found == rows[:20]
    assert list(inputs["tatsu-lab/alpaca_eval"]["files"]) == ["alpaca_eval.json"]


@pytest.mark.parametrize(
    ("config", "split", "what"),
    [("alpaca_eval", "train", "split 'train'"), ("nothing", "eval", "BuilderConfig 'nothing' not found")],
)
def test_a_split_or_config_that_is_not_there_is_a_fault(mirror: Path, config: str, split: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        read_rows("tatsu-lab/alpaca_eval", config, split, str(mirror))


def test_a_dataset_that_is_not_there_is_a_fault_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nobody/nothing: is neither in the mirror .*set hub\.mirror=DIR"):
        read_rows("nobody/nothing", None, "train", str(tmp_path))
