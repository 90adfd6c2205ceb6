"""Imports bitsandbytes without torch's compiler, which no run on a CPU or a CUDA device needs for it.

At its import, bitsandbytes (0.50, backends/default/ops.py) gives torch.compile functions that its backends for CPU and
CUDA replace. That alone loads torch._inductor, a quarter of the time that a worker takes to start. Here they are
compiled when they are called first. To be imported before `peft`, which imports bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While it lasts, torch.compile returns at once: what it is given is compiled by the first call.

    What the compiler raises is raised by that call.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
        if function is None:
            return partial(compile_later, **settings)

        @cache
        def compiled() -> Callable[..., Any]:
            return compile_now(function, **settings)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


with compiled_when_called():
    import bitsandbytes  # noqa: F401
