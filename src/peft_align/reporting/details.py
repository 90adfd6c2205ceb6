"""What stands behind each run: its settings, its curves, its scores, its cost, and why it is not done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_align.config.compose import scientific
from peft_align.config.identity import base_identity
from peft_align.config.schema import GROUPS, MAIN_AXES, TRAINING_GROUPS
from peft_align.grid.planner import Item
from peft_align.grid.runs import Run
from peft_align.reporting.cost import cost_of
from peft_align.reporting.coverage import state
from peft_align.reporting.curves import points_for, read_curves
from peft_align.reporting.table import measured_on
from peft_align.reporting.told import Told, labels, number, told_of
from peft_align.terminal import shown, shown_once


def details(items: Sequence[Item], root: Path, told: Mapping[str, Told] | None = None) -> dict[str, dict[str, Any]]:
    """What is known of each run, by its id, as JSON has it; parents that the sweep only needs too.

    Each has: label, kind, state (done, failed, missing), reason (None if done), is_parent_only, config (dotted key:
    value, of what makes it the run that it is), parents (ids), curves (name: [[step, value], ...]), scores ([[step,
    benchmark, metric, value, standard error, items, judge or None], ...]), cost (see cost.cost_of), faults (what of it
    cannot be read, in words). Numbers that are not finite are None; texts are rid of secrets and of control characters.

    Args:
        items: the state of the runs.
        root: where they lie.
        told: what was read of them; None: it is read now. What `answers` could not read is told if it was called with
            the same before.
    """
    told = told_of(items, root) if told is None else told
    names = labels([item.run for item in items])
    points = points_for(sum(item.run.kind == "train" for item in items))
    plain: dict[int, dict[str, Any]] = {}  # groups that many runs share
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        run, own = item.run, told[item.run.id]
        at, reason = state(item)
        curves = _curves(own, points)
        faults = dict.fromkeys([*_damage(item), *own.faults])
        found[run.id] = {
            "label": shown(names[run.id]),
            "kind": run.kind,
            "state": at,
            "reason": shown_once(reason) if reason else None,
            "is_parent_only": run.is_parent_only,
            "config": _config(run, plain),
            "parents": list(run.parents),
            "curves": curves,
            "scores": _scores(own),
            "cost": cost_of(own),
            "faults": [shown(fault) for fault in faults],
        }
    return found


def _damage(item: Item) -> list[str]:
    """What the plan found to be damaged, or made of other files than there are now."""
    found = [item.to_make] if item.to_make and ":" in item.to_make else []
    found += [f"{request.benchmark} at step {request.step}: {why}" for request, why in item.missing if why]
    judged = ((judgement.request, judgement.option, why) for judgement, why in item.unjudged if why)
    return found + [f"{request.benchmark} at step {request.step}, judged by {by}: {why}" for request, by, why in judged]


def _config(run: Run, plain: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The options that were chosen, and the settings that make it another run than others."""
    groups: tuple[str, ...]
    chosen: tuple[str, ...]
    if run.kind == "train":
        groups, chosen = TRAINING_GROUPS, (*MAIN_AXES, "train")
    elif run.kind == "merge":
        groups, chosen = ("merge",), (*MAIN_AXES, "merge")
    else:
        groups, chosen = (), ("model",)
    found: dict[str, Any] = {key: run.choices[key] for key in chosen if key in run.choices}
    found |= {key: _plain(value) for key, value in run.axes.items() if key not in GROUPS}
    if run.kind not in ("train", "merge"):
        return found | _dotted("", base_identity(run.config.model, run.config.peft))
    for group in groups:
        node = getattr(run.config, group)
        if id(node) not in plain:  # they live as long as the runs
            plain[id(node)] = _dotted(f"{group}.", scientific(type(node), node))
        found |= plain[id(node)]
    return found | {"seed": run.config.seed}


def _dotted(before: str, node: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= _dotted(f"{before}{key}.", value)
        else:
            found[f"{before}{key}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A setting as JSON has it, its texts fit to be shown."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return shown_once(str(value))


def _curves(told: Told, points: int) -> dict[str, list[list[float | None]]]:
    """Of the training in progress if there is one that is not done, else of the last whole one."""
    if told.run.kind != "train":
        return {}
    directory, is_trained = told.directory, told.item.to_make is None
    whole, under_way = directory.path / "metrics.jsonl", directory.attempt / "metrics.jsonl"
    for path in (whole,) if is_trained else (under_way, whole):
        try:
            found, unread = read_curves(path, points)
        except FileNotFoundError:
            if is_trained:
                told.faults.append("metrics.jsonl is missing")
            continue
        except OSError as error:
            told.faults.append(f"metrics.jsonl cannot be read: {error.strerror}")
            continue
        if unread and (is_trained or unread > 1):  # of a training in progress, the last line may be half written
            told.faults.append(f"{unread} lines of metrics.jsonl cannot be read")
        if found:
            return found
    return {}


def _scores(told: Told) -> list[list[Any]]:
    found: list[list[Any]] = []
    for scored in told.scored:
        record = scored.record
        judge = record.get("judge")
        for metric in record["metrics"]:
            numbers = [number(metric.get(name)) for name in ("value", "stderr")]
            name = shown_once(str(metric["name"]))
            place = [record["step"], shown_once(measured_on(told.run, record, metric)), name]
            found.append([*place, *numbers, metric["n"], shown_once(judge) if judge else None])
    return found
