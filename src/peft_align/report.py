"""Write the results of a sweep into its folder, from the disk alone: the table, and what it shows.

results.csv, .parquet, .md    every result; mean ± 95% interval over seeds
findings.md                   sentences: comparisons, claims, published numbers, each with its interval and its runs
comparisons.csv claims.csv published.csv coverage.csv cells.csv front.csv variance.csv tables/*.tex    docs/results.md

usage: python -m peft_align.report [+grid=NAME] [key=value ...] [--ended] [--to DIR] [--serve [PORT]] [--config-dir DIR]
       python -m peft_align.report --sweeps NAME [NAME ...] [root=DIR] [...]
       python -m peft_align.report --from results.parquet [more.parquet ...] [...]

  Without a grid or overrides: the sweep that was started last under the root. Works while a sweep runs.

examples:
  python -m peft_align.report +grid=quickstart
  python -m peft_align.report +grid=main model=mistral_7b --serve
  python -m peft_align.report --sweeps main rank root=/scratch/me/outputs
  python -m peft_align.report --from results.parquet --to from_a_colleague

flags:
  --sweeps          sweeps that were started before, as one: names of their grids or folders, or folders of other roots
  --from            tables alone, on a machine that has neither their runs nor their root
  --to              another folder than the sweep's; of several sweeps ROOT/sweeps/reports/, of a table beside it
  --serve           show the report in a browser on this machine, and write it again while the sweep goes on
  --every           seconds between two looks at what changed, with --serve (30)
  --ended           the jobs of a cluster have ended: record why runs stopped, and say what is missing
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from peft_align.cli import Asked, run_verb
from peft_align.grid.planner import Item
from peft_align.reported import settle_all, wanted
from peft_align.reporting.subject import Place, Subject, of_sweep, together
from peft_align.reporting.table import columns, markdown, write_csv, write_parquet
from peft_align.store.records import atomic_write
from peft_align.store.runs import RunDir
from peft_align.terminal import say


def write_report(asked: Asked, items: Sequence[Item]) -> str:
    """Write the files of a sweep and return what is shown: the summary, and where the files are.

    Raises:
        InputError: conf/report/ has faults.
    """
    return write(of_sweep(asked.space, asked.sweep, [Place(asked.root, list(items))], asked.folder))


def write(subject: Subject) -> str:
    """Write the files of any subject and return what is shown. Raises InputError."""
    from peft_align.reporting import findings  # imports numpy

    questions = findings.load_questions(subject.space)
    folder, frame, table = subject.folder, subject.frame, subject.table
    names = columns(frame)
    summary = markdown(frame, table)
    write_csv(folder / "results.csv", names, table)
    write_parquet(folder / "results.parquet", names, table, frame)
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(summary, encoding="utf-8")
    found = findings.find_in(subject.space, questions, frame, subject.covered, table)
    findings.write(found, folder)
    warnings = dict.fromkeys((*subject.notes, *(w for p in subject.places for w in data_warnings(p.items, p.root))))
    told = "".join(f"warning: {warning}\n" for warning in warnings)
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
    asked = wanted(argv)
    subject = asked.source.subject()
    if asked.ended:
        settle_all(subject)
        subject = asked.source.subject()
    if asked.port is not None:
        from peft_align.reporting.serving import serve

        serve(asked.source, write, subject.folder, asked.port, asked.every)
        return 0
    say(write(subject), end="")
    for item in together(subject.places) if asked.ended else ():
        if not item.done:
            say(f"missing: {item.run.id}: {item.failure or item.why}")
    return 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
