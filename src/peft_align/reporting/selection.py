"""The best values found by a search: which combination of settings did best on the validation split, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from peft_align.config.schema import MAIN_AXES
from peft_align.errors import Fault, InputError, suggest
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run, Sweep, value
from peft_align.store.records import atomic_write, sealed_text
from peft_align.store.runs import RunDir

BENCHMARK = "preference"
# What decides, by kind of method: the first measure, then the next between equals; and whether higher is better.
CRITERIA: dict[str, tuple[tuple[str, bool], ...]] = {
    "sft": (("response_loss", False),),
    "dpo": (("reward_accuracy", True), ("dpo_loss", False)),
}


@dataclass(frozen=True)
class Candidate:
    """One combination of settings within one group.

    Attributes:
        group: the values of the axes that are selected by.
        settings: the values that compete.
        scores: the mean of each measure that decides over the runs, in the order in which they do.
        runs: how many.
    """

    group: dict[str, Any]
    settings: dict[str, Any]
    scores: dict[str, float]
    runs: int
    chosen: bool = False


def select(sweep: Sweep, items: Sequence[Item], root: Path, by: Sequence[str]) -> list[Candidate]:
    """Every candidate, best first within its group.

    Args:
        sweep: a search: it varies settings besides the axes that all grids have.
        items: the state of its runs.
        root: where they lie.
        by: axes whose values each get their own choice; over all others, the mean decides.

    Raises:
        InputError: `by` names no axis, nothing is varied, runs are missing, or they cannot be compared.
    """
    settings = [key for key in sweep.axis_keys if key not in (*MAIN_AXES, "seed", "merge", "inputs", *by)]
    runs = [item.run for item in items if item.run.kind == "train" and not item.run.is_parent_only]
    _check(sweep, items, runs, by, settings)
    groups: dict[str, dict[str, list[Run]]] = {}
    scored = {item.run.id: item for item in items}
    for run in runs:
        group, own = (_present(run, keys) for keys in (by, settings))
        groups.setdefault(repr(group), {}).setdefault(repr(own), []).append(run)
    found: list[Candidate] = []
    for competing in groups.values():
        _check_fair(list(competing.values()), by, settings)
        kind = next(iter(competing.values()))[0].config.method.kind
        candidates = []
        for members in competing.values():
            measured = [_scores(scored[run.id], root) for run in members]
            means = {name: statistics.fmean(scores[name] for scores in measured) for name, _ in CRITERIA[kind]}
            first = members[0]
            candidates.append(Candidate(_present(first, by), _present(first, settings), means, len(members)))
        candidates.sort(key=lambda c: _order(kind, c.scores))
        best = candidates[0]
        found += [Candidate(best.group, best.settings, best.scores, best.runs, chosen=True), *candidates[1:]]
    return found


def _check(sweep: Sweep, items: Sequence[Item], runs: Sequence[Run], by: Sequence[str], settings: list[str]) -> None:
    faults = [
        Fault(f"select.by={key}", "is no axis of this sweep", suggest(key, [*sweep.axis_keys, "seed"]))
        for key in by
        if key not in (*sweep.axis_keys, "seed")
    ]
    if not settings:
        axes = ", ".join(by) or "nothing"
        faults.append(
            Fault("select.by", f"nothing is left to select: besides {axes}, no setting varies", "e.g. +grid=rank")
        )
    kinds = {run.config.method.kind for run in runs}
    if len(kinds) > 1 and "method" not in by:
        measured = "; ".join(f"{kind} by {CRITERIA[kind][0][0]}" for kind in sorted(kinds))
        faults.append(Fault("select.by", f"methods are measured differently ({measured})", "add method to select.by"))
    scored = [s for run in runs for s in run.scorings if BENCHMARK in dict(s.benchmarks)]
    if not scored:
        faults.append(
            Fault("evaluation.benchmarks", f"does not have {BENCHMARK}, which decides", "add it to the search")
        )
    elif any(s.evaluation.heldout_split != "validation" for s in scored):
        hint = "set evaluation.heldout_split=validation for the search"
        faults.append(Fault("evaluation.heldout_split", "a choice by the test split is no choice", hint))
    lacking = sum(not item.done for item in items)
    if lacking and not faults:
        what = f"{lacking} of its {len(items)} runs are not done"
        faults.append(Fault(sweep.name, what, "finish it first: python -m peft_align.sweep with the same words"))
    if faults:
        raise InputError(faults)


def _check_fair(competing: Sequence[Sequence[Run]], by: Sequence[str], settings: Sequence[str]) -> None:
    """Candidates are compared over the same cells."""
    others = [key for key in (*MAIN_AXES, "seed") if key not in (*by, *settings)]
    places = [sorted(repr([_place(run, key) for key in others]) for run in runs) for runs in competing]
    if any(place != places[0] for place in places):
        sizes = ", ".join(sorted({str(len(place)) for place in places}))
        what = f"the candidates were not tried on the same cells (they have {sizes} runs)"
        raise InputError([Fault("select", what, f"narrow {', '.join(others)} to what all of them have")])


def _place(run: Run, key: str) -> Any:
    return run.config.seed if key == "seed" else run.choices[key]


def _present(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """The run's values of the keys that it has: method.beta is DPO's alone."""
    return {key: found for key in keys if (found := value(run, key)) is not None}


def _order(kind: str, scores: dict[str, float]) -> list[float]:
    """What candidates are sorted by, the best first; a run that diverged comes last."""
    signed = [-scores[name] if higher else scores[name] for name, higher in CRITERIA[kind]]
    return [math.inf if math.isnan(v) else v for v in signed]


def _scores(item: Item, root: Path) -> dict[str, float]:
    """The measures of a run's last checkpoint on the validation split, as this search asks for them."""
    last = item.run.config.train.max_steps
    for request in item.requests:
        if request.benchmark == BENCHMARK and request.step == last and request.key is not None:
            record = RunDir(root, item.run.id).evaluation_record(request.name)
            if record is not None:
                found = {metric["name"]: metric["value"] for metric in record["metrics"]}
                for name, _ in CRITERIA[item.run.config.method.kind]:
                    if name not in found:
                        what, hint = (
                            f"its score of {BENCHMARK} has no {name}",
                            "delete its folder, and evaluate it again",
                        )
                        raise InputError([Fault(f"{item.run.id}: {request.name}", what, hint)])
                return found
    raise InputError([Fault(item.run.id, f"has no score of {BENCHMARK} at step {last} on the validation split")])


def write_selection(path: Path, candidates: Sequence[Candidate], command: Sequence[str]) -> None:
    """Write the choice as a `when` list, which +selected=PATH includes, with the table behind it."""
    chosen = [c for c in candidates if c.chosen]
    content = {
        "selected_by": " ".join(command),
        "when": [{"where": c.group, "set": c.settings} for c in chosen],
        "table": [{**c.group, **c.settings, **c.scores, "runs": c.runs, "chosen": c.chosen} for c in candidates],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(sealed_text(OmegaConf.to_yaml(OmegaConf.create(content))), encoding="utf-8")
