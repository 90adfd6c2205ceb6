"""Write the results of a sweep into its folder, from the disk alone: the table, and what it shows.

results.csv, .parquet, .md    every result; mean ± 95% interval over seeds
findings.md                   sentences: comparisons, claims, published numbers, each with its interval and its runs
comparisons.csv claims.csv published.csv coverage.csv cells.csv front.csv variance.csv tables/*.tex    docs/results.md
cost.csv failures.csv         what each run took; why runs failed, with the end of their logs
figures/*.svg, *.pdf          charts of all that
report.html                   all of it as one page, with what stands behind each run, and samples side by side

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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from peft_align.cli import Asked, ask, run_verb
from peft_align.config.schema import Wandb
from peft_align.grid.planner import Item
from peft_align.launch.outcome import settle
from peft_align.reporting.table import columns, markdown, rows, write_csv, write_parquet
from peft_align.reporting.told import Told, text, told_of
from peft_align.store.records import atomic_write
from peft_align.store.runs import RunDir
from peft_align.terminal import say


def write_report(asked: Asked, items: Sequence[Item]) -> str:
    """Write the files and return what is shown: the summary, and where the files are.

    Raises:
        InputError: conf/report/ has faults.
    """
    from peft_align.reporting import cost, failures, figures, findings, page  # import altair and numpy
    from peft_align.reporting.answers import answers
    from peft_align.reporting.details import details
    from peft_align.reporting.provenance import provenance

    questions = findings.load_questions(asked.space)
    told = told_of(items, asked.root)
    table = rows(asked.sweep, items, asked.root, told)
    names = columns(asked.sweep)
    folder = asked.folder
    summary = markdown(asked.sweep, table)
    write_csv(folder / "results.csv", names, table)
    write_parquet(folder / "results.parquet", names, table)
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(summary, encoding="utf-8")
    found = findings.find(asked.space, questions, asked.sweep, items, table)
    findings.write(found, folder)
    took, failed = cost.cost_rows(items, asked.root, table, told), failures.failure_rows(items, asked.root, told)
    write_csv(folder / "cost.csv", cost.COLUMNS, took)
    write_csv(folder / "failures.csv", failures.FAILURES, failed)
    charts = figures.figures(found, table)
    figures.write_figures(charts, folder)
    content = page.Content(
        title=asked.sweep.name,
        found=found,
        figures=charts,
        answers=answers(items, asked.root, told=told),  # before the details, which tell what could not be read
        details=details(items, asked.root, told),
        cost=took,
        per_point=cost.per_point(found, took),
        failures=failed,
        provenance=provenance(items, asked.root, told),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    page.write_page(content, folder)
    warnings = data_warnings(told)
    if isinstance(tracker := asked.sweep.config.tracker, Wandb):
        from peft_align.reporting.tracked import track_report

        warnings += filter(None, [track_report(tracker, asked.sweep, folder, table, found)])
    warned = "".join(f"warning: {warning}\n" for warning in warnings)
    return f"{summary}\n{findings.summary(found)}{warned}{len(table)} rows: {folder / 'results.csv'}\n"


def data_warnings(told: Mapping[str, Told]) -> list[str]:
    """What the records say against the data that was read, and against a judge's answers, once each."""
    found: dict[str | None, None] = {}
    for each in told.values():
        found[text(each.train, "data", "warning")] = None
        for scored in each.scored if not each.item.to_make else ():
            found[text(scored.record, "details", "warning") if scored.judgement else None] = None
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
