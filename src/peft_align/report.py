"""Write the results of a sweep into its folder, from the disk alone: the table, and what it shows.

results.csv, .parquet, .md    every result; mean ± 95% interval over seeds
findings.md                   sentences: comparisons, claims, published numbers, each with its interval and its runs
comparisons.csv claims.csv published.csv coverage.csv cells.csv front.csv variance.csv tables/*.tex    docs/results.md
figures/*.svg, *.pdf          charts of all that

usage: python -m peft_align.report [+grid=NAME] [key=value ...] [--ended] [--config-dir DIR]

  Without a grid or overrides: the sweep that was started last under the root. Works while a sweep runs.

examples:
  python -m peft_align.report +grid=quickstart
  python -m peft_align.report +grid=main model=mistral_7b
  python -m peft_align.report root=/scratch/me/outputs

flags:
  --ended           the jobs of a cluster have ended: record why runs stopped, and say what is missing
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from peft_align.cli import Asked, ask, run_verb
from peft_align.grid.planner import Item
from peft_align.launch.outcome import settle
from peft_align.reporting.table import columns, markdown, rows, write_csv, write_parquet
from peft_align.store.records import atomic_write
from peft_align.store.runs import RunDir
from peft_align.terminal import say


def write_report(asked: Asked, items: Sequence[Item]) -> str:
    """Write the files and return what is shown: the summary, and where the files are.

    Raises:
        InputError: conf/report/ has faults.
    """
    from peft_align.reporting import figures, findings  # import altair and numpy

    questions = findings.load_questions(asked.space)
    table = rows(asked.sweep, items, asked.root)
    names = columns(asked.sweep)
    folder = asked.folder
    summary = markdown(asked.sweep, table)
    write_csv(folder / "results.csv", names, table)
    write_parquet(folder / "results.parquet", names, table)
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(summary, encoding="utf-8")
    found = findings.find(asked.space, questions, asked.sweep, items, table)
    findings.write(found, folder)
    figures.write_figures(figures.figures(found, table), folder)
    told = "".join(f"warning: {warning}\n" for warning in data_warnings(items, asked.root))
    return f"{summary}\n{findings.summary(found)}{told}{len(table)} rows: {folder / 'results.csv'}\n"


def data_warnings(items: Sequence[Item], root: Path) -> list[str]:
    """What the records say against the data that was read, and against a judge's answers, once each."""
    found: dict[str | None, None] = {}
    for item in items:
        directory = RunDir(root, item.run.id)
        if item.run.kind == "train":
            found[(directory.train_record() or {}).get("data", {}).get("warning")] = None
        for judgement in item.judgements if not item.to_make else ():
            record = directory.judgement_record(judgement.request.name, judgement.name) or {}
            found[record.get("details", {}).get("warning")] = None
    return [warning for warning in found if warning]


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--ended"], latest=True)
    items = asked.plan()
    left = [item for item in items if not item.done]
    if "--ended" in asked.line.flags and left:
        settle([RunDir(asked.root, item.run.id) for item in left])
        items = asked.plan()
    say(write_report(asked, items), end="")
    for item in items if "--ended" in asked.line.flags else ():
        if not item.done:
            say(f"missing: {item.run.id}: {item.failure or item.why}")
    return 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
