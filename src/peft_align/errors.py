"""Faults of the input: collected, shown together, exit code 2."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_align.terminal import one_line, shown


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the input: where it stands, what is wrong, and what would be right."""

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.remedy})" if self.remedy else "")


class InputError(Exception):
    """Raised when the input cannot be used; carries every fault found, without repetition."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = list(dict.fromkeys(faults))
        super().__init__("; ".join(map(str, self.faults)))

    def render(self) -> str:
        """The message for people: a count and one line a fault."""
        head = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        told = (f"  - {one_line(shown(str(fault)))}" for fault in self.faults)
        return "\n".join([f"peft_align: {head} in the input; nothing was started.", *told])


class WorkError(RuntimeError):
    """Work that failed for a reason that its message says in full: people are told it without a traceback."""


SHOWN = 20  # of what is allowed


# What a disk says when it takes nothing more, and what that means to people.
DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk does not answer as it should",
}


def disk_fault(error: OSError) -> str | None:
    """One line about an error that is the disk's and not the program's; None if it is another."""
    if error.errno not in DISK_FAULTS:
        return None
    return f"{DISK_FAULTS[error.errno]}: {error.filename or 'while writing'}: {error.strerror}"


def suggest(word: str, allowed: Iterable[str]) -> str:
    """'did you mean X?' for a near miss, otherwise the list of what is allowed."""
    options = list(dict.fromkeys(allowed))
    group, _, last = word.rpartition(".")
    # A key may have been given in the wrong group, or without one: 'beta' for 'method.beta'.
    tails = sorted((o for o in options if o.rpartition(".")[2] == last), key=lambda o: (o.count("."), len(o)))
    own = [option for option in options if group and option.rpartition(".")[0] == group]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if own and (close := difflib.get_close_matches(last, [o.rpartition(".")[2] for o in own], n=1, cutoff=0.6)):
        return f"did you mean '{group}.{close[0]}'?"
    if tails and (own or not near):
        return f"did you mean '{tails[0]}'?"
    if own:
        return allowed_are(own)
    return f"did you mean '{near[0]}'?" if near else allowed_are(options)


def allowed_are(options: Sequence[str]) -> str:
    """The list of what is allowed, the first of it where it is long."""
    shown = ", ".join(options[:SHOWN]) + (", ..." if len(options) > SHOWN else "")
    return f"allowed: {shown}" if options else "nothing is allowed here"
