"""report.html: all that a sweep shows as one file that loads nothing, from no server and no other file.

Jinja (autoescape) writes what can be read without JavaScript; charts, details of runs and samples are JSON in the page,
drawn by the scripts of assets/, which set texts of models by `textContent` alone. A Content-Security-Policy names the
digests of the page's own two scripts: whatever else came to be in it would not run, and nothing could be sent anywhere.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_align.reporting import page_tables, published
from peft_align.reporting.comparisons import TOO_FEW
from peft_align.reporting.drawing import VEGA_LITE, bundle
from peft_align.reporting.figures import Figure
from peft_align.reporting.findings import (
    Findings,
    Sentence,
    comparison_sentences,
    front_sentences,
    part_sentences,
    variance_sentences,
    with_published,
)
from peft_align.reporting.page_data import compact_answers, compact_details, embedded
from peft_align.reporting.provenance import Provenance
from peft_align.reporting.table import Row
from peft_align.store.records import atomic_write, cache_dir
from peft_align.terminal import shown

ASSETS = Path(__file__).parent / "assets"
FILE = "report.html"
FIRST = {"sentences": "What it was made on", "warnings": "Where runs differ in what should be the same"}
GLOBALS = "window.vegaEmbed = vegaEmbed;"
SCRIPTS = ("page.js", "charts.js", "run.js", "samples.js")  # in this order
SECTIONS = {  # by anchor, in their order: heading, and its short form in the navigation
    "found": ("What was found", "Found"),
    "coverage": ("Coverage", "Coverage"),
    "tradeoff": ("The trade-off", "Trade-off"),
    "comparisons": ("Paired comparisons", "Comparisons"),
    "curves": ("Curves", "Curves"),
    "claims": ("The paper’s claims", "Claims"),
    "published": ("Against the published tables", "Published"),
    "samples": ("Samples", "Samples"),
    "cost": ("Cost", "Cost"),
    "failures": ("Failures", "Failures"),
    "methods": ("Methods and provenance", "Methods"),
}
# Nothing is loaded, sent or framed. Scripts: those whose digests are added. Vega's expressions are interpreted
# (`ast: true` in charts.js) instead of compiled, so that 'unsafe-eval' is not needed. Vega sets style attributes.
POLICY = (
    "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
ENDS_A_SCRIPT = re.compile(r"</script|<!--", re.IGNORECASE)


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Attributes:
        title: of the sweep.
        figures: in their order within each section.
        details: by run id; see details.py.
        answers: prompts with the answers of several runs; see answers.py.
        cost, per_point: rows of cost.csv, and of what a point gained costs.
        failures: rows of failures.csv, each with the end of its log.
        provenance: each of its fields is shown under its name.
        written: when, in UTC.
        left_out: runs that have no details and no cost here, since there are so many.
    """

    title: str
    found: Findings
    figures: Sequence[Figure]
    details: Mapping[str, Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]]
    cost: Sequence[Row]
    per_point: Sequence[Row]
    failures: Sequence[Row]
    provenance: Provenance
    written: str
    left_out: int = 0


def write_page(content: Content, folder: Path) -> Path:
    """Write report.html into a folder, atomically."""
    _keep(vega())
    path = folder / FILE
    with atomic_write(path) as temporary:
        temporary.write_bytes(render(content).encode("utf-8", "replace"))  # a name may hold half a character
    return path


def render(content: Content) -> str:
    """The page.

    Raises:
        ValueError: a figure is of a section that the page does not have.
    """
    strange = {figure.section for figure in content.figures} - set(SECTIONS)
    if strange:
        raise ValueError(f"the page has no section {', '.join(sorted(strange))}; it has {', '.join(SECTIONS)}")
    libraries, script = vega(), _script()
    policy = POLICY.format(" ".join(f"'sha256-{digest(text)}'" for text in (libraries, script)))
    data = {
        "figures": {figure.name: figure.spec for figure in content.figures},
        "details": compact_details(content.details),
        "answers": compact_answers(content.answers),
    }
    template = _environment().get_template("page.html.jinja")
    made: str = template.render(
        policy=policy,
        style=_asset("page.css"),
        scripts=[libraries, script],
        data={name: embedded(part) for name, part in data.items()},
        sections=SECTIONS,
        content=content,
        **_told(content),
    )
    return made


@functools.cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script: as it is kept in the cache, or made anew.

    Writes no file, so that a thread may wait for it: writing sets the process's umask for a moment.

    Raises:
        ValueError: it holds what would end its element in an HTML file.
        WorkError: it could not be made.
        InputError: see store.records.cache_dir.
    """
    return _checked(_kept(_place()) or bundle(GLOBALS), "the Vega bundle")


def _place() -> Path:
    """Where the Vega bundle is kept."""
    return cache_dir() / f"vega-{version('vl-convert-python')}-{VEGA_LITE}.js"


def _keep(script: str) -> None:
    """Have the Vega bundle in the cache; one that cannot be written costs the next report two seconds."""
    if _kept(_place()) is None:
        with suppress(OSError), atomic_write(_place()) as temporary:
            temporary.write_text(f"{digest(script)}\n{script}", encoding="utf-8", newline="")


def _kept(place: Path) -> str | None:
    """A script that was kept behind a line with its digest; None if there is none, or it is damaged."""
    try:
        told, _, script = place.read_bytes().decode().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return script if told == digest(script) else None


def digest(script: str) -> str:
    """A script's digest as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _script() -> str:
    """The page's own script: its files in one function, so that none of their names is global."""
    return "(() => {\n'use strict';\n" + "".join(map(_asset, SCRIPTS)) + "})();\n"


def _asset(name: str) -> str:
    return _checked((ASSETS / name).read_text(encoding="utf-8"), name)


def _checked(text: str, name: str) -> str:
    if ENDS_A_SCRIPT.search(text) or "\r" in text or "\0" in text:  # a parser changes those, and the digest with them
        raise ValueError(f"{name} cannot stand in an HTML file as it is")
    return text


def _environment() -> Any:
    import jinja2

    def plain(value: Any) -> Any:
        """Texts of others without secrets, and with what turns text around or hides it written out."""
        return shown(value) if type(value) is str else value

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["shapes"] = page_tables.SHAPES
    made.filters["together"] = lambda text: re.sub(r"\bp ([<=]) ", "p\u00a0\\1\u00a0", text)  # on one line
    return made


def _told(content: Content) -> dict[str, Any]:
    """What the template shows of the findings."""
    found = content.found
    labels = {run_id: str(told.get("label") or run_id) for run_id, told in content.details.items()}
    compared = comparison_sentences(found.compared)
    total = found.coverage.of()
    return {
        "headline": _headline(found, compared),
        "differences": [one for one in compared if one.result in ("higher", "lower")],
        "not_shown": [one for one in compared if one.result not in ("higher", "lower", TOO_FEW)],
        "lacking": [one for one in compared if one.result == TOO_FEW],
        "claims": _claims(found),
        "variance": variance_sentences(found.variance),
        "front": front_sentences(found.fronts),
        "published_summary": _sentence(published.summary(found.beside)),
        "coverage_text": found.coverage.text().splitlines()[0],
        "left": total["failed"] + total["missing"] + total["excluded"],
        "reasons": page_tables.coverage_reasons(found.coverage),
        "axes": page_tables.coverage_axes(found.coverage),
        "runs": page_tables.runs(found, content.details),
        "comparisons": page_tables.comparisons(found.compared),
        "published_table": page_tables.published(found.beside),
        "cost": page_tables.cost(content.cost, labels),
        "per_point": page_tables.per_point(content.per_point),
        "failed": [_failure(row, labels) for row in content.failures],
        "provenance": _provenance(content.provenance, labels),
        "alone": not found.coverage.whole,
        "whose": ["this sweep", "published tables"] if found.published else ["published tables"],
        "tested": sum(each.effect.p is not None for each in found.compared),
        "figures": {name: [one for one in content.figures if one.section == name] for name in SECTIONS},
    }


def _headline(found: Findings, compared: Sequence[Sentence]) -> list[tuple[str, str, str]]:
    """Some figures: number, of how many, what they are."""
    total = found.coverage.of()
    planned = total["done"] + total["failed"] + total["missing"]
    differences = sum(one.result in ("higher", "lower") for one in compared)
    decided = sum(each.verdict in ("supported", "contradicted") for each in found.claims)
    measured = sum(row["measured"] is not None for row in found.beside)
    there = (f"of {planned}", "runs complete") if found.coverage.whole else ("", "runs in the table")
    told = [
        (str(total["done"]), *there),
        (str(differences), f"of {len(found.compared)}", "comparisons show a difference"),
        (str(decided), f"of {len(found.claims)}", "claims decided"),
    ]
    beside = (str(measured), f"of {len(found.beside)}", "published numbers measured")
    return [*told, beside] if found.beside else told


def _claims(found: Findings) -> list[dict[str, Any]]:
    """Each claim with its verdicts: those that the runs bear out first, those without enough runs last."""
    order = ["supported", "contradicted", "undecided", TOO_FEW]
    told = [
        {
            "says": ours.claim.says,
            "verdict": ours.verdict,
            "note": ours.note,
            "told": [(one.verdict, one.note, part_sentences(one)) for one in (ours, theirs) if one],
        }
        for ours, theirs in with_published(found)
    ]
    return sorted(told, key=lambda one: order.index(str(one["verdict"])))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _failure(row: Row, labels: Mapping[str, str]) -> dict[str, Any]:
    """A failed run: its name, its reason, what else is short, and the end of its log."""
    run_id = row["run_id"]
    told = ("run_id", "reason", "log_end", *page_tables.IN_THE_LABEL)
    return {
        "run": run_id if run_id in labels else None,
        "label": labels.get(run_id) or row.get("label") or run_id,
        "reason": row.get("reason"),
        "facts": {
            page_tables.words(key): page_tables.cell(value).text
            for key, value in row.items()
            if key not in told and value is not None
        },
        "log": row.get("log_end"),
    }


def _provenance(provenance: Provenance, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each field under its name, as rows or as texts; what people must know comes first."""
    fields = dataclasses.asdict(provenance)
    parts = []
    for key in [*(key for key in FIRST if key in fields), *(key for key in fields if key not in FIRST)]:
        value = fields[key]
        if not value:
            continue
        title = FIRST.get(key) or f"{key[:1].upper()}{key[1:]}".replace("_", " ")
        are_rows = all(isinstance(each, Mapping) for each in value)
        table = page_tables.from_rows(title, [dict(each) for each in value], labels) if are_rows else None
        parts.append({"title": title, "table": table, "texts": [] if are_rows else [str(each) for each in value]})
    return parts
