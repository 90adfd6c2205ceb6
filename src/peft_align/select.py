"""Choose the best settings of a search, by its validation scores, and write them where another sweep includes them.

usage: python -m peft_align.select +grid=NAME [select.by=[axis,...]] [select.to=FILE] [overrides] [--config-dir DIR]

  Compared is everything the search varies besides select.by (default: [method]); the mean over all other axes decides:
  for SFT the loss on the chosen responses, for DPO the reward accuracy, then its loss; held-out validation pairs.

examples:
  python -m peft_align.select +grid=rank
  python -m peft_align.select +grid=rank select.by=[method,model] select.to=best.yaml
  python -m peft_align.sweep +grid=main +selected=best.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from peft_align.cli import Asked, ask, run_verb
from peft_align.config.identity import slug
from peft_align.errors import Fault, InputError
from peft_align.reporting.selection import Candidate, select, write_selection
from peft_align.terminal import plain_console, say


def verb(argv: list[str]) -> int:
    asked = ask(argv, own=("select.by", "select.to"))
    by = _names(asked.line.own.get("select.by", (["method"],)))
    target = _target(asked)
    candidates = select(asked.sweep, asked.plan(), asked.root, by)
    write_selection(target, candidates, asked.line.words)
    show(candidates)
    say(f"\nuse it: +selected={target}")
    return 0


def _target(asked: Asked) -> Path:
    given = asked.line.own.get("select.to", (asked.root / "selected" / f"{slug([asked.sweep.name])}.yaml",))
    target = Path(str(given[0]))
    if len(given) > 1 or target.is_dir():
        what = "is a folder" if target.is_dir() else "names several files"
        raise InputError([Fault(f"select.to={','.join(map(str, given))}", what, "name one file, e.g. best.yaml")])
    return target


def _names(given: Sequence[Any]) -> list[str]:
    """Axes given as a list or with commas."""
    names = [str(v) for each in given for v in (each if isinstance(each, list) else [each])]
    if not names:
        raise InputError([Fault("select.by", "is empty", "name an axis, e.g. select.by=[method]")])
    return list(dict.fromkeys(names))


def show(candidates: Sequence[Candidate]) -> None:
    """A table for each group, the choice first."""
    console = plain_console()
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(", ".join(f"{k}={v}" for k, v in candidate.group.items()), []).append(candidate)
    for name, members in groups.items():
        table = Table(title=name, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for column in ("", *members[0].settings, *members[0].scores, "runs"):
            table.add_column(column)
        for c in members:
            cells = [*map(_short, c.settings.values()), *(f"{v:.4f}" for v in c.scores.values()), str(c.runs)]
            table.add_row("best" if c.chosen else "", *cells, style="bold" if c.chosen else "")
        console.print(table)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
