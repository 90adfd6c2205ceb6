"""What is known of the scores of one adapter: its own, those of its cell's other seeds, its base's; from records alone.

A cell is all runs under a root that are made alike but for the seed, whichever sweeps they belong to. Only what was
evaluated under the same conditions is put side by side: the same items, template, limit, precision of the base, judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.config.validate import leaves
from peft_align.reporting.exported import Exported
from peft_align.reporting.statistics import Score, score
from peft_align.store.records import complete, read_json
from peft_align.store.runs import RunDir

Metric = tuple[str, str]  # name, part
Found = dict[Metric, Mapping[str, Any]]


@dataclass(frozen=True)
class CellScore:
    """One metric of one benchmark.

    Attributes:
        benchmark: with the part of it that is scored, if it has parts.
        value: of this adapter.
        cell: the mean over the seeds of its cell, with its interval.
        n: items.
        baseline: of the unaligned base under the same conditions; None where it was not evaluated so.
        bound: the one-sided 95% bound of this adapter's rate, if that is 0 or 1.
    """

    benchmark: str
    judge: str | None
    metric: str
    value: float
    cell: Score
    n: int
    higher_is_better: bool | None
    baseline: float | None
    bound: float | None


def cell_scores(adapter: Exported, shown: Mapping[str, list[str]]) -> list[CellScore]:
    """Every score of an adapter, those on the validation split aside.

    Args:
        adapter: the run's.
        shown: metrics of a benchmark that count; of one that is not in it, all.
    """
    root = adapter.directory.root
    known = identities(root)
    own_cell = cell_of(adapter.directory.id, known)
    seeds = [run for run in known if run != adapter.directory.id and cell_of(run, known) == own_cell]
    others = [found for run in seeds for found in [_at_step(RunDir(root, run), adapter)] if found]
    bases = [scored(RunDir(root, run), None, None) for run, identity in known.items() if identity["kind"] == "baseline"]
    best: dict[tuple[str, str | None, str], CellScore] = {}
    own = scored(adapter.directory, adapter.digest, adapter.step)
    for conditions, (benchmark, judge, metrics) in own.items():
        of_base = [base[plain][2] for base in bases if (plain := _of_base(conditions)) in base]
        parts = any(not part for _, part in metrics)
        for (name, part), metric in metrics.items():
            wanted = shown.get(benchmark.partition("/")[0], ["*"])
            if (parts and part) or not ("*" in wanted or name.partition(",")[0] in wanted) or not _finite(metric):
                continue
            same = [metrics_of[name, part] for run in others if (metrics_of := _metrics(run, conditions, (name, part)))]
            same = [metric, *filter(_finite, same)]
            mean = score([float(m["value"]) for m in same], [m["stderr"] for m in same])
            base = next((found[name, part]["value"] for found in of_base if (name, part) in found), None)
            label = f"{benchmark}/{part}" if part else benchmark
            value, better = float(metric["value"]), metric["higher_is_better"]
            one = CellScore(label, judge, name, value, mean, int(metric["n"]), better, base, metric.get("bound"))
            key = (label, judge, name)
            if key not in best or one.n > best[key].n:  # a quick look at a few items does not stand for the whole
                best[key] = one
    return sorted(best.values(), key=lambda one: (one.benchmark, one.judge or ""))


def identities(root: Path) -> dict[str, Mapping[str, Any]]:
    """run.json of every run under a root that has one, by id."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted((root / "runs").glob("*/run.json")):
        identity = read_json(path)
        if identity is not None and isinstance(identity.get("config"), dict) and "kind" in identity:
            found[path.parent.name] = identity
    return found


def cell_of(run_id: str, known: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What makes a run but for its seed, as text; None if that is not known of it or of a run that it was made from."""
    identity = known.get(run_id)
    if identity is None:
        return None
    config = identity["config"]
    parents = [cell_of(str(parent), known) for parent in identity.get("parents", ())]
    if None in parents:
        return None
    content: dict[str, Any] = {"kind": identity["kind"], "parents": parents, "base": config.get("base")}
    for key, leaf in leaves().items():
        if leaf.scientific and key != "seed":
            content[key] = _at(config, key)
    model = config.get("model")
    if isinstance(model, Mapping) and model.get("source") == "random":
        content["shape"] = model.get("shape")
    return json.dumps(content, sort_keys=True, default=str)


def _at(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _at_step(directory: RunDir, adapter: Exported) -> dict[str, tuple[str, str | None, Found]]:
    """The scores of another seed at the same step; empty if it is not there."""
    if adapter.kind == "merge":
        merged = directory.merge_record()
        return scored(directory, str(merged["digest"]), None) if merged else {}
    own = ((directory.train_record() or {}).get("checkpoints") or {}).get(str(adapter.step))
    return scored(directory, str(own["digest"]), adapter.step) if own else {}


def scored(directory: RunDir, adapter: str | None, step: int | None) -> dict[str, tuple[str, str | None, Found]]:
    """The evaluations and judgements of one adapter that are whole: by their conditions, benchmark, judge and metrics.

    Args:
        directory: the run's.
        adapter: its digest; None: of a base.
        step: of the training; None: of what has none.
    """
    found: dict[str, tuple[str, str | None, Found]] = {}
    records = list(_records(directory))
    several = len({record["dataset"] for record, _, _ in records if record["dataset"]}) > 1
    for record, key, judge in records:
        evaluated = key.get("evaluation", key)
        rest = {name: value for name, value in evaluated.items() if name != "adapter"}
        wrong_step = step is not None and record["step"] != step
        if evaluated.get("adapter") != adapter or wrong_step or evaluated.get("split", "test") != "test":
            continue
        judged = {name: key[name] for name in ("judge", "protocol") if name in key}
        conditions = json.dumps({**judged, "of": rest}, sort_keys=True)
        is_merge = (evaluated.get("base") or {}).get("weights") is not None  # its inputs may be aligned to several
        pairs = f"{record['dataset']}_{record['preference']}" if several else record["preference"]
        of_pairs = f"/{pairs}" if is_merge and record["preference"] else ""
        metrics = {(str(m["name"]), str(m["part"])): m for m in record["metrics"]}
        found[conditions] = (f"{record['benchmark']}{of_pairs}", judge, metrics)
    return found


def _records(directory: RunDir) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], str | None]]:
    """Evaluations whose files are there, and judgements of just those texts; with their keys and judges."""
    for folder in sorted((directory.path / "evaluations").glob("*")):
        record = directory.evaluation_record(folder.name)
        if record is None or complete(folder, record["files"]):
            continue
        yield record, record["key"], None
        for place in sorted((folder / "judgements").glob("*")):
            judged = directory.judgement_record(folder.name, place.name)
            if judged and judged["samples"] == record["files"] and not complete(place, judged["files"]):
                yield judged, judged["key"], str(judged["judge"])


def _of_base(conditions: str) -> str:
    """The conditions under which the unaligned base has the same scored: of a merge, its weights are plain ones."""
    content = json.loads(conditions)
    base = content["of"].get("base")
    if isinstance(base, dict) and "dequantized" not in str(base.get("weights", "")):
        base.pop("weights", None)
    return json.dumps(content, sort_keys=True)


def _metrics(run: Mapping[str, tuple[str, str | None, Found]], conditions: str, metric: Metric) -> Found | None:
    metrics = run[conditions][2] if conditions in run else {}
    return metrics if metric in metrics else None


def _finite(metric: Mapping[str, Any]) -> bool:
    return math.isfinite(metric["value"])
