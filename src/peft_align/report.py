"""Write the results of a sweep into its folder, from the disk alone: the table, and what it shows.

results.csv, .parquet, .md    every result; mean ± 95% interval over seeds
findings.md                   sentences: comparisons, claims, published numbers, each with its interval and its runs
comparisons.csv claims.csv published.csv coverage.csv cells.csv front.csv variance.csv tables/*.tex    docs/results.md
cost.csv failures.csv         what each run took; why runs failed, with the end of their logs
figures/*.svg, *.pdf          charts of all that
report.html                   all of it as one page, with what stands behind each run, and samples side by side

usage: python -m peft_align.report [+grid=NAME] [key=value ...] [--ended] [--to DIR] [--serve [PORT]] [--config-dir DIR]
   or: python -m peft_align.report --sweeps NAME [NAME ...] [root=DIR] [...]
   or: python -m peft_align.report --from results.parquet [more.parquet ...] [...]
   or: python -m peft_align.report --published [root=DIR] [...]

  Without a grid or overrides: the sweep that was started last under the root. Works while a sweep runs.

examples:
  python -m peft_align.report +grid=main model=mistral_7b --serve
  python -m peft_align.report --sweeps main rank root=/scratch/me/outputs
  python -m peft_align.report --from results.parquet --to from_a_colleague

flags:
  --sweeps          sweeps that were started before, as one: names of their grids or folders, or folders of other roots
  --from            tables alone, on a machine that has neither their runs nor their root
  --published       the numbers of the study's own tables, as one value a cell: a report before anything was trained
  --to              another folder than the sweep's; else ROOT/sweeps/reports/ for what is of no single sweep, or beside
                    the first table
  --serve           show the report in a browser on this machine, and write it again while the sweep goes on
  --every           seconds between two looks at what changed, with --serve (30)
  --ended           the jobs of a cluster have ended: record why runs stopped, and say what is missing
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

from peft_align.cli import Asked, run_verb
from peft_align.config.schema import Wandb
from peft_align.grid.planner import Item
from peft_align.reported import settle_all, wanted
from peft_align.reporting.subject import Place, Subject, of_sweep
from peft_align.reporting.table import columns, markdown, write_csv, write_parquet
from peft_align.reporting.told import Told, text
from peft_align.store.records import atomic_write
from peft_align.terminal import say

MOST = 1000  # runs of which the page tells all, or it would take long to write and to open; the tables have every run


def write_report(asked: Asked, items: Sequence[Item]) -> str:
    """Write the files of a sweep and return what is shown: the summary, and where the files are.

    Raises:
        InputError: conf/report/ has faults.
        WorkError: what draws the figures fails; the tables are written.
    """
    subject = of_sweep(asked.space, asked.sweep, [Place(asked.root, list(items))], asked.folder)
    return write(replace(subject, sweep=asked.sweep))


def write(subject: Subject) -> str:
    """Write the files of any subject and return what is shown. Raises InputError and WorkError."""
    from peft_align.reporting import cost, failures, figures, findings, page  # import altair and numpy
    from peft_align.reporting.answers import answers
    from peft_align.reporting.details import details
    from peft_align.reporting.provenance import provenance

    questions = findings.load_questions(subject.space)
    frame, table, folder = subject.frame, subject.table, subject.folder
    items, told, root = subject.items, subject.told, subject.root
    names = columns(frame)
    with ThreadPoolExecutor(2) as beside:  # they wait for processes that work on another core
        libraries = beside.submit(page.vega)
        try:
            found = findings.find_in(subject.space, questions, frame, subject.covered, table)
            charts = figures.figures(found, table)
            drawing = beside.submit(figures.draw, charts)
        finally:  # whatever becomes of the statistics and the charts
            write_csv(folder / "results.csv", names, table)
            write_parquet(folder / "results.parquet", names, table, frame)
            summary = markdown(frame, table)
            with atomic_write(folder / "results.md") as temporary:
                temporary.write_text(summary, encoding="utf-8")
        findings.write(found, folder)
        took, failed = cost.cost_rows(items, root, table, told), failures.failure_rows(items, root, told)
        write_csv(folder / "cost.csv", cost.COLUMNS, took)
        write_csv(folder / "failures.csv", failures.FAILURES, failed)
        prompts = answers(items, root, told=told)  # before the details, which tell what could not be read
        open_items = told_whole(items)
        known = details(open_items, root, told)
        content = page.Content(
            title=frame.name,
            found=found,
            figures=charts,
            answers=prompts,
            details=known,
            cost=[row for row in took if row["run_id"] in known],
            left_out=len(items) - len(open_items),
            per_point=cost.per_point(found, took),
            failures=failed,
            provenance=provenance(items, root, told),
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        )
        libraries.result()
        page.write_page(content, folder)
        figures.write_figures(drawing.result(), folder)
    warnings = data_warnings(told)
    sweep = subject.sweep
    if sweep is not None and isinstance(tracker := sweep.config.tracker, Wandb):
        from peft_align.reporting.tracked import track_report

        warnings += filter(None, [track_report(tracker, sweep, folder, table, found)])
    warned = "".join(f"warning: {warning}\n" for warning in warnings)
    return f"{summary}\n{findings.summary(found)}{warned}{len(table)} rows: {folder / 'results.csv'}\n"


def told_whole(items: Sequence[Item]) -> list[Item]:
    """The runs that the page tells all of: those that are not done before others, in the sweep's order."""
    chosen = {item.run.id for item in sorted(items, key=lambda item: item.done)[:MOST]}
    return [item for item in items if item.run.id in chosen]


def data_warnings(told: Mapping[str, Told]) -> list[str]:
    """What the records say against the data that was read, and against a judge's answers, once each."""
    found: dict[str | None, None] = {}
    for each in told.values():
        found[text(each.train, "data", "warning")] = None
        for scored in each.scored if not each.item.to_make else ():
            found[text(scored.record, "details", "warning") if scored.judgement else None] = None
    return [warning for warning in found if warning]


def verb(argv: list[str]) -> int:
    asked = wanted(argv)
    subject = asked.source.subject()
    if asked.ended:
        settle_all(subject)
        subject = asked.source.subject()
    if asked.port is not None:
        from peft_align.reporting.serving import serve

        gc.enable()
        serve(asked.source, write, subject.folder, asked.port, asked.every)
        return 0
    say(write(subject), end="")
    for item in subject.items if asked.ended else ():
        if not item.done:
            say(f"missing: {item.run.id}: {item.failure or item.why}")
    return 0


def main() -> int:
    """Entry point."""
    gc.disable()  # records by the ten thousand, all in use: collections would pass over them again and again
    code = run_verb(verb, __doc__)
    gc.freeze()  # the interpreter's end would pass over them too
    return code


if __name__ == "__main__":
    sys.exit(main())
