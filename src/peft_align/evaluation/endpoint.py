"""Asks an OpenAI-compatible API: many questions at a time, within a rate, again after what passes.

The key goes to the host of `judge.base_url` alone, over TLS that is verified, or not off this machine; it is never
followed elsewhere, and never written down, not even where the API says it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from peft_align.config.judges import Endpoint, is_this_machine, sent_in_the_clear
from peft_align.data.pairs import Message
from peft_align.evaluation.judges import JudgeUnavailable, Keep
from peft_align.secrecy import HIDDEN, SHORTEST, redacted

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}  # HTTP statuses that another try may not meet
REFUSED = {400, 413, 422}  # about this question: too long, or against the provider's rules
SILENT_TRIES = 2  # times that a question answered without a text is asked again
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds, doubled after each failure
LARGEST = 16 * 2**20  # bytes of a reply, unpacked


class Endless(Exception):
    """A reply that does not come to an end: too long, or for too long."""


class QuestionRefused(Exception):
    """The API does not take this question: too long, or against its rules."""


def ask_endpoint(judge: Endpoint, questions: list[list[Message]], keep: Keep, *, has_answered: bool) -> None:
    """Ask every question; `keep` is called in this thread with each answer as it comes, None for a refused question.

    Args:
        judge: its settings.
        questions: dialogues that end with the user's turn.
        keep: takes the number of the question, the answer and the tokens used.
        has_answered: whether this judge has ever given an answer. If it has not and refuses all questions, it is not
            the questions that are wrong.

    Raises:
        JudgeUnavailable: the API refuses the key, the model or every question, or a question failed more often than
            `retries`. Answers under way are waited for and kept.
    """
    refused: dict[int, QuestionRefused] = {}
    pace = Pace(judge.requests_per_minute)
    stop = threading.Event()
    failure: Exception | None = None
    with (
        _client(judge) as client,
        ThreadPoolExecutor(judge.concurrency) as pool,
    ):
        left = iter(enumerate(questions))
        running: dict[Future[tuple[str, dict[str, int]]], int] = {}
        try:
            while True:
                while failure is None and len(running) < judge.concurrency and (one := next(left, None)) is not None:
                    running[pool.submit(_ask, client, judge, one[1], pace, stop)] = one[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    try:
                        keep(i, *future.result())
                        has_answered = True
                    except QuestionRefused as error:
                        refused[i] = error
                    except JudgeUnavailable as error:
                        failure = failure or error
                        stop.set()
        finally:
            stop.set()
    if failure is None and refused and not has_answered:
        failure = JudgeUnavailable(f"it refuses every question: {next(iter(refused.values()))}")
    if failure is not None:
        raise failure
    for i in refused:
        keep(i, None, {})


def _ask(
    client: httpx.Client, judge: Endpoint, question: list[Message], pace: Pace, stop: threading.Event
) -> tuple[str, dict[str, int]]:
    """One question, with its retries: the answer and the tokens used. Raises QuestionRefused, JudgeUnavailable."""
    body: dict[str, Any] = {
        "model": judge.model,
        "messages": [{"role": message.role, "content": message.content} for message in question],
        judge.token_parameter: judge.max_tokens,
    }
    if judge.temperature is not None:
        body["temperature"] = judge.temperature
    url = f"{judge.base_url.rstrip('/')}/chat/completions"
    problem, asked, silent = "stopped", 0, 0
    status: int | None = None
    while asked <= judge.retries:
        if asked and stop.wait(pace.pause(asked)):
            break
        pace.wait(stop)
        if stop.is_set():
            break
        asked += 1
        try:
            response = _post(client, url, body, judge.timeout)
        except (httpx.HTTPError, httpx.InvalidURL, Endless) as error:  # no connection, cut connection, time-out
            problem, status = _told(f"{type(error).__name__}: {error}", judge), None
            continue
        status = response.status_code
        problem = _told(f"HTTP {status}: {response.text}", judge)
        if status == 200:
            text, is_silent = _text(response)
            if text is not None:
                is_word = len(_key(judge) or "") < SHORTEST  # EMPTY, as servers of one's own are given
                return text if is_word else _without_key(text, judge), _usage(response)
            problem = _told(f"what it answers is no chat completion: {response.text or 'nothing'}", judge)
            silent += is_silent
            if silent > SILENT_TRIES:
                raise QuestionRefused("it answers with no text, as filters do")
            continue
        if status in REFUSED:
            raise QuestionRefused(problem)
        if response.has_redirect_location:
            raise JudgeUnavailable(f"{url} sends on to {_place(response)}, and is not followed: set judge.base_url")
        if status not in PASSING:
            raise JudgeUnavailable(f"{url}: {problem} ({_remedy(status, judge)})")
        pace.told(response.headers.get("retry-after"))
    times = "once" if asked == 1 else f"{asked} times"
    raise JudgeUnavailable(f"{url}: {problem} (asked {times}; {_remedy(status, judge)})")


def _remedy(status: int | None, judge: Endpoint) -> str:
    """What to do about an API that gives no answers; `status`: its last, None if it could not be reached."""
    if status in (401, 403):
        return f"check the key in ${judge.api_key_env}" if judge.api_key_env else "name its variable: judge.api_key_env"
    if status == 429:
        return "ask it less: judge.requests_per_minute or judge.concurrency; answers so far are kept"
    if status in (None, 200, 404, 405):
        return f"check judge.base_url={judge.base_url} and judge.model={judge.model}"
    return "the same command asks again what has no answer"


def _post(client: httpx.Client, url: str, body: dict[str, Any], seconds: float) -> httpx.Response:
    """The whole reply. Raises httpx.HTTPError; Endless for one above LARGEST, or that takes longer in coming."""
    deadline, content = time.monotonic() + seconds, bytearray()
    with client.stream("POST", url, json=body) as response:
        for part in response.iter_bytes():
            content += part
            if len(content) > LARGEST:
                raise Endless(f"its reply has more than {LARGEST // 2**20} MiB")
            if time.monotonic() > deadline:
                raise Endless(f"its reply did not end within {seconds:g} s")
        headers = {name: text for name, text in response.headers.items() if name in ("location", "retry-after")}
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)


def _place(response: httpx.Response) -> str:
    """Where a reply sends on to: the scheme and the host of it alone, as the rest may hold anything."""
    try:
        there = response.url.join(response.headers["location"])
        return f"{there.scheme}://{there.netloc.decode('ascii')}"
    except (httpx.InvalidURL, ValueError):
        return "no address"


def _text(response: httpx.Response) -> tuple[str | None, bool]:
    """The text of a chat completion, or None, and whether it is one that has no text."""
    try:
        message = response.json()["choices"][0]["message"]
        text = message["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None, False
    return (text, False) if isinstance(text, str) else (None, text is None)


def _usage(response: httpx.Response) -> dict[str, int]:
    """The tokens used, as far as the API tells them."""
    usage = response.json().get("usage")
    if not isinstance(usage, dict):
        return {}
    names = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
    return {own: usage[theirs] for own, theirs in names.items() if type(usage.get(theirs)) is int}


def _told(problem: str, judge: Endpoint) -> str:
    """A problem in one line for people, without the key: some APIs quote what they refuse."""
    return " ".join(redacted(_without_key(problem, judge)).split())[:200]


def _without_key(text: str, judge: Endpoint) -> str:
    key = _key(judge)
    return text.replace(key, HIDDEN) if key else text


def _client(judge: Endpoint) -> httpx.Client:
    """A client with a connection for each question under way.

    A proxy of the environment is taken for https:// alone, of which it sees the host and nothing else.

    Raises:
        JudgeUnavailable: the key is none, or would be sent unencrypted.
    """
    key = _key(judge)
    if told := sent_in_the_clear(judge):
        raise JudgeUnavailable(f"{judge.base_url}: {told}")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise JudgeUnavailable(f"the key in ${judge.api_key_env} has characters that no header can carry")
    proxied = judge.base_url.startswith("https://") and not is_this_machine(judge.base_url)
    limits = httpx.Limits(max_connections=judge.concurrency, max_keepalive_connections=judge.concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(timeout=judge.timeout, headers=headers, limits=limits, trust_env=proxied)


def _key(judge: Endpoint) -> str | None:
    return (os.environ.get(judge.api_key_env) or "").strip() or None if judge.api_key_env else None


class Pace:
    """Keeps all threads within the rate, and has them wait together when the API says so."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Wait for this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.interval
        stop.wait(turn - now)

    def told(self, retry_after: str | None) -> None:
        """The API asks to come back after so many seconds."""
        try:
            seconds = min(float(retry_after or 0), LONGEST_PAUSE)
        except ValueError:  # a date
            seconds = 0.0
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def pause(self, attempt: int) -> float:
        """Seconds before another try: doubled each time, spread out so that the threads do not come back as one."""
        return float(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)) * random.uniform(0.5, 1.0)
