"""What a sweep shows: everything that is computed from its table, as files, as sentences, and as a short summary."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from peft_align.config.compose import ConfigSpace
from peft_align.grid.planner import Item
from peft_align.grid.runs import Sweep
from peft_align.reporting import claims, comparisons, published
from peft_align.reporting.cells import Results, cell_rows, cells, gather
from peft_align.reporting.claims import Claim, Verdict, evaluate, load_claims
from peft_align.reporting.comparisons import LEVEL, NO_SPREAD, TOO_FEW, Compared, part_words
from peft_align.reporting.contrasts import Contrast, load_comparisons, load_sides
from peft_align.reporting.coverage import COLUMNS as COVERAGE
from peft_align.reporting.coverage import Coverage, coverage
from peft_align.reporting.frame import Frame, frame_of
from peft_align.reporting.latex import tables
from peft_align.reporting.table import Row, columns, write_csv
from peft_align.reporting.tradeoffs import VARIANCE, front_columns, fronts, variance_rows
from peft_align.store.records import atomic_write

SHOWN = 6  # claims and comparisons in the summary


@dataclass(frozen=True)
class Questions:
    """What is asked of the results: conf/report/, the user's too."""

    comparisons: list[Contrast]
    claims: list[Claim]
    sides: dict[str, list[str]]


def load_questions(space: ConfigSpace) -> Questions:
    """Read and check conf/report/. Raises InputError."""
    return Questions(load_comparisons(space), load_claims(space), load_sides(space.dirs))


@dataclass(frozen=True)
class Findings:
    """All that is computed.

    Attributes:
        published: the same claims on the study's published numbers; none where those are what is reported on.
        beside: published numbers and the sweep's own; likewise.
    """

    results: Results
    coverage: Coverage
    compared: list[Compared]
    claims: list[Verdict]
    published: list[Verdict]
    beside: list[Row]
    fronts: list[Row]
    variance: list[Row]
    tables: dict[str, str]


def find(
    space: ConfigSpace, questions: Questions, sweep: Sweep, items: Sequence[Item], table: Sequence[Row]
) -> Findings:
    """Compute everything from a sweep's table and the state of its runs."""
    return find_in(space, questions, frame_of(sweep), coverage(sweep, items), table)


def find_in(
    space: ConfigSpace, questions: Questions, frame: Frame, covered: Coverage, table: Sequence[Row]
) -> Findings:
    """Compute everything from a table, and what else is known of the sweep that it is of."""
    contrasts = [*questions.comparisons, *(c for claim in questions.claims for c in claim.contrasts)]
    asked = sorted({key for contrast in contrasts for key in contrast.named()})
    results = gather(frame, columns(frame), table, asked)
    theirs = None if frame.name == published.NAME else published.as_results(space)
    return Findings(
        results,
        covered,
        comparisons.comparisons(results, questions.comparisons),
        [evaluate(results, claim) for claim in questions.claims],
        [evaluate(theirs, claim) for claim in questions.claims] if theirs else [],
        published.beside(results) if theirs else [],
        fronts(results, questions.sides),
        variance_rows(results),
        tables(results, frame),
    )


def write(found: Findings, folder: Path) -> None:
    """Write the files beside results.csv."""
    names, rows = cell_rows(found.results, cells(found.results))
    write_csv(folder / "cells.csv", names, rows)
    write_csv(folder / "comparisons.csv", comparisons.COLUMNS, comparisons.comparison_rows(found.compared))
    ours = claims.claim_rows(found.claims, "sweep")
    write_csv(folder / "claims.csv", claims.COLUMNS, ours + claims.claim_rows(found.published, "published tables"))
    write_csv(folder / "published.csv", published.COLUMNS, found.beside)
    write_csv(folder / "coverage.csv", COVERAGE, found.coverage.rows())
    write_csv(folder / "front.csv", front_columns(found.results), found.fronts)
    write_csv(folder / "variance.csv", VARIANCE, found.variance)
    shutil.rmtree(folder / "tables", ignore_errors=True)  # what an earlier state of the sweep had
    for name, text in found.tables.items():
        _write_text(folder / "tables" / name, text)
    _write_text(folder / "findings.md", markdown(found))


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown(found: Findings) -> str:
    """findings.md: sentences, each with its effect, interval and numbers of runs."""
    blocks = ["# Findings", found.coverage.text().replace("\n  ", "\n- ").strip()]
    if found.results.dropped:
        blocks.append(f"{found.results.dropped} values are no finite numbers and are left out.")
    blocks += ["## Comparisons", _bullets([one.text for one in comparison_sentences(found.compared)])]
    blocks.append(
        "Means over cells that are equal in all else, the seed included; 95% t intervals; p after Holm's correction "
        f"for the {sum(each.effect.p is not None for each in found.compared)} comparisons that could be tested. A "
        "difference is told where p is below 0.05."
    )
    blocks += ["## Claims", _bullets(_claim_sentences(found))]
    blocks += ["## Published numbers", f"{_capital(published.summary(found.beside))}."]
    if found.variance:
        blocks += ["## What moves the scores", _bullets(variance_sentences(found.variance))]
    if front := front_sentences(found.fronts):
        blocks += ["## On both sides of the trade-off", _bullets(front)]
    return "\n\n".join(blocks) + "\n"


@dataclass(frozen=True)
class Sentence:
    """One thing that is told.

    Attributes:
        result: what it comes to: of a comparison `higher`, `lower`, `no difference shown`, `no spread` or
            `not enough runs`; of a part of a claim its verdict.
        basis: on how many cells, seeds and runs it rests; it stands in the text too.
    """

    text: str
    result: str
    basis: str


def comparison_sentences(compared: Sequence[Compared]) -> list[Sentence]:
    """What is shown first, then what is not, then in one sentence each what there are not enough runs for."""
    order = {"higher": 0, "lower": 0, TOO_FEW: 2}
    told = sorted((c for c in compared if c.result != TOO_FEW), key=lambda c: order.get(c.result, 1))
    lacking: dict[str, list[str]] = {}
    for one in compared:
        if one.result == TOO_FEW:
            lacking.setdefault(_name(one), []).append(f"{one.measure} ({basis(one)})")
    found = [Sentence(comparison_sentence(one), one.result, basis(one)) for one in told]
    for name, on in lacking.items():
        bare = all("(0 pairs" in each for each in on)
        text = f"{name}: not enough runs" + (" (no pair of cells)." if bare else f" on {', '.join(on)}.")
        found.append(Sentence(text, TOO_FEW, "no pair of cells" if bare else ", ".join(on)))
    return found


def _name(one: Compared) -> str:
    return one.contrast.name + (f" ({part_words(one.part)})" if one.part else "")


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Nothing."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def comparison_sentence(one: Compared) -> str:
    """One comparison in words, with what it rests on."""
    name = f"{_name(one)}, {one.measure}"
    if one.result == NO_SPREAD:
        same = "whatever the seed" if one.effect.basis == "seeds" else "in every pair"
        return f"{name}: {one.effect.value:+.3g} {same}, so that its error is not known ({basis(one)})."
    worse = one.higher_is_better is not None and (one.result == "higher") != one.higher_is_better
    quality = "" if one.higher_is_better is None else " (worse)" if worse else " (better)"
    corrected = " once corrected" if one.effect.p is not None and one.effect.p < LEVEL else ""
    verdict = f"{one.result}{quality} by" if one.result in ("higher", "lower") else f"{one.result}{corrected}:"
    value = one.effect.value or 0.0
    amount = f"{abs(value):.3g}" if one.result in ("higher", "lower") else f"{value:+.3g}"
    doubts = one.doubts() if one.result in ("higher", "lower") else []
    hedge = f"; but by {' and '.join(doubts)} 0 is inside" if doubts else ""
    return f"{name}: {verdict} {amount}, {interval(one)}, p {_p(one.p_holm)} ({basis(one)}){hedge}."


def interval(one: Compared) -> str:
    """The difference's interval."""
    return f"95% interval [{one.effect.low:.3g}, {one.effect.high:.3g}]"


def basis(one: Compared) -> str:
    """How many runs a difference rests on."""
    effect = one.effect
    if not effect.cells:
        return "0 pairs of cells"
    few, most = effect.seeds
    seeds = "no second seed" if most < 2 else f"{most} seeds" if few == most else f"{few} to {most} seeds"
    cells_only = ", interval over the cells" if effect.basis == "cells" else ""
    pairs = "1 pair" if effect.cells == 1 else f"{effect.cells} pairs"
    own = f", each side with its own {' and '.join(one.own_settings)}" if one.own_settings else ""
    return f"{pairs} of cells, {seeds}, {one.runs} runs{own}{cells_only}"


def _p(p: float | None) -> str:
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _claim_sentences(found: Findings) -> list[str]:
    lines = []
    for ours, theirs in with_published(found):
        rests = f"; at most {ours.runs} runs a part" if ours.runs else ""
        lines.append(f"{ours.claim.says}: **{ours.verdict}** ({ours.note}{rests}).")
        lines[-1] += "".join(f"\n  - {part.text}" for part in part_sentences(ours))
        lines[-1] += f"\n  - The published tables: {theirs.verdict} ({theirs.note})." if theirs else ""
    return lines


def with_published(found: Findings) -> list[tuple[Verdict, Verdict | None]]:
    """Each claim on the sweep and on the published numbers."""
    return list(zip_longest(found.claims, found.published))


def part_sentences(verdict: Verdict) -> list[Sentence]:
    """The parts of a claim that there are enough runs for."""
    found = []
    for part in verdict.parts:
        if part.verdict != TOO_FEW:
            one = part.compared
            value = f"{one.effect.value:+.3g}" + (f", {interval(one)}" if one.effect.low is not None else "")
            within = f" by {part_words(one.part)}" if one.part else ""
            text = f"{part.verdict}: {one.measure}, {one.contrast}{within}, expected {one.contrast.expect}: {value}"
            found.append(Sentence(f"{text} ({basis(one)}).", part.verdict, basis(one)))
    return found


def variance_sentences(rows: Sequence[Row]) -> list[str]:
    """What moves each measure most."""
    by_measure: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{row['benchmark']} {row['metric']}" + (f" ({row['judge']})" if row["judge"] else "")
        by_measure.setdefault(name, []).append(row)
    lines = []
    for measure, own in by_measure.items():
        most = sorted(own, key=lambda row: -row["share"])[:3]
        told = ", ".join(f"{row['term']} {100 * row['share']:.0f}%" for row in most)
        lines.append(f"{measure}: {told} of the variance ({own[0]['runs']} runs).")
    return lines


def front_sentences(rows: Sequence[Row]) -> list[str]:
    """Which cells no other beats on two benchmarks, one of either side."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    several = any(row["among"] != "all" for row in rows)  # a better model beats all others: within each, more is told
    for row in rows:
        if several and row["among"] == "all":
            continue
        groups.setdefault((row["among"], row["first"], row["second"]), []).append(row)
    lines = []
    for (among, first, second), own in groups.items():
        on = [row for row in own if row["on_front"]]
        told = "; ".join(_cell_words(row) for row in on[:SHOWN]) + ("; ..." if len(on) > SHOWN else "")
        where = "all models" if among == "all" else among
        lines.append(f"{first} and {second}, {where}: {told} ({len(on)} of {len(own)} cells).")
    return lines


def _cell_words(row: Row) -> str:
    if row["kind"] in ("baseline", "external"):
        words = [row["kind"], row["model"], row["base"]]
    else:
        keys = ("method", "model", "peft", "dataset", "preference", "merge")
        words = [row.get(key) for key in keys]
    sure = "" if row["probability"] is None else f" with probability {row['probability']:.2f}"
    return " ".join(str(word) for word in words if word is not None) + sure


def summary(found: Findings) -> str:
    """Not more than a screen."""
    text = found.coverage.text()
    counts = [sum(each.result == result for each in found.compared) for result in ("higher", "lower", TOO_FEW)]
    rest = len(found.compared) - sum(counts)
    if found.compared:
        text += (
            f"Comparisons: {counts[0] + counts[1]} differences shown, {rest} not, {counts[2]} without enough runs.\n"
        )
    shown = [each for each in found.compared if each.result in ("higher", "lower")]
    for each in shown[:SHOWN]:
        text += f"  {comparison_sentence(each)}\n"
    text += f"  {len(shown) - SHOWN} more in findings.md\n" if len(shown) > SHOWN else ""
    decided = [(a, b) for a, b in with_published(found) if a.verdict != TOO_FEW]
    for ours, theirs in decided[: 2 * SHOWN]:
        also = f"; published tables: {theirs.verdict}" if theirs else ""
        text += f"Claim {ours.claim.name}: {ours.verdict} ({ours.note}{also}).\n"
    left = len(found.claims) - len(decided)
    text += f"Not enough runs for {left} of {len(found.claims)} claims.\n" if left else ""
    return text + f"{_capital(published.summary(found.beside))}.\n"
