"""A worker starts without torch's compiler; what is to be compiled is, when it is called."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from peft_align.models.late_compile import compiled_when_called


@pytest.mark.parametrize("as_decorator", [False, True])
def test_a_function_is_compiled_once_by_its_first_call_with_its_settings(
    as_decorator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, dict[str, Any]]] = []

    def compile_now(function: Any, **settings: Any) -> Any:
        made.append((function, settings))
        return lambda x: function(x) + 1

    def double(x: int) -> int:
        """Twice as much."""
        return 2 * x

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_when_called():
        found = torch.compile(dynamic=False)(double) if as_decorator else torch.compile(double, dynamic=False)
    assert torch.compile is compile_now
    assert made == []
    assert found.__doc__ == "Twice as much."
    assert [found(3), found(4)] == [7, 9]
    assert made == [(double, {"dynamic": False})]


def test_what_the_compiler_raises_is_raised_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **settings: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with compiled_when_called():
        found = torch.compile(len)
    with pytest.raises(RuntimeError, match="no compiler here"):
        found("ab")


@pytest.mark.slow
def test_what_a_worker_imports_to_train_loads_no_compiler() -> None:
    ask = (
        "import sys; from peft_align.models import loading; from peft_align.training import run; import bitsandbytes\n"
    )
    ask += "print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr[-2000:]
