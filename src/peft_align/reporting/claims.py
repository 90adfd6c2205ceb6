"""Claims: contrasts with an expected direction, declared in conf/report/claims/, and whether the runs bear them out.

Each part of a claim (a contrast on one benchmark) is tested against its own expectation at one-sided 2.5%, which is
what its 95% interval says. A claim that needs all its parts is supported if every one is, without correction (an
intersection-union test, Berger 1982), and contradicted if one is, corrected for their number by Holm's rule; for a
claim that needs any, it is the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_align.config import validate
from peft_align.config.compose import ConfigSpace, read_yaml
from peft_align.errors import Fault, InputError, suggest
from peft_align.reporting.cells import Results
from peft_align.reporting.comparisons import TOO_FEW, Compared, compare, effect_row
from peft_align.reporting.contrasts import Contrast, files, is_mapping, load_sides, parse
from peft_align.reporting.statistics import holm
from peft_align.reporting.table import Row

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
ONE_SIDED = 0.025
NEEDS = ("all", "any")
KEYS = ("says", "needs", "contrasts")
COLUMNS = [
    *("claim", "results", "verdict", "note", "part_verdict", "expected", "margin", "contrast", "part"),
    *("benchmark", "judge", "metric", "higher_is_better", "effect", "low", "high", "interval_over", "df", "p"),
    *("p_support", "p_contradict", "cells", "seeds_min", "seeds_max", "runs", "own_settings"),
    *("by_seed_low", "by_seed_high", "bootstrap_low", "bootstrap_high"),
]


@dataclass(frozen=True)
class Claim:
    """What someone says of a study, as contrasts.

    Attributes:
        says: in words.
        needs: whether it takes all of its parts, or any.
    """

    name: str
    says: str
    needs: str
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Part:
    """One contrast on one benchmark, tested against what the claim expects.

    Attributes:
        support, contradict: one-sided p values of the opposite; None where there are not enough runs.
    """

    compared: Compared
    support: float | None
    contradict: float | None

    @property
    def verdict(self) -> str:
        """By its 95% interval alone."""
        if self.support is None or self.contradict is None:
            return UNDECIDED if self.compared.effect.basis else TOO_FEW
        if self.support < ONE_SIDED:
            return SUPPORTED
        return CONTRADICTED if self.contradict < ONE_SIDED else UNDECIDED


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        missing: benchmarks that it is about and that were not evaluated.
    """

    claim: Claim
    verdict: str
    parts: tuple[Part, ...]
    missing: tuple[str, ...]

    @property
    def runs(self) -> int:
        """The most that a part rests on."""
        return max((part.compared.runs for part in self.parts), default=0)

    @property
    def note(self) -> str:
        """What the verdict rests on, in words."""
        counts = {v: sum(part.verdict == v for part in self.parts) for v in (SUPPORTED, CONTRADICTED, TOO_FEW)}
        told = [f"{n} {verdict}" for verdict, n in counts.items() if n]
        text = f"of {len(self.parts)} parts {', '.join(told) or 'none decided'}"
        text = text if self.runs else "no such runs"
        bases = {part.compared.effect.basis for part in self.parts} - {""}
        text += "; cells only, no seeds" if bases == {"cells"} else ""
        return text + (f"; not evaluated: {', '.join(self.missing)}" if self.missing else "")


def load_claims(space: ConfigSpace) -> list[Claim]:
    """The claims of conf/report/claims/, the user's too. Raises InputError with every fault of all files."""
    faults: list[Fault] = []
    sides = load_sides(space.dirs)
    found: dict[str, Claim] = {}
    for path in files(space.dirs, "claims"):
        try:
            declared = read_yaml(path)
        except InputError as error:
            faults += error.faults
            continue
        for name, node in declared.items():
            at = f"{path}: {name}"
            if name in found:
                faults.append(Fault(at, "there is a claim of this name already", "claims of all folders are evaluated"))
            claim = _claim(space, str(name), node, at, sides, faults)
            if claim is not None:
                found[str(name)] = claim
    if faults:
        raise InputError(faults)
    return list(found.values())


def _claim(
    space: ConfigSpace, name: str, node: Any, at: str, sides: dict[str, list[str]], faults: list[Fault]
) -> Claim | None:
    before = len(faults)
    if not is_mapping(node, at, KEYS, faults):
        return None
    says, needs, declared = node.get("says"), node.get("needs", "all"), node.get("contrasts")
    if not isinstance(says, str) or not says.strip():
        faults.append(Fault(f"{at}.says", "is missing", "the claim in words"))
    if needs not in NEEDS:
        faults.append(Fault(f"{at}.needs", f"{validate.show(needs)} cannot be", suggest(str(needs), NEEDS)))
    contrasts = []
    if not isinstance(declared, list) or not declared:
        faults.append(Fault(f"{at}.contrasts", "a list of contrasts is expected", "see docs/results.md"))
        declared = []
    for i, entry in enumerate(declared):
        place = f"{at}.contrasts[{i}]"
        contrasts.append(parse(space, name, entry, place, sides, faults))
        if isinstance(entry, dict) and entry.get("expect") is None:
            faults.append(Fault(f"{place}.expect", "is missing", "better, worse, alike, not_worse or not_better"))
    if len(faults) > before:
        return None
    return Claim(name, str(says), str(needs), tuple(c for c in contrasts if c is not None))


def evaluate(results: Results, claim: Claim) -> Verdict:
    """Test each part of a claim, and the claim."""
    compared = [each for contrast in claim.contrasts for each in compare(results, contrast)]
    parts = tuple(_tested(each) for each in compared)
    asked = {name: None for contrast in claim.contrasts for name, _ in contrast.benchmarks}
    known = {measure.benchmark for measure in results.values}
    missing = tuple(name for name in asked if name not in known)
    return Verdict(claim, _verdict(claim, parts), parts, missing)


def _verdict(claim: Claim, parts: Sequence[Part]) -> str:
    decided = [part for part in parts if part.verdict != TOO_FEW]
    if not decided:
        return TOO_FEW
    for_all, for_any = (SUPPORTED, CONTRADICTED) if claim.needs == "all" else (CONTRADICTED, SUPPORTED)
    corrected = holm([part.contradict if claim.needs == "all" else part.support for part in parts])
    if any(p is not None and p < ONE_SIDED for p in corrected):
        return for_any
    if len(decided) < len(parts):
        return TOO_FEW if all(part.verdict == for_all for part in decided) else UNDECIDED
    return for_all if all(part.verdict == for_all for part in parts) else UNDECIDED


def _tested(compared: Compared) -> Part:
    """The one-sided p values of a part, by what its contrast expects."""
    effect, expect = compared.effect, compared.contrast.expect or ""
    margin = compared.contrast.margin.get(compared.measure.benchmark, 0.0)
    sign = -1.0 if (compared.higher_is_better is False) != (expect in ("worse", "not_better")) else 1.0

    def above(bound: float) -> float | None:
        """One-sided p against the effect, counted in the expected direction, being no higher than the bound."""
        p = effect.p_above(sign * bound)
        return p if p is None or sign > 0 else 1 - p

    def below(bound: float) -> float | None:
        p = above(bound)
        return None if p is None else 1 - p

    if expect == "alike":
        sides = above(-margin), below(margin)
        away = below(-margin), above(margin)
        if None in sides or None in away:
            return Part(compared, None, None)
        return Part(compared, max(p for p in sides if p is not None), min(p for p in away if p is not None))
    return Part(compared, above(-margin), below(-margin))


def claim_rows(verdicts: Sequence[Verdict], results: str) -> list[Row]:
    """Rows of claims.csv: one for each part, or one where there is none."""
    rows: list[Row] = []
    for verdict in verdicts:
        own: Row = {"claim": verdict.claim.name, "results": results, "verdict": verdict.verdict, "note": verdict.note}
        for part in verdict.parts:
            contrast = part.compared.contrast
            row = own | effect_row(part.compared) | {"part_verdict": part.verdict, "expected": contrast.expect}
            row |= {"margin": contrast.margin.get(part.compared.measure.benchmark)}
            rows.append(row | {"p_support": part.support, "p_contradict": part.contradict})
        if not verdict.parts:
            rows.append(dict.fromkeys(COLUMNS) | own | {"runs": 0})
    return rows
