"""A judge behind HTTP for tests: a real server on this machine that answers as it is told, and keeps what it was asked.

It also has what the tests of judging share: texts of an evaluation on disk, written as the evaluation stage does.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from peft_align.config.judges import Endpoint
from peft_align.data.pairs import Message
from peft_align.grid.planner import Planner
from peft_align.grid.runs import Run
from peft_align.store.runs import FORMAT, RunDir

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


@dataclass(frozen=True)
class Request:
    """What the server was asked.

    Attributes:
        path: of the URL.
        headers: with names in lower case.
        body: the JSON.
        time: when it came, in seconds.
        attempt: how often this question has been asked, this time included.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float
    attempt: int

    @property
    def question(self) -> str:
        """The content of the last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass(frozen=True)
class Reply:
    """What the server does with a request.

    Attributes:
        text: the judge's answer; None is the JSON's null.
        status: of HTTP.
        headers: further ones: retry-after.
        delay: seconds before it replies.
        body: sent instead of a chat completion.
        cut: bytes of the whole reply after which the connection is reset; None: it is sent whole.
        usage: tokens told.
    """

    text: str | None = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    body: bytes | None = None
    cut: int | None = None
    usage: Mapping[str, int] | None = field(default_factory=lambda: dict(USAGE))

    def content(self) -> bytes:
        """The body of the reply."""
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": f"the server says {self.status}"}}).encode()
        message = {"role": "assistant", "content": self.text}
        told = {"choices": [{"index": 0, "message": message}]} | ({"usage": self.usage} if self.usage else {})
        return json.dumps(told).encode()


Behave = Callable[[Request], Reply]


class JudgeServer:
    """Serves while it is entered. `behave` may be another one at any time.

    Attributes:
        requests: every request, in the order in which they came.
        answered: how often each question was given a whole reply with status 200.
        most: the largest number of requests that were under way at a time.
    """

    def __init__(self, behave: Behave = lambda request: Reply("yes"), port: int = 0) -> None:
        self.behave = behave
        self.requests: list[Request] = []
        self.answered: Counter[str] = Counter()
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self.port = int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """What judge.base_url is set to."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> Counter[str]:
        """How often each question was asked."""
        return Counter(request.question for request in list(self.requests))

    def forget(self) -> None:
        """Forget all requests."""
        with self._lock:
            self.requests, self.answered, self.most = [], Counter(), 0

    def __enter__(self) -> JudgeServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        """Note a request and say what is to be done with it, after its delay."""
        with self._lock:
            question = str(body["messages"][-1]["content"])
            attempt = 1 + sum(request.question == question for request in self.requests)
            request = Request(path, headers, body, time.monotonic(), attempt)
            self.requests.append(request)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            reply = self.behave(request)
            time.sleep(reply.delay)
        finally:
            with self._lock:  # before the reply is sent: who has it may ask again at once
                self._now -= 1
        return reply

    def note_answer(self, question: str) -> None:
        """Note that a whole answer was sent."""
        with self._lock:
            self.answered[question] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of the tests."""


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = judge.take(self.path, {name.lower(): text for name, text in self.headers.items()}, body)
            content = reply.content()
            head = [f"HTTP/1.1 {reply.status} Said", f"Content-Length: {len(content)}"]
            head += [f"{name}: {text}" for name, text in {"Content-Type": "application/json", **reply.headers}.items()]
            whole = ("\r\n".join(head) + "\r\n\r\n").encode() + content
            try:
                if reply.cut is not None:
                    self.connection.sendall(whole[: reply.cut])
                    time.sleep(0.01)
                    # closed with a reset rather than an end: as when a machine or a proxy goes down
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                if reply.status == 200:
                    judge.note_answer(str(body["messages"][-1]["content"]))
                self.connection.sendall(whole)
            except OSError:  # the one who asked is gone
                self.close_connection = True

    return Handler


def endpoint(url: str, **settings: Any) -> Endpoint:
    """The settings of a judge at `url`."""
    plain: dict[str, Any] = {
        "kind": "openai",
        "model": "default",
        "version": None,
        "temperature": 0,
        "max_tokens": 64,
        "token_parameter": "max_tokens",
        "base_url": url,
        "api_key_env": None,
        "concurrency": 4,
        "requests_per_minute": None,
        "timeout": 10.0,
        "retries": 4,
        "price_per_million_input": None,
        "price_per_million_output": None,
    }
    return Endpoint(**{**plain, **settings})


def ask_of(*contents: str) -> list[list[Message]]:
    """A dialogue of one turn for each text."""
    return [[Message("user", content)] for content in contents]


def leave_texts(root: Path, run: Run, benchmark: str, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Leave the texts of a baseline's benchmark on disk as its evaluation does; returns their folder.

    What a test's samples lack of what every sample has is filled in.
    """
    from peft_align.evaluation.generated import GENERATED
    from peft_align.evaluation.records import save

    requests = Planner(root, run.config.hub.mirror).item(run).requests
    request = next(request for request in requests if request.benchmark == benchmark)
    whole = [
        {"question": str(i), "prompt": "", "output": "", "id": str(i), "raw": "", "tokens": 3, "ended": "end", **sample}
        for i, sample in enumerate(samples)
    ]
    scores = GENERATED[request.config.kind].scores(request.config, whole, run.id)
    folder = RunDir(root, run.id).evaluation(request.name)
    content = {
        "format": FORMAT,
        "run": run.id,
        "stage": "evaluate",
        "step": request.step,
        "benchmark": benchmark,
        "base": run.base,
        "dataset": None,
        "preference": None,
        "key": request.key,
        "inputs": {},
    }
    save(folder, scores, content)
    return folder


def samples_in(folder: Path) -> list[dict[str, Any]]:
    """The samples in the folder of an evaluation or a judging."""
    with gzip.open(folder / "samples.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
