"""What people are shown: texts of models, data and other machines, with nothing in them that a terminal obeys."""

from __future__ import annotations

import functools
import re
import sys
import traceback
import unicodedata
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from peft_align.secrecy import redacted

if TYPE_CHECKING:
    from rich.console import Console

# What may have to be written out; joiners are part of words and of emoji.
DOUBTFUL = re.compile("[^ -~\n\t\u200c\u200d]")
# Controls (ESC, CR, C1), formats (right-to-left overrides, invisible marks), half characters, breaks of lines.
OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def plain(text: str) -> str:
    """The text with every character that a terminal would obey, or that hides what is there, written out: \\x1b."""
    return DOUBTFUL.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    obeyed = unicodedata.category(found[0]) in OBEYED
    return found[0].encode("unicode_escape").decode("ascii") if obeyed else found[0]


def one_line(text: str) -> str:
    """`plain`, with line breaks written out too: what stands in a line or a cell of its own begins no other."""
    return plain(text).replace("\n", "\\n")


def shown(text: str) -> str:
    """The text as people may see it: without secrets, and plain."""
    return plain(redacted(text))


shown_once = functools.lru_cache(maxsize=2**16)(shown)  # names that thousands of rows share


def say(text: object = "", *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text as it may be shown; with half a character it would raise otherwise."""
    print(shown(str(text)), end=end, file=file or sys.stdout, flush=flush)


def say_what_ends_us() -> None:
    """Have an error that nobody catches be told as everything else is."""

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)), end="", file=sys.stderr)

    sys.excepthook = tell


def plain_console(**settings: Any) -> Console:
    """A console of rich that shows texts as they are: no markup, no links, no emoji of theirs, nothing to obey."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(shown(text), **how)

    return PlainConsole(markup=False, emoji=False, highlight=False, **settings)
