"""What the cases of bad input share: what a case is, how it is run as a user does, and what is looked at after it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from peft_align.config.compose import ConfigSpace

REFUSED, FAILED, TOLD = 2, 1, 0  # the exit codes of input, of work that failed, and of what goes on and says so
Prepare = Callable[[Path], list[str]]
# What work that failed may leave behind beside its products: why it failed, what it was, what it had found out before.
NOTES = re.compile(
    r"(.*/)?(runs/[^/]+/(run|failed|progress)\.json|runs/[^/]+/(history\.jsonl|lock|train\.log)|runs/[^/]+/attempt/.*"
    r"|.*\.damaged\.json"
    r"|(sweeps|tokenized|reference|judges)/.*)"
)


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        area: where it stands: the file of its table.
        name: what is wrong.
        prepare: makes it in an empty folder, from which the program is started, and returns the words of the command
            line, the verb first.
        told: what the message must say.
        code: the exit code.
        faults: how many faults are told, of input that is refused.
            0: it is not input that is wrong but a place where it lies, and that is one line of its own.
        unsaid: what it must not say.
        around: what holds while the program runs.
        gone: the end of the name of a record that is deleted, for what it speaks of is to be made again.
    """

    area: str
    name: str
    prepare: Prepare
    told: tuple[str, ...]
    code: int = REFUSED
    faults: int = 1
    unsaid: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    gone: str = ""

    def __str__(self) -> str:
        return f"{self.area}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What a user sees."""

    words: list[str]
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}{self.err}"


def run(case: Case, folder: Path) -> Outcome:
    """Prepare a case in an empty folder and run its verb there in this process, as `python -m peft_align.VERB` does."""
    with inside(folder):
        words = case.prepare(folder)
    with case.around():
        return run_words(words, folder)


def run_words(words: list[str], folder: Path) -> Outcome:
    """Run a command line, the verb first, in a folder."""
    out, err = io.StringIO(), io.StringIO()
    verb, *rest = words
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            inside(folder),
            patch.object(sys, "argv", [verb, *rest]),
            patch.dict(os.environ, COLUMNS="400"),  # nothing is cut or wrapped
            patch("peft_align.cli.ConfigSpace", space),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = importlib.import_module(f"peft_align.{verb}").main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Outcome(words, code, out.getvalue(), err.getvalue())


@functools.cache
def _shipped() -> ConfigSpace:
    return ConfigSpace()


def space(dirs: tuple[Path, ...], hydra: tuple[str, ...]) -> ConfigSpace:
    """The options; the shipped ones are composed once for all cases."""
    return ConfigSpace(dirs, hydra) if dirs or hydra else _shipped()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In that folder, and back again."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root reads and writes whatever a file's mode says


@contextlib.contextmanager
def as_plain_user() -> Iterator[None]:
    """While it lasts, modes of files hold for root too: without what lets it pass them over."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()
    if libc.capget(header, before):
        raise OSError(ctypes.get_errno(), "capget")
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~OVERRIDES
    if libc.capset(header, less):
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        libc.capset(header, before)


def contents(folder: Path) -> dict[str, str]:
    """Each file below a folder with the digest of its content; links and folders by what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[name] = "folder"
    return found


def products(files: dict[str, str]) -> dict[str, str]:
    """The files among them that are results, or what results are made of."""
    kept = {name: content for name, content in files.items() if content != "folder" and "/lease/" not in name}
    return {name: content for name, content in kept.items() if not NOTES.fullmatch(name)}


def line(name: str, *words: str, told: tuple[str, ...], area: str = "command line", **more: int) -> Case:
    """A case that is nothing but a command line, the verb first."""
    return Case(area, name, lambda folder: list(words), told, **more)


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
