"""Pieces of work that go in turns: each in a thread of its own, one of which goes at a time.

So a loop that belongs to somebody else (transformers' Trainer) can stop in its middle and let others come there too.
Nothing races: who hands over waits until it is told to go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Turn(threading.Thread):
    """A piece of work.

    Args:
        work: what is done, from the first `go_on` to the end.
        around: what is entered for each of its turns.

    Attributes:
        over: whether it has come to its end.
        result, error: with what.
        handed: what it gave when it last handed over.
    """

    def __init__(
        self, work: Callable[[], Any], around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        super().__init__(daemon=True)  # who is told to end at once does not wait for it
        self.work, self.around = work, around
        self.over = self.busy = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.handed: Any = None
        self._told: Any = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)

    def go_on(self, told: Any = None) -> None:
        """Let it go on until it hands over or ends; called by whoever leads.

        Args:
            told: what `hand_over` returns to it, or raises, if it is an exception.
        """
        self._told, self.busy = told, True
        with self.around():
            if not self.ident:
                self.start()
            self._mine.release()
            self._theirs.acquire()
        self.busy = False

    @property
    def waits(self) -> bool:
        """Whether it has handed over, and not been told yet what to go on with."""
        return self.ident is not None and not (self.busy or self.over)

    def hand_over(self, what: Any) -> Any:
        """Give something to whoever leads, and wait for the answer; called by the work itself."""
        self.handed = what
        self._theirs.release()
        self._mine.acquire()
        if isinstance(self._told, BaseException):
            raise self._told
        return self._told

    def run(self) -> None:
        self._mine.acquire()
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        self.over = True
        self._theirs.release()
