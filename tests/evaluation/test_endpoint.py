"""A judge behind an API, asked over HTTP: whatever the network and the API do, its answers are those it gave."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, Reply, Request, ask_of, endpoint, leave_texts, samples_in
from sweeping import expand

from peft_align.data.pairs import Message
from peft_align.evaluation import endpoint as module
from peft_align.evaluation.judges import Answers, JudgeUnavailable
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.launch.job import Worker
from peft_align.store.runs import RunDir

SECRET = "sk-test-Jb7Qx2vN0pLr5tWz"
NOISE = json.dumps({"choices": []}).encode()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


def echo(request: Request) -> Reply:
    return Reply(f"on {request.question}")


def told(*contents: str) -> list[str | None]:
    """What `echo` answers."""
    return [f"on {content}" for content in contents]


# --- AlpacaEval's published annotations, as if the server were the annotator

Annotation = dict[str, Any]
RANKED = "[{{'model': 'model_1', 'rank': {}}}, {{'model': 'model_2', 'rank': {}}}]"


class Annotator:
    """Answers AlpacaEval's questions with the published preferences; knows each pair in both orders by its content."""

    def __init__(self, shared: Path, annotations: list[Annotation]) -> None:
        prompt = (shared / "peers/alpaca_eval/evaluators/alpaca_eval_gpt4/alpaca_eval.txt").read_text(encoding="utf-8")
        _, _, user = prompt.partition("<|im_start|>user\n")
        pieces = re.split(r"\{instruction\}|\{output_1\}|\{output_2\}", user.removesuffix("\n<|im_end|>"))
        assert len(pieces) == 4
        self.known: dict[str, tuple[Annotation, bool]] = {}
        for annotation in annotations:
            both = annotation["output_1"], annotation["output_2"]
            for turned, (first, second) in ((False, both), (True, both[::-1])):
                question = "".join(
                    [pieces[0], annotation["instruction"], pieces[1], first, pieces[2], second, pieces[3]]
                )
                assert question not in self.known or both[0] == both[1]
                self.known[question] = annotation, turned
        self.turned = 0

    def __call__(self, request: Request) -> Reply:
        assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
        annotation, turned = self.known[request.question]
        self.turned += turned
        if annotation["preference"] == 0:
            return Reply("Both are as good as each other.")
        first_is_better = (annotation["preference"] == 1) != turned
        return Reply(RANKED.format(1, 2) if first_is_better else RANKED.format(2, 1))


def annotations_of(shared: Path) -> list[Annotation]:
    path = shared / "peers/alpaca_eval/annotations/alpaca-7b.alpaca_eval_gpt4.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: list[Annotation] = json.load(file)
    return found


def some_annotations(shared: Path, count: int) -> list[Annotation]:
    """Of each published preference some."""
    found = annotations_of(shared)
    return [a for preference in (0, 1, 2) for a in found if a["preference"] == preference][:: len(found) // count]


def baseline(shared: Path, url: str, *words: str) -> Run:
    prompt = shared / "peers/alpaca_eval/evaluators/alpaca_eval_gpt4/alpaca_eval.txt"
    sweep = expand(
        "model=tiny", "dataset=everyday", "peft=lora", "method=sft", "evaluation.benchmarks=[alpaca_eval]",
        f"hub.mirror={shared / 'mirror'}", f"benchmark.alpaca_eval.prompt_file={prompt}", "judge=endpoint",
        f"judge.base_url={url}", *words,
    )  # fmt: skip
    return next(run for run in sweep.runs if run.kind == "baseline")


def judge_annotations(
    root: Path, run: Run, annotations: list[Annotation]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Have the published outputs judged as a job does: the record of the judging, and its samples."""
    samples = [
        {
            "prompt": a["instruction"],
            "output": a["output_2"],
            "reference_output": a["output_1"],
            "reference_generator": a["generator_1"],
            "reference_dataset": a["dataset"],
        }
        for a in annotations
    ]
    leave_texts(root, run, "alpaca_eval", samples)
    directory = RunDir(root, run.id)
    assert Worker(root, "sweep", ("judge",)).do(run), directory.failure()
    (judgement,) = Planner(root, run.config.hub.mirror).item(run).judgements
    record = directory.judgement_record(judgement.request.name, judgement.name)
    assert record is not None
    return record, samples_in(directory.judgement(judgement.request.name, judgement.name))


def values(record: dict[str, Any]) -> dict[str, tuple[float, int]]:
    return {metric["name"]: (metric["value"], metric["n"]) for metric in record["metrics"]}


def test_the_win_rate_is_the_published_preferences_whichever_output_the_judge_reads_first(
    server: JudgeServer, shared: Path, tmp_path: Path
) -> None:
    annotations = annotations_of(shared)
    server.behave = annotator = Annotator(shared, annotations)
    record, samples = judge_annotations(tmp_path, baseline(shared, server.url), annotations)
    told = [a["preference"] for a in annotations if a["preference"] in (1, 2)]
    assert len(annotations) == 805
    assert 0 < len(told) < 805
    found = values(record)
    assert found["win_rate"] == (pytest.approx(100 * told.count(2) / len(told), abs=1e-9), len(told))
    assert found["failed_rate"] == (pytest.approx(1 - len(told) / 805), 805)
    assert [s["preference"] for s in samples] == [a["preference"] or None for a in annotations]
    assert 300 < annotator.turned < 505, "about half of the pairs are shown the other way round"
    assert max(server.asked.values()) == 1
    assert len(server.requests) == 805
    assert record["details"]["asked"] == 805


# --- Disturbances that pass

TROUBLES: dict[str, Callable[[Reply], Reply]] = {
    "429": lambda truth: Reply(status=429),
    "429 with the seconds to wait": lambda truth: Reply(status=429, headers={"Retry-After": "0.03"}),
    "429 with a date": lambda truth: Reply(status=429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "429 with nonsense": lambda truth: Reply(status=429, headers={"Retry-After": "soon"}),
    "429 with a negative time": lambda truth: Reply(status=429, headers={"Retry-After": "-5"}),
    "500": lambda truth: Reply(status=500),
    "500 that is HTML": lambda truth: Reply(status=500, body=b"<html>\xff</html>"),
    "502": lambda truth: Reply(status=502),
    "503": lambda truth: Reply(status=503, headers={"Retry-After": "0"}),
    "504": lambda truth: Reply(status=504),
    "later than the time-out": lambda truth: Reply(truth.text, delay=1.5),
    "cut before the head": lambda truth: Reply(truth.text, cut=0),
    "cut within the head": lambda truth: Reply(truth.text, cut=20),
    "cut within the body": lambda truth: Reply(truth.text, cut=140),
    "200 that is empty": lambda truth: Reply(body=b""),
    "200 that is HTML": lambda truth: Reply(body=b"<html>Bad gateway</html>"),
    "200 that is not UTF-8": lambda truth: Reply(body=b"\xff\xfe\x00\x01{"),
    "200 that is half of its JSON": lambda truth: Reply(body=Reply(truth.text).content()[:-9]),
    "200 that is a list": lambda truth: Reply(body=b"[1, 2]"),
    "200 that is null": lambda truth: Reply(body=b"null"),
    "200 with an error in it": lambda truth: Reply(body=b'{"error": {"message": "overloaded"}}'),
    "200 without choices": lambda truth: Reply(body=NOISE),
    "200 with choices of another form": lambda truth: Reply(body=b'{"choices": "none"}'),
    "200 whose content is null": lambda truth: Reply(None),
    "200 whose content is a list": lambda truth: Reply(body=b'{"choices": [{"message": {"content": [1]}}]}'),
    "200 packed in another way than it says": lambda truth: Reply(truth.text, headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_question_is_asked_again_until_it_is_answered(server: JudgeServer, tmp_path: Path, trouble: str) -> None:
    def behave(request: Request) -> Reply:
        return TROUBLES[trouble](echo(request)) if request.attempt <= 2 else echo(request)

    server.behave = behave
    answers = Answers(endpoint(server.url, timeout=1.0), tmp_path)
    assert answers.ask(ask_of("a", "b")) == told("a", "b")
    assert server.asked == {"a": 3, "b": 3}
    assert answers.details()["asked"] == 2


@pytest.mark.parametrize(
    "usage", ['"none"', "[]", "[1]", "7", "null", '{"prompt_tokens": "many"}', '{"prompt_tokens": null}']
)
def test_an_answer_counts_whatever_it_says_of_tokens(server: JudgeServer, tmp_path: Path, usage: str) -> None:
    body = f'{{"choices": [{{"message": {{"content": "yes"}}}}], "usage": {usage}}}'.encode()
    server.behave = lambda request: Reply(body=body) if request.attempt <= 2 else Reply("yes")
    assert Answers(endpoint(server.url), tmp_path).ask(ask_of("a")) == ["yes"]


def test_an_answer_that_ends_within_a_character_is_kept(server: JudgeServer, tmp_path: Path) -> None:
    server.behave = lambda request: Reply("good \ud83d")  # a lone surrogate: half of an emoji, cut by max_tokens
    judge = endpoint(server.url)
    (answer,) = Answers(judge, tmp_path).ask(ask_of("a"))
    assert (answer or "").startswith("good ")
    assert Answers(judge, tmp_path).ask(ask_of("a")) == [answer]
    assert server.asked == {"a": 1}


def test_disturbed_in_every_way_it_gives_the_undisturbed_result(
    server: JudgeServer, shared: Path, tmp_path: Path
) -> None:
    annotations = some_annotations(shared, 60)
    server.behave = annotator = Annotator(shared, annotations)
    words = ["judge.concurrency=4", "judge.timeout=1", "judge.retries=3"]
    run = baseline(shared, server.url, *words)
    record, samples = judge_annotations(tmp_path / "undisturbed", run, annotations)
    assert len({s["preference"] for s in samples}) == 3, "wins, losses and failures"
    server.forget()
    troubles, number = list(TROUBLES.values()), {question: i for i, question in enumerate(sorted(annotator.known))}

    def disturb(request: Request) -> Reply:
        truth = annotator(request)
        if request.attempt > 2:
            return truth
        return troubles[(number[request.question] * 2 + request.attempt) % len(troubles)](truth)

    server.behave = disturb
    again, disturbed = judge_annotations(tmp_path / "disturbed", run, annotations)
    assert again["metrics"] == record["metrics"]
    assert disturbed == samples
    assert again["files"] == record["files"]
    assert set(server.asked.values()) <= {3, 4}, "4 where this machine was too slow for the time-out"


def test_a_judge_that_says_when_to_come_back_is_not_asked_before(server: JudgeServer, tmp_path: Path) -> None:
    wait = 0.09  # below LONGEST_PAUSE, far above FIRST_PAUSE

    def behave(request: Request) -> Reply:
        first = len(server.requests) == 1
        return Reply(status=429, headers={"Retry-After": str(wait)}) if first else echo(request)

    server.behave = behave
    Answers(endpoint(server.url, concurrency=1), tmp_path).ask(ask_of("a", "b", "c"))
    times = [request.time for request in server.requests]
    assert len(times) == 4
    assert times[1] - times[0] >= wait


def test_the_pauses_grow(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.04)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.2)
    server.behave = lambda request: Reply(status=500) if request.attempt <= 7 else echo(request)
    Answers(endpoint(server.url, retries=7), tmp_path).ask(ask_of("a"))
    times = [request.time for request in server.requests]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    least = [0.02, 0.04, 0.08, 0.1, 0.1, 0.1, 0.1]  # half of 0.04, 0.08, 0.16, 0.2, 0.2 ...
    assert all(gap >= low for gap, low in zip(gaps, least, strict=True)), gaps
    assert gaps[-1] < 1.0, "it would be 1.28 at least"


def test_a_judge_that_stays_away_is_unavailable_after_its_retries_and_what_it_answered_is_kept(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.behave = lambda request: Reply(status=503) if request.question == "c" else echo(request)
    judge = endpoint(server.url, retries=2, concurrency=1)
    with pytest.raises(JudgeUnavailable, match=r"HTTP 503: .*the server says 503"):
        Answers(judge, tmp_path).ask(ask_of("a", "b", "c", "d"))
    assert server.asked == {"a": 1, "b": 1, "c": 3}
    server.forget()
    server.behave = echo
    assert Answers(judge, tmp_path).ask(ask_of("a", "b", "c", "d")) == told("a", "b", "c", "d")
    assert server.asked == {"c": 1, "d": 1}


def test_answers_that_are_under_way_when_the_judge_turns_unavailable_are_kept(
    server: JudgeServer, tmp_path: Path
) -> None:
    def behave(request: Request) -> Reply:
        return Reply(status=401) if request.question == "bad" else Reply(f"on {request.question}", delay=0.3)

    server.behave = behave
    judge = endpoint(server.url, concurrency=4)
    with pytest.raises(JudgeUnavailable):
        Answers(judge, tmp_path).ask(ask_of("a", "b", "c", "bad", "d", "e", "f", "g"))
    assert server.asked == {"a": 1, "b": 1, "c": 1, "bad": 1}
    server.forget()
    server.behave = echo
    Answers(judge, tmp_path).ask(ask_of("a", "b", "c", "bad"))
    assert server.asked == {"bad": 1}


def test_a_judge_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with JudgeServer() as server:
        url = server.url
    with pytest.raises(JudgeUnavailable, match=re.escape(f"{url}/chat/completions: ConnectError")):
        Answers(endpoint(url, retries=1), tmp_path).ask(ask_of("a"))


# --- What does not pass


@pytest.mark.parametrize("status", [401, 403, 404, 301, 405])
def test_a_refused_key_or_model_ends_it_at_once(server: JudgeServer, tmp_path: Path, status: int) -> None:
    server.behave = lambda request: Reply(status=status)
    questions = ask_of(*map(str, range(20)))
    with pytest.raises(JudgeUnavailable) as caught:
        Answers(endpoint(server.url, concurrency=1), tmp_path).ask(questions)
    message = str(caught.value)
    assert message.startswith(f"{server.url}/chat/completions: HTTP {status}: ")
    assert f"the server says {status}" in message
    assert "\n" not in message
    assert len(server.requests) == 1


def test_a_refused_key_ends_the_pauses_of_other_questions(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 60.0)
    server.behave = lambda request: Reply(status=503) if request.question in "abc" else Reply(status=401, delay=0.3)
    started = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="HTTP 401"):
        Answers(endpoint(server.url, concurrency=4), tmp_path).ask(ask_of(*"abcdefg"))
    assert time.monotonic() - started < 15
    assert server.asked == {"a": 1, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_question_has_no_answer_and_the_others_have(server: JudgeServer, tmp_path: Path, status: int) -> None:
    server.behave = lambda request: Reply(status=status) if request.question == "b" else echo(request)
    judge = endpoint(server.url)
    assert Answers(judge, tmp_path).ask(ask_of("a", "b", "c")) == ["on a", None, "on c"]
    assert server.asked == {"a": 1, "b": 1, "c": 1}
    server.forget()
    assert Answers(judge, tmp_path).ask(ask_of("a", "b", "c")) == ["on a", None, "on c"]
    assert server.requests == [], "a refusal is an answer too"


def test_a_judge_that_refuses_all_and_never_answered_is_unavailable_and_nothing_is_kept(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.behave = lambda request: Reply(status=400)
    judge = endpoint(server.url, concurrency=2)
    with pytest.raises(JudgeUnavailable, match="refuses every question: HTTP 400"):
        Answers(judge, tmp_path).ask(ask_of("a", "b", "c"))
    assert max(server.asked.values()) == 1
    server.forget()
    server.behave = echo
    assert Answers(judge, tmp_path).ask(ask_of("a", "b", "c")) == told("a", "b", "c")
    assert server.asked == {"a": 1, "b": 1, "c": 1}


def test_a_judge_that_answered_before_may_refuse_all_of_a_batch(server: JudgeServer, tmp_path: Path) -> None:
    server.behave = lambda request: echo(request) if request.question == "a" else Reply(status=400)
    judge = endpoint(server.url)
    Answers(judge, tmp_path).ask(ask_of("a"))
    assert Answers(judge, tmp_path).ask(ask_of("b", "c")) == [None, None]


# --- Asked once


def test_no_question_is_asked_twice(server: JudgeServer, tmp_path: Path) -> None:
    server.behave = echo
    answers = Answers(endpoint(server.url, concurrency=3), tmp_path)
    assert answers.ask(ask_of("a", "b", "a", "c", "b")) == told("a", "b", "a", "c", "b")
    assert answers.ask(ask_of("c", "d", "a")) == told("c", "d", "a")
    assert server.asked == {"a": 1, "b": 1, "c": 1, "d": 1}


ASKS = """
import json, sys
from pathlib import Path
from peft_align.config.judges import Endpoint
from peft_align.data.pairs import Message
from peft_align.evaluation.judges import Answers

settings, folder, contents = json.loads(sys.argv[1])
answers = Answers(Endpoint(**settings), Path(folder))
found = answers.ask([[Message("user", content)] for content in contents])
print(json.dumps([found, answers.details()]))
"""


def asks(judge: Any, folder: Path, contents: list[str]) -> subprocess.Popen[str]:
    """Another process that asks."""
    words = json.dumps([vars(judge), str(folder), contents])
    return subprocess.Popen([sys.executable, "-c", ASKS, words], stdout=subprocess.PIPE, text=True)


def kept_in(folder: Path) -> list[str]:
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_bytes().split(b"\n")[1:-1]]
    return [json.loads(line)["answer"] for line in lines]


def test_killed_in_the_middle_of_a_batch_none_of_the_kept_answers_is_asked_again(
    server: JudgeServer, tmp_path: Path
) -> None:
    server.behave = lambda request: Reply(f"on {request.question}", delay=0.04)
    contents, judge = [f"question {i}" for i in range(40)], endpoint(server.url, concurrency=3)
    first = asks(judge, tmp_path, contents)
    deadline = time.monotonic() + 30
    while len(kept_in(tmp_path)) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    kept, asked = kept_in(tmp_path), server.asked
    assert 8 <= len(kept) < 40
    assert len(asked) - len(kept) <= 3, "what was under way is all that is lost"
    second = asks(judge, tmp_path, contents)
    found, details = json.loads(second.communicate(timeout=60)[0])
    assert found == told(*contents)
    assert (details["asked"], details["known"]) == (40 - len(kept), len(kept))
    assert all(server.asked[content] == 1 for content in contents if f"on {content}" in kept)
    assert sum(count - 1 for count in server.asked.values()) == len(asked) - len(kept)


# --- How it asks


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_questions_are_under_way_at_a_time_and_no_more(
    server: JudgeServer, tmp_path: Path, concurrency: int
) -> None:
    def behave(request: Request) -> Reply:
        return Reply(status=500) if request.attempt == 1 and "3" in request.question else Reply("yes", delay=0.02)

    server.behave = behave
    Answers(endpoint(server.url, concurrency=concurrency), tmp_path).ask(ask_of(*map(str, range(25))))
    assert server.most == concurrency


def test_more_than_a_hundred_questions_can_be_under_way_at_a_time(server: JudgeServer, tmp_path: Path) -> None:
    server.behave = lambda request: Reply("yes", delay=2.0)
    Answers(endpoint(server.url, concurrency=120), tmp_path).ask(ask_of(*map(str, range(120))))
    assert server.most == 120


def test_the_rate_is_kept_with_retries_too(server: JudgeServer, tmp_path: Path) -> None:
    server.behave = lambda request: Reply(status=500) if request.attempt == 1 else echo(request)
    judge = endpoint(server.url, requests_per_minute=600, concurrency=4)
    assert Answers(judge, tmp_path).ask(ask_of(*"abcde")) == told(*"abcde")
    times = [request.time for request in server.requests]
    assert len(times) == 10
    for i, start in enumerate(times):  # one each 0.1 s; some may be late
        assert sum(start <= later < start + 0.5 for later in times[i:]) <= 0.5 / 0.1 + 2
    assert times[-1] - times[0] >= 9 * 0.1 - 0.08


def test_the_body_is_what_the_settings_say(server: JudgeServer, tmp_path: Path) -> None:
    dialogue = [Message("system", "Be fair."), Message("user", 'Grüße {x} "\n')]
    Answers(endpoint(server.url + "/", model="m", temperature=0.5, max_tokens=7), tmp_path / "a").ask([dialogue])
    judge = endpoint(server.url, model="o", temperature=None, max_tokens=9, token_parameter="max_completion_tokens")
    Answers(judge, tmp_path / "b").ask([dialogue])
    messages = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": 'Grüße {x} "\n'}]
    first, second = server.requests
    assert first.body == {"model": "m", "messages": messages, "max_tokens": 7, "temperature": 0.5}
    assert second.body == {"model": "o", "messages": messages, "max_completion_tokens": 9}
    assert {first.path, second.path} == {"/v1/chat/completions"}
    assert "authorization" not in first.headers


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.behave = echo
    assert Answers(endpoint(server.url, retries=0), tmp_path).ask(ask_of("a")) == told("a")


# --- The key

ENOUGH = [{"prompt": f"Name {i}.", "reference_output": "x", "output": f"y {i}"} for i in range(3)]
REFERENCE = {"reference_generator": "text_davinci_003", "reference_dataset": "helpful_base"}


def files_with(text: str, folder: Path) -> list[Path]:
    """The files below a folder that hold a text, packed or not."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            content += gzip.decompress(content) if path.suffix == ".gz" else b""
            if text.encode() in content:
                found.append(path)
    return found


def judged_with_key(root: Path, run: Run) -> bool | None:
    """Have a job judge a run, its output in the run's log; whether it succeeded."""
    leave_texts(root, run, "alpaca_eval", [sample | REFERENCE for sample in ENOUGH])
    return Worker(root, "sweep", ("judge",)).work([run], logged=True)


def test_the_key_is_sent_and_kept_nowhere(
    server: JudgeServer,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    server.behave = lambda request: Reply(RANKED.format(1, 2))
    run = baseline(shared, server.url, "judge.api_key_env=JUDGE_KEY")
    assert judged_with_key(tmp_path, run)
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {SECRET}"] * 3
    assert files_with("JUDGE_KEY", tmp_path), "the search finds what is there"
    assert files_with(SECRET, tmp_path) == []
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(("status", "before"), [(401, 0), (500, 0), (200, 0), (401, 170)])
def test_a_key_that_the_server_repeats_is_kept_nowhere(
    server: JudgeServer,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    status: int,
    before: int,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    server.behave = lambda request: Reply(
        status=status, body=json.dumps({"error": f"{'.' * before} {request.headers['authorization']}"}).encode()
    )
    run = baseline(shared, server.url, "judge.api_key_env=JUDGE_KEY", "judge.retries=1")
    assert judged_with_key(tmp_path, run) is False
    failure = (RunDir(tmp_path, run.id).failure() or {})["reason"]
    assert "JudgeUnavailable" in failure
    assert "error" in failure
    part = SECRET[:10]  # also where a long message is cut off
    assert files_with(part, tmp_path) == []
    assert part not in "".join(capfd.readouterr())


def test_a_key_with_a_line_break_is_kept_nowhere(
    server: JudgeServer,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{SECRET}\n")  # as a file read into a variable has it
    server.behave = lambda request: Reply(RANKED.format(1, 2))
    run = baseline(shared, server.url, "judge.api_key_env=JUDGE_KEY", "judge.retries=1")
    judged_with_key(tmp_path, run)
    assert files_with(SECRET, tmp_path) == []
    assert SECRET not in "".join(capfd.readouterr())


# --- What a server may not do with us


@pytest.fixture
def elsewhere() -> Iterator[JudgeServer]:
    with JudgeServer(echo) as running:
        yield running


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_told_and_not_followed(
    server: JudgeServer, elsewhere: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    there = f"{elsewhere.url}/chat/completions?{SECRET}"
    server.behave = lambda request: Reply(status=status, headers={"Location": there})
    with pytest.raises(JudgeUnavailable, match=f"sends on to http://127.0.0.1:{elsewhere.port}, and is not") as caught:
        Answers(endpoint(server.url, api_key_env="JUDGE_KEY"), tmp_path).ask(ask_of("a"))
    assert elsewhere.requests == []
    assert len(server.requests) == 1, "not asked again"
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("location", ["http://[", "\x7f", "//", "javascript:alert(1)", "http://h:99999999/"])
def test_a_redirect_to_nowhere_is_told_too(server: JudgeServer, tmp_path: Path, location: str) -> None:
    server.behave = lambda request: Reply(status=302, headers={"Location": location})
    with pytest.raises(JudgeUnavailable, match=r"is not followed|InvalidURL|Invalid URL"):
        Answers(endpoint(server.url, retries=1), tmp_path).ask(ask_of("a"))


def test_a_reply_without_an_end_is_cut_off(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 2**20)
    server.behave = lambda request: Reply("x" * 2**22) if request.attempt <= 2 else echo(request)
    assert Answers(endpoint(server.url), tmp_path).ask(ask_of("a")) == told("a")
    server.behave = lambda request: Reply("x" * 2**22)
    with pytest.raises(JudgeUnavailable, match="more than 1 MiB"):
        Answers(endpoint(server.url, retries=0), tmp_path).ask(ask_of("b"))


def test_a_reply_that_unpacks_to_much_more_is_cut_off(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 2**20)
    packed = gzip.compress(bytes(2**25))
    server.behave = lambda request: Reply(body=packed, headers={"Content-Encoding": "gzip"})
    with pytest.raises(JudgeUnavailable, match="more than 1 MiB"):
        Answers(endpoint(server.url, retries=0), tmp_path).ask(ask_of("b"))


def test_a_reply_that_comes_drop_by_drop_ends_with_the_time_out(tmp_path: Path) -> None:
    """Each part comes in time, and there is no end to them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while True:
                    connection.sendall(b"1\r\n \r\n")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        started = time.monotonic()
        with pytest.raises(JudgeUnavailable, match=r"did not end within 0.5 s"):
            Answers(endpoint(f"http://127.0.0.1:{port}/v1", timeout=0.5, retries=0), tmp_path).ask(ask_of("a"))
        assert time.monotonic() - started < 10
        thread.join(10)


def test_a_key_in_an_answer_is_kept_nowhere_and_a_word_that_is_the_key_is_left(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behave = lambda request: Reply(f"{request.headers['authorization']} is EMPTY")
    judge = endpoint(server.url, api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    assert Answers(judge, tmp_path).ask(ask_of("a")) == ["Bearer *** is EMPTY"]
    assert files_with(SECRET, tmp_path) == []
    monkeypatch.setenv("JUDGE_KEY", "EMPTY")
    assert Answers(judge, tmp_path).ask(ask_of("b")) == ["Bearer EMPTY is EMPTY"]


@pytest.mark.parametrize("key", [None, SECRET])
def test_nothing_goes_unencrypted_to_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it was tried"))
    monkeypatch.setenv("JUDGE_KEY", key or "")
    judge = endpoint("http://192.0.2.1/v1", api_key_env="JUDGE_KEY" if key else None)
    with pytest.raises(JudgeUnavailable, match="unencrypted"):
        Answers(judge, tmp_path).ask(ask_of("a"))


def test_a_certificate_that_nobody_vouches_for_is_refused(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    certificate = tmp_path / "own.pem"
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    made = subprocess.run(
        ["openssl", *command.split(), "-keyout", certificate, "-out", certificate.with_suffix(".crt")],
        capture_output=True,
    )
    if made.returncode != 0:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.with_suffix(".crt"), certificate)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    judge = endpoint(f"https://localhost:{server.port}/v1", api_key_env="JUDGE_KEY", retries=0, timeout=5.0)
    with pytest.raises(JudgeUnavailable, match=r"(?i)certificate"):
        Answers(judge, tmp_path / "answers").ask(ask_of("a"))
    assert server.requests == []


def test_a_proxy_is_for_encrypted_addresses_of_other_machines_alone(
    server: JudgeServer, elsewhere: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, elsewhere.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.behave = echo
    assert Answers(endpoint(server.url), tmp_path).ask(ask_of("a")) == told("a")
    assert elsewhere.requests == []
    for url in (server.url, "http://192.0.2.1/v1"):
        with module._client(endpoint(url, plain_http=True)) as client:
            assert not client.trust_env
    with module._client(endpoint("https://192.0.2.1/v1")) as client:
        assert client.trust_env


# --- What it cost


def test_tokens_and_cost_add_up(server: JudgeServer, tmp_path: Path) -> None:
    def behave(request: Request) -> Reply:
        if request.attempt == 1:
            return Reply(status=500)
        usage = {"prompt_tokens": 1000 + int(request.question), "completion_tokens": 20}
        return Reply("yes", usage=usage if request.question != "4" else None)

    server.behave = behave
    judge = endpoint(server.url, price_per_million_input=30, price_per_million_output=60)
    answers = Answers(judge, tmp_path)
    answers.ask(ask_of("1", "2", "3", "4", "1"))
    answers.ask(ask_of("3", "5"))
    used = (1000 * 4 + 1 + 2 + 3 + 5, 20 * 4)
    cost = pytest.approx((used[0] * 30 + used[1] * 60) / 1e6, abs=1e-6)
    counts = {"asked": 5, "known": 1, "input_tokens": used[0], "output_tokens": used[1]}
    assert answers.details() == counts | {"cost": cost}
    assert answers.details() == dict.fromkeys(counts, 0) | {"cost": 0}, "counted anew"
    free = Answers(endpoint(server.url), tmp_path)
    free.ask(ask_of("1", "2"))
    assert free.details() == {"asked": 0, "known": 2, "input_tokens": 0, "output_tokens": 0}
