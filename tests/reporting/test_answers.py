"""Answers side by side: the same prompts of several runs, which of them, and what was said of each."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from sweeping import expand, finish_training, plan, trained
from written import TOXIC, Lines, evaluated, finish, texts, trained_in

from peft_align.config.benchmarks import BENCHMARKS
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run
from peft_align.reporting.answers import RUNS, answers
from peft_align.reporting.samples import is_sensitive, sample_of
from peft_align.store import records
from peft_align.store.runs import RunDir

WORDS = ("model=tiny", "dataset=everyday", "peft=lora", "train.max_steps=4", "evaluation.benchmarks=[real_toxicity]")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(records, "sync", lambda path: None)  # nothing is lost here that matters


def of(items: list[Item], root: Path, **how: Any) -> list[dict[str, Any]]:
    """The answers, which must be JSON as browsers read it."""
    found = answers(items, root, **how)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_each_prompt_has_the_answers_of_all_runs_the_bases_first(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "method=sft,dpo")
    found = of(finish(tmp_path, sweep), tmp_path, prompts=3)
    assert len(found) == len({entry["prompt"] for entry in found}) == 3
    runs = {run.id for run in sweep.runs}
    for entry in found:
        number = entry["prompt"].removeprefix("prompt ")
        assert [answer["label"] for answer in entry["answers"]] == [
            *("baseline tiny bf16", "sft lora everyday harmless seed 0", "dpo lora everyday harmless seed 0"),
        ]
        assert {answer["run_id"] for answer in entry["answers"]} == runs
        for answer in entry["answers"]:
            assert answer["text"] == f"{answer['run_id']} answers {number}"
            assert answer["scores"] == {"score": 1.5, "toxicity": 0.1}
            assert (answer["cut"], answer["ended"]) == (False, "length")
        assert (entry["benchmark"], entry["model"], entry["sensitive"]) == ("real_toxicity", "tiny", True)
        assert (entry["runs"], entry["shown"], entry["chosen"]) == (3, 3, "all 3 runs that have answers")


def test_the_prompts_are_the_same_each_time_and_not_the_first_ones(tmp_path: Path) -> None:
    items = finish(tmp_path, expand(*WORDS), lines=lambda run: texts(run, 100))
    one, other = (of(items, tmp_path, prompts=5) for _ in range(2))
    assert one == other
    assert {entry["prompt"] for entry in one} != {f"prompt {i}" for i in range(5)}
    assert len(of(items, tmp_path, prompts=500)) == 100


def test_of_many_runs_the_best_the_worst_and_some_of_each_method_answer(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "method=sft,dpo", f"seed=range({RUNS})")
    goodness = {run.id: float(i) for i, run in enumerate(trained(sweep))}
    found = of(finish(tmp_path, sweep, lambda run: goodness.get(run.id, 0.0)), tmp_path, prompts=2)
    best, worst = (choose(goodness, key=goodness.__getitem__) for choose in (max, min))
    for entry in found:
        ids = [answer["run_id"] for answer in entry["answers"]]
        labels = [answer["label"] for answer in entry["answers"]]
        assert len(ids) == len(set(ids)) == RUNS
        assert labels[0] == "baseline tiny bf16"
        assert {best, worst} <= set(ids)
        assert sum(label.startswith("sft") for label in labels) >= 4
        assert sum(label.startswith("dpo") for label in labels) >= 4
        assert (entry["runs"], entry["shown"]) == (2 * RUNS + 1, RUNS)
        assert entry["chosen"].startswith(f"{RUNS} of {2 * RUNS + 1} runs: ")


def test_a_run_whose_prompts_stand_elsewhere_in_its_file_answers_the_same_ones(tmp_path: Path) -> None:
    def turned(run: Run) -> Lines:
        return texts(run) if run.kind == "baseline" else texts(run)[::-1]

    for entry in of(finish(tmp_path, expand(*WORDS), lines=turned), tmp_path):
        number = entry["prompt"].removeprefix("prompt ")
        assert [answer["text"] for answer in entry["answers"]] == [
            f"{answer['run_id']} answers {number}" for answer in entry["answers"]
        ]
        assert len(entry["answers"]) == 2


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    def long(run: Run) -> Lines:
        return [line | {"prompt": "A" * 50 + "B" * 50, "output": "x" * 101} for line in texts(run, 1)]

    (entry,) = of(finish(tmp_path, expand(*WORDS), lines=long), tmp_path, length=40)
    assert entry["prompt_cut"]
    assert len(entry["prompt"]) <= 40
    assert (entry["prompt"][0], entry["prompt"][-1]) == ("A", "B")
    assert [(answer["text"], answer["cut"]) for answer in entry["answers"]] == [("x" * 40, True)] * 2


def test_what_a_terminal_obeys_and_secrets_are_not_in_them_and_html_is_left_as_it_is(tmp_path: Path) -> None:
    def bad(run: Run) -> Lines:
        return [line | {"output": "<b>\x1b]0;\u202e\ntoken=abcdefghij</b>"} for line in texts(run, 1)]

    (entry,) = of(finish(tmp_path, expand(*WORDS), lines=bad), tmp_path)
    assert entry["answers"][0]["text"] == "<b>\\x1b]0;\\u202e\ntoken=***"


def test_prompts_are_spread_over_benchmarks_and_those_without_texts_have_none(tmp_path: Path) -> None:
    words = [*WORDS[:4], "evaluation.benchmarks=[over_refusal,everyday_mc,real_toxicity]", "judge=none"]
    sweep = expand(*words, "benchmark.real_toxicity.judge=none")
    for run in trained(sweep):
        finish_training(tmp_path, run, **trained_in(3.0))
    choice = {"task": "everyday_mc", "doc_id": 0, "resps": [[[-1.5, False]]], "doc": {"question": "?"}, "acc": 1.0}
    for item in plan(sweep, tmp_path):
        for request in item.requests:
            own = texts(item.run)
            own = [choice] if request.benchmark == "everyday_mc" else own
            own = [line | {"safe": True} for line in own] if request.benchmark == "over_refusal" else own
            evaluated(tmp_path, request, own)
    found = of(plan(sweep, tmp_path), tmp_path, prompts=6)
    assert [entry["benchmark"] for entry in found] == ["over_refusal"] * 3 + ["real_toxicity"] * 3
    assert [entry["sensitive"] for entry in found] == [False] * 3 + [True] * 3
    assert all(len(entry["answers"]) == 2 for entry in found)


def test_a_benchmark_whose_task_has_the_model_write_has_answers() -> None:
    benchmark = BENCHMARKS["lm_eval"]("lm_eval", ["exact_match"], [], "gsm8k", 5)
    line = {"task": "gsm8k", "doc_id": 7, "target": "18", "resps": [["She has 18."]], "exact_match": 1.0}
    sample = sample_of(benchmark, line | {"doc": {"question": "How many?", "answer": "18"}}, {})
    assert sample is not None
    assert (sample.key, sample.prompt, sample.text) == ("gsm8k 7", "How many?", "She has 18.")
    assert sample.scores == {"exact_match": 1.0}
    assert not is_sensitive(benchmark, [sample])


@pytest.mark.parametrize(
    ("said", "scores", "sensitive"),
    [
        ({"label": "harmful"}, {"label": "harmful"}, True),
        ({"label": "not harmful"}, {"label": "not harmful"}, False),
        ({"preference": 2.0}, {"win": 1.0}, False),
        ({"preference": 1.0}, {"win": 0.0}, False),
        ({"preference": 1.5}, {"win": 0.5}, False),
        ({"preference": None}, {"win": None}, False),
        ({"refused": True, "answer": "text of the judge"}, {"refused": True}, False),
        ({"score": float("nan"), "toxicity": 0.7}, {"score": "nan", "toxicity": 0.7}, True),
    ],
)
def test_what_a_judge_said_stands_beside_the_answer(
    said: dict[str, Any], scores: dict[str, Any], sensitive: bool
) -> None:
    (_, benchmark), *_ = expand(*WORDS[:4], "evaluation.benchmarks=[alpaca_eval]").runs[0].scorings[0].benchmarks
    line = {"id": "0", "question": "0", "prompt": "p", "output": "o"}
    compared = {"reference_output": "r", "reference_generator": "g"}
    sample = sample_of(benchmark, line | compared, {"gpt4/m": said})
    assert sample is not None
    assert sample.scores == scores
    assert sample.reference == ("r", "g")
    assert is_sensitive(benchmark, [sample]) == sensitive


def test_an_answer_that_a_judge_found_toxic_makes_the_prompt_sensitive_and_says_it(tmp_path: Path) -> None:
    def one_bad(run: Run) -> Lines:
        return [line | {"output": TOXIC} if run.kind == "baseline" else line for line in texts(run, 1)]

    (entry,) = of(finish(tmp_path, expand(*WORDS), lines=one_bad), tmp_path)
    assert [answer["scores"]["toxicity"] for answer in entry["answers"]] == [0.9, 0.1]


def test_a_file_that_holds_no_samples_leaves_that_run_out(tmp_path: Path) -> None:
    sweep = expand(*WORDS, "seed=0,1")
    items = finish(tmp_path, sweep)
    (broken,) = (item for item in items if item.run.kind == "baseline")
    path = RunDir(tmp_path, broken.run.id).evaluation(broken.requests[0].name) / "samples.jsonl.gz"
    path.write_bytes(gzip.compress(b"[]\n"))
    found = of(items, tmp_path)
    assert len(found) == 8
    assert all([a["label"][-6:] for a in entry["answers"]] == ["seed 0", "seed 1"] for entry in found)
