"""Verbs as people give them: as programs of their own, or in this process, which has imported what takes long."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from sweeping import shipped

from peft_align.config.compose import ConfigSpace


def space(dirs: Sequence[Path] = (), hydra: Sequence[str] = ()) -> ConfigSpace:
    """The options that a command line has; the shipped ones are composed once for all tests of a process."""
    return ConfigSpace(dirs, hydra) if dirs or hydra else shipped()


def program(words: Sequence[str], folder: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `python -m peft_align.VERB ...` in a folder."""
    command = [sys.executable, "-m", f"peft_align.{words[0]}", *words[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


def in_this_process(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which is left as it was: code, output and errors as of the program."""
    out, err = io.StringIO(), io.StringIO()
    name, *rest = words
    with (
        as_it_was(),
        contextlib.chdir(folder),
        patch.object(sys, "argv", [name, *rest]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = importlib.import_module(f"peft_align.{name}").main()
    return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """What a program may change of its process is changed back."""
    handler, hook, umask = signal.getsignal(signal.SIGTERM), sys.excepthook, os.umask(0o022)
    os.umask(umask)
    try:
        with patch.dict(os.environ):
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.excepthook = hook
        os.umask(umask)
