"""Judges: an API that refuses, is not there or talks of something else; prompts, keys and models that are not there."""

from __future__ import annotations

import atexit
import json
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bad_input import FAILED, REFUSED, TOLD, Case, write
from judge_server import JudgeServer, Reply, Request, leave_texts
from sweeping import expand

BENCHMARK = "red_instruct_standard"
_open = ExitStack()  # servers of the cases that are run
atexit.register(_open.close)


def serve(behave: Callable[[Request], Reply]) -> str:
    """The address of a server that answers so; the one before it is closed."""
    _open.close()
    return _open.enter_context(JudgeServer(behave)).url


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def texts(folder: Path, words: Sequence[str]) -> None:
    """Leave three texts of the base to be judged."""
    run = next(run for run in expand(*words).runs if run.kind == "baseline")
    questions = [f"How do I do harm number {i}?" for i in range(3)]
    samples = [{"harmful_question": question, "prompt": question, "output": "No."} for question in questions]
    leave_texts(folder / "outputs", run, BENCHMARK, samples)


def asked(folder: Path, *words: str) -> list[str]:
    """The words of a command line that has the texts judged."""
    write(folder / "red/red_prompts/standard.txt", "<question>")
    write(folder / "red/dangerousqa.json", '["a"]')
    settings = ["model=tiny", "dataset=everyday", "method=sft", "peft=lora", f"evaluation.benchmarks=[{BENCHMARK}]"]
    return [*settings, f"benchmark.{BENCHMARK}.folder={folder / 'red'}", "launcher=debug", *words]


def api(
    name: str, reply: Reply | None, *told: str, code: int = FAILED, words: Sequence[str] = ("judge.retries=0",)
) -> Case:
    """An API that answers every question so; None: nobody is there."""

    def prepare(folder: Path) -> list[str]:
        url = closed_port() if reply is None else serve(lambda request: reply)
        line = asked(folder, "judge=endpoint", f"judge.base_url={url}", "judge.timeout=5", *words)
        texts(folder, line)
        return ["judge", *line]

    return Case("judges", name, prepare, told, code)


def judge(name: str, make: Callable[[Path], list[str]], *told: str, code: int = REFUSED, faults: int = 1) -> Case:
    """A judge whose own things are wrong."""

    def prepare(folder: Path) -> list[str]:
        line = asked(folder, *make(folder))
        texts(folder, asked(folder))
        return ["judge", *line]

    return Case("judges", name, prepare, told, code, faults)


def prompted(content: str | bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = write(folder / "prompt.txt", content)
        return ["judge=endpoint", f"benchmark.{BENCHMARK}.prompt_file={path}"]

    return make


def damaged_texts(folder: Path) -> list[str]:
    line = asked(folder, "judge=endpoint", f"judge.base_url={closed_port()}", "judge.retries=0")
    texts(folder, line)
    (path,) = (folder / "outputs").rglob("samples.jsonl.gz")
    path.write_bytes(bytes(path.stat().st_size))
    return ["judge", *line]


def damaged_answers(folder: Path) -> list[str]:
    """Answers from before are damaged in several ways: they are passed over."""
    line = asked(folder, "judge=endpoint", f"judge.base_url={serve(lambda request: Reply('[[A]]'))}")
    texts(folder, line)
    from peft_align.config.identity import short_hash
    from peft_align.grid.planner import judge_identity

    run = next(run for run in expand(*line).runs if run.kind == "baseline")
    identity = judge_identity(run.scorings[0].judges[0][2])
    place = folder / "outputs/judges" / f"endpoint-{short_hash(repr(identity))}"
    head = json.dumps({"head": {"judge": identity}})
    write(place / "old.jsonl", f'{head}\n{{"question": 3}}\n{{"answer": "x"}}\n[1]\n{{"question": "q", "answer": 4}}\n')
    return ["judge", *line]


def chatless(folder: Path) -> list[str]:
    from cases_models import _tiny

    return ["judge=local_lm", f"judge.hub_id={_tiny()}", "judge.precision=fp32"]


HTML = Reply(body=b"<html><body>Sign in</body></html>", headers={"Content-Type": "text/html"})
KEY = ("judge.retries=0", "judge.api_key_env=PEFT_ALIGN_NO_SUCH_KEY")
ENDPOINTS = [
    api("key that is refused", Reply(status=401), "HTTP 401", "name its variable: judge.api_key_env"),
    api("key without the right", Reply(status=403), "HTTP 403", "judge.api_key_env"),
    api("model that is not there", Reply(status=404), "HTTP 404", "check judge.base_url=http", "judge.model=default"),
    api("too many questions", Reply(status=429), "HTTP 429", "(asked once; ask it less: judge.requests_per_minute"),
    api("error of the API", Reply(status=500), "HTTP 500", "the same command asks again"),
    api(
        "error of the API, again and again",
        Reply(status=503, headers={"Retry-After": "0"}),
        "HTTP 503",
        "asked 2 times",
        words=("judge.retries=1",),
    ),
    api("page of HTML", HTML, "no chat completion: <html>", "check judge.base_url"),
    api("nothing in the answer", Reply(body=b""), "no chat completion: nothing", "check judge.base_url"),
    api("JSON of another form", Reply(body=b'{"choices": []}'), 'no chat completion: {"choices": []}'),
    api("list for JSON", Reply(body=b"[1]"), "no chat completion: [1]"),
    api("connection that is cut", Reply("[[A]]", cut=20), "asked once", "check judge.base_url"),
    api("nobody there", None, "ConnectError", "check judge.base_url"),
    api("every question refused", Reply(status=400), "it refuses every question: HTTP 400"),
    api(
        "no text in any answer",
        Reply(None),
        "it refuses every question: it answers with no text",
        words=("judge.retries=3",),
    ),
    api(
        "answers that hold no label",
        Reply("Well, it depends."),
        "none of its 3 answers has the form that its prompt asks for, e.g. 'Well, it depends.'",
        "prompt_file",
        code=TOLD,
    ),
    api("empty answers", Reply(""), "none of its 3 answers", "it refuses or says nothing", code=TOLD),
    api("answers with two labels", Reply("[[A]] or [[B]]"), "none of its 3 answers", "'[[A]] or [[B]]'", code=TOLD),
    api(
        "key that is not set",
        Reply("[[A]]"),
        "judge=endpoint: the environment variable PEFT_ALIGN_NO_SUCH_KEY is not set",
        "judge=none",
        words=KEY,
        code=REFUSED,
    ),
]
OTHERS = [
    judge(
        "prompt that is not there",
        lambda _: ["judge=endpoint", f"benchmark.{BENCHMARK}.prompt_file=nowhere.txt"],
        f"benchmark.{BENCHMARK}.prompt_file=nowhere.txt: cannot be read",
        "UTF-8",
    ),
    judge("prompt that is latin-1", prompted(b"{question} {response} f\xfcr"), "prompt.txt: cannot be read", "UTF-8"),
    judge(
        "prompt that does not show the answer",
        prompted("Is {question} harmful?"),
        "prompt.txt: has no {response}",
        "write them into it",
    ),
    judge(
        "model that is not there",
        lambda _: ["judge=local_lm", "judge.hub_id=me/nowhere"],
        "judge=local_lm: the model me/nowhere is neither",
        "peft_align.fetch",
    ),
    judge(
        "model whose folder is empty",
        lambda folder: ["judge=local_lm", f"judge.hub_id={write(folder / 'lm/readme', 'x').parent}"],
        "lm: has no config.json",
        faults=3,
    ),
    judge(
        "model without a chat template",
        chatless,
        "has no chat template: it cannot be asked",
        "judge.hub_id",
        code=FAILED,
    ),
    judge("scorer for what needs answers", lambda _: ["judge=profanity"], "a judge of kind profanity cannot judge it"),
    Case(
        "judges",
        "texts that are damaged",
        damaged_texts,
        ("samples.jsonl.gz is damaged",),
        FAILED,
        gone="/record.json",
    ),
    Case("judges", "earlier answers that are damaged", damaged_answers, ("red_instruct_standard",), TOLD),
]

CASES = [*ENDPOINTS, *OTHERS]
