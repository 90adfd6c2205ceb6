"""Asks an OpenAI-compatible API: many questions at a time, within a rate, again after what passes."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from peft_align.config.judges import Endpoint
from peft_align.data.pairs import Message
from peft_align.evaluation.judges import JudgeUnavailable, Keep

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}  # HTTP statuses that another try may not meet
REFUSED = {400, 413, 422}  # about this question: too long, or against the provider's rules
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds, doubled after each failure


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
        httpx.Client(timeout=judge.timeout, headers=_headers(judge), trust_env=True) as client,
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
    problem = ""
    for attempt in range(judge.retries + 1):
        if attempt and stop.wait(pace.pause(attempt)):
            break
        pace.wait(stop)
        if stop.is_set():
            break
        try:
            response = client.post(url, json=body)
        except httpx.HTTPError as error:  # no connection, cut connection, time-out
            problem = f"{type(error).__name__}: {error}"
            continue
        status = response.status_code
        if status == 200:
            try:
                return _answer(response)
            except (ValueError, KeyError, IndexError, TypeError):
                problem = f"an answer that is none: {_excerpt(response)}"
                continue
        problem = f"HTTP {status}: {_excerpt(response)}"
        problem = problem.replace(_key(judge) or "\0", "***")  # some APIs quote the key that they refuse
        if status in REFUSED:
            raise QuestionRefused(problem)
        if status not in PASSING:
            raise JudgeUnavailable(f"{url}: {problem}")
        pace.told(response.headers.get("retry-after"))
    raise JudgeUnavailable(f"{url}: {problem or 'stopped'} (asked {judge.retries + 1} times)")


def _answer(response: httpx.Response) -> tuple[str, dict[str, int]]:
    """The text of a chat completion and its tokens. Raises what an answer of another form raises."""
    content = response.json()
    text = content["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(text)
    usage = content.get("usage") or {}
    names = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
    return text, {own: int(usage[theirs]) for own, theirs in names.items() if usage.get(theirs) is not None}


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:200]


def _headers(judge: Endpoint) -> dict[str, str]:
    key = _key(judge)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _key(judge: Endpoint) -> str | None:
    return os.environ.get(judge.api_key_env) if judge.api_key_env else None


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
