"""What is done and what is missing, from the disk alone, without torch: for plan, the launcher and jobs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft_align.config.benchmarks import Benchmark, Divergence, Generated, LmEval, RealToxicity
from peft_align.config.compose import scientific
from peft_align.config.identity import base_identity, short_hash, slug
from peft_align.config.judges import Judge
from peft_align.grid import external
from peft_align.grid.benchmarks import judge_prompt, task_definition
from peft_align.grid.runs import Run, Scoring
from peft_align.store.hub import data_folder, dataset_folder, model_folder
from peft_align.store.records import Digests, complete, digest_of
from peft_align.store.runs import RunDir, damage, step_name
from peft_align.store.shapes import EVALUATION, JUDGEMENT, MERGE, TRAIN

LACKS_STEPS = "retrain for steps"
# Of what is computed for a benchmark by the package itself; another one is another key.
VERSIONS = {
    "lm_eval": 2,  # how log-probabilities are computed here; lm-eval's own version stands beside it
    "preference": 2,
    "divergence": 1,
    "alpaca_eval": 1,
    "real_toxicity": 1,
    "red_instruct": 1,
    "over_refusal": 1,
}
JUDGED_VERSIONS = {"alpaca_eval": 1, "real_toxicity": 1, "red_instruct": 1, "over_refusal": 1}


@dataclass(frozen=True)
class Request:
    """One benchmark of one checkpoint (step 0: the bare base), and by which judges its texts are judged."""

    run_id: str
    step: int
    benchmark: str
    config: Benchmark
    scoring: Scoring
    key: dict[str, Any] | None  # None while the checkpoint does not exist
    judges: tuple[tuple[str, Judge], ...] = ()

    @cached_property
    def name(self) -> str:
        """Folder name: readable, and unique by the hash of the key."""
        text = json.dumps(self.key, sort_keys=True)
        return f"{slug([self.benchmark])}-{step_name(self.step)}-{short_hash(text)}"


@dataclass(frozen=True)
class Judgement:
    """One judging of the texts of one evaluation."""

    request: Request
    option: str
    judge: Judge
    key: dict[str, Any] | None  # None while the checkpoint does not exist

    @cached_property
    def name(self) -> str:
        """Folder name: readable, and unique by the hash of the key."""
        return f"{slug([self.option])}-{short_hash(json.dumps(self.key, sort_keys=True))}"


@dataclass
class Item:
    """One run of the plan.

    Attributes:
        to_make: why its adapter or merge is to be made; None: it need not be.
        to_save: forms in which a merge is to be saved.
        requests, missing: what is evaluated, and what of it is not there, with the reason if it was once.
        judgements, unjudged: likewise what is judged.
        failure: of the last attempt.
        records: what the plan read, if it was to keep it: by the name of the evaluation ("" is the training's) and of
            the judging (None: the evaluation itself).
    """

    run: Run
    to_make: str | None = None
    to_save: tuple[str, ...] = ()
    requests: list[Request] = field(default_factory=list)
    missing: list[tuple[Request, str]] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    unjudged: list[tuple[Judgement, str]] = field(default_factory=list)
    failure: str | None = None
    records: dict[tuple[str, str | None], dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def done(self) -> bool:
        return self.to_make is None and not (self.missing or self.to_save or self.unjudged)

    @property
    def to_judge(self) -> list[Judgement]:
        """What can be judged now: its texts are there."""
        if self.to_make:
            return []
        absent = {request.name for request, _ in self.missing}
        return [judgement for judgement, _ in self.unjudged if judgement.request.name not in absent]

    @property
    def why(self) -> str:
        """What is to be done, in words; empty when nothing is."""
        parts = [self.to_make] if self.to_make else []
        parts += [f"save as {', '.join(self.to_save)}"] if self.to_save else []
        if self.missing:
            names = sorted({request.benchmark for request, _ in self.missing})
            reasons = sorted({reason for _, reason in self.missing if reason})
            parts.append(f"evaluate {', '.join(names)}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        if self.unjudged:
            named = sorted({f"{judgement.request.benchmark} by {judgement.option}" for judgement, _ in self.unjudged})
            reasons = sorted({reason for _, reason in self.unjudged if reason})
            parts.append(f"judge {', '.join(named)}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        return "; ".join(parts)


class Planner:
    """Compares runs with what lies under one root; `keep`: what it reads goes with the items, for a report."""

    def __init__(self, root: Path, mirror: str | None, *, keep: bool = False) -> None:
        self.root, self.mirror, self.keep = root, mirror, keep
        self.digests = Digests()
        self._inputs: dict[tuple[str, str], str] = {}

    def plan(self, runs: Iterable[Run]) -> list[Item]:
        """The state of every run."""
        items = [self.item(run) for run in runs]
        self.digests.save()
        return items

    def item(self, run: Run) -> Item:
        """The state of one run."""
        directory = RunDir(self.root, run.id)
        item = Item(run)
        record: dict[str, Any] | None = None
        if run.kind == "train":
            record = directory.train_record()
            self._keep(item, ("", None), record)
            item.to_make = self._to_train(run, directory, record)
        elif run.kind == "merge":
            record = directory.merge_record()
            item.to_make = self._to_merge(directory, record)
            saved = record["saved"] if record and not item.to_make else {}
            item.to_save = tuple(f for f in run.saves if not self._is_saved(run, directory, f, saved.get(f)))
        elif run.kind == "external":
            assert run.adapter is not None
            record = {"digest": external.adapter_digest(Path(run.adapter))}
        failure = directory.failure()
        item.failure = f"{failure['stage']}: {failure['reason']}" if failure else None
        lacks_only_steps = item.to_make is not None and item.to_make.startswith(LACKS_STEPS)
        for request in requests(run, record if item.to_make is None or lacks_only_steps else None):
            item.requests.append(request)
            reason = self._evaluated(item, directory, request)
            if reason is not None:
                item.missing.append((request, reason))
            for judgement in judgements(request):
                item.judgements.append(judgement)
                wrong = self._judged(item, directory, judgement) if reason is None else ""
                if wrong is not None:
                    item.unjudged.append((judgement, wrong))
        return item

    def _to_train(self, run: Run, directory: RunDir, record: Mapping[str, Any] | None) -> str | None:
        if record is None:
            return f"retrain: {told}" if (told := damage(directory.path / "train.json", TRAIN)) else "train"
        lacking = [s for s in run.steps if str(s) not in record["checkpoints"]]
        if lacking:
            return f"{LACKS_STEPS} {', '.join(map(str, lacking))}"
        for step, entry in record["checkpoints"].items():
            if wrong := complete(directory.checkpoint(int(step)), entry["files"]):
                return f"retrain: {wrong}"
        last = record["checkpoints"][str(max(map(int, record["checkpoints"])))]
        if wrong := complete(directory.adapter, last["files"]) or complete(directory.path, record["metrics"]):
            return f"retrain: {wrong}"
        changed = self._changed_parent(record) or self.changed_inputs(run, record["inputs"])
        return f"retrain: {changed}" if changed else None

    def _to_merge(self, directory: RunDir, record: Mapping[str, Any] | None) -> str | None:
        if record is None:
            return f"merge again: {told}" if (told := damage(directory.path / "merge.json", MERGE)) else "merge"
        changed = self._changed_parent(record)
        return f"merge again: {changed}" if changed else None

    def _is_saved(self, run: Run, directory: RunDir, form: str, saved: Mapping[str, Any] | None) -> bool:
        """Whether a form of a merge is there as asked, and made of the base that there is now."""
        if saved is None or saved["asked"] != asked_of(run, form):
            return False
        return not complete(directory.merged(form), saved["files"]) and not self.changed_inputs(run, saved["inputs"])

    def _changed_parent(self, record: Mapping[str, Any]) -> str | None:
        for parent, digest in record["parents"].items():
            now = adapter_digest(RunDir(self.root, parent).train_record())
            if now is not None and now != digest:
                return f"its parent {parent} changed: was {digest[:12]}, is {now[:12]}"
        return None

    def _keep(self, item: Item, name: tuple[str, str | None], record: dict[str, Any] | None) -> None:
        if self.keep and record is not None:
            item.records[name] = record

    def _evaluated(self, item: Item, directory: RunDir, request: Request) -> str | None:
        if request.key is None:
            return ""
        folder = directory.evaluation(request.name)
        record = directory.evaluation_record(request.name)
        if record is None:
            return damage(folder / "record.json", EVALUATION) or ""
        if wrong := complete(folder, record["files"]):
            return wrong
        self._keep(item, (request.name, None), record)
        return self.changed_inputs(item.run, record["inputs"], request)

    def _judged(self, item: Item, directory: RunDir, judgement: Judgement) -> str | None:
        name = judgement.request.name
        record = directory.judgement_record(name, judgement.name)
        if record is None:
            return damage(directory.judgement(name, judgement.name) / "record.json", JUDGEMENT) or ""
        samples = (directory.evaluation_record(name) or {}).get("files", {})
        if record["samples"] != samples:
            return "its texts were generated again"
        self._keep(item, (name, judgement.name), record)
        return complete(directory.judgement(name, judgement.name), record["files"])

    def changed_inputs(
        self, run: Run, inputs: Mapping[str, Mapping[str, Any]], request: Request | None = None
    ) -> str | None:
        """Which input of a record is another one now, with both digests, or None. Absent inputs are passed."""
        for name, read in inputs.items():
            folder: Path | None
            if name == "model":
                folder = model_folder(run.config.model, self.mirror)
            elif name == "data":
                dataset = request.scoring.dataset if request else run.config.dataset
                folder = dataset_folder(dataset, self.mirror)
            else:
                folder = data_folder(name, self.mirror)
            if folder is None or not read["files"]:
                continue
            now = self._digest(folder, read["files"])
            if now != read["digest"]:
                return f"{name} changed: was {read['digest'][:12]}, is {now[:12]}"
        return None

    def _digest(self, folder: Path, files: Mapping[str, Any]) -> str:
        names = tuple(sorted(files))
        key = (str(folder), "\n".join(names))
        if key not in self._inputs:
            try:
                found = {name: {"sha256": self.digests.of(folder / name)} for name in names}
                self._inputs[key] = digest_of(found)
            except OSError:
                self._inputs[key] = "missing files"
        return self._inputs[key]


def asked_of(run: Run, form: str) -> dict[str, Any]:
    """What decides how a merge is saved besides its recipe."""
    return {"save_rank": getattr(run.config.merge, "save_rank", None)} if form == "adapter" else {}


def adapter_digest(record: Mapping[str, Any] | None) -> str | None:
    """The digest of a run's last adapter, from its training record."""
    if record is None:
        return None
    return str(record["checkpoints"][str(max(map(int, record["checkpoints"])))]["digest"])


def requests(run: Run, record: Mapping[str, Any] | None) -> list[Request]:
    """What is to be evaluated of a run, once each. `record`: of its training or merge, if that is done."""
    found: dict[tuple[Any, ...], Request] = {}
    judges: dict[tuple[Any, ...], dict[tuple[str, Judge], None]] = {}  # several blocks may ask for several
    for scoring in run.scorings:
        asked = [(name, benchmark, conditions(benchmark, scoring)) for name, benchmark in scoring.benchmarks]
        base = base_identity(run.config.model, scoring.base)
        base |= {"weights": run.base_of(scoring.base)} if run.kind == "merge" else {}
        for step in scoring.steps:
            adapter = None if record is None else scored_adapter(run, record, step)
            exists = adapter is not None or run.kind == "baseline"
            for name, benchmark, content in asked:
                key = content | {"adapter": adapter, "base": base} if exists else None
                request = Request(run.id, step, name, benchmark, scoring, key)
                unique = (step, name, request.name if key else repr((content, scoring.base)))
                found.setdefault(unique, request)
                own = ((option, judge) for judged, option, judge in scoring.judges if judged == name)
                judges.setdefault(unique, {}).update(dict.fromkeys(own))
    return [
        replace(request, judges=tuple(judges[unique])) if judges[unique] else request
        for unique, request in found.items()
    ]


def conditions(benchmark: Benchmark, scoring: Scoring) -> dict[str, Any]:
    """What decides a score besides the model: the benchmark, its version, and how much of which data."""
    content: dict[str, Any] = {"benchmark": scientific(type(benchmark), benchmark)}
    if scoring.evaluation.max_new_tokens is not None and benchmark.kind != "preference":
        content["max_new_tokens"] = scoring.evaluation.max_new_tokens
    if isinstance(benchmark, LmEval):
        own = task_definition(benchmark.task, scoring.evaluation.include_path)
        if scoring.evaluation.backend != "hf":
            content["backend"] = {scoring.evaluation.backend: installed(scoring.evaluation.backend)}
        version = {"version": VERSIONS["lm_eval"], "lm_eval": installed("lm_eval"), "definition": own}
        return content | version | {"limit": scoring.evaluation.limit}
    content |= {"version": VERSIONS[benchmark.kind]}
    if isinstance(benchmark, Generated):
        return content | {"limit": scoring.evaluation.limit}
    paired = {
        "dataset": scientific(type(scoring.dataset), scoring.dataset),
        "rule": scoring.preference.rule,
        "split": scoring.evaluation.heldout_split,
        "max_length": scoring.max_length,
    }
    if isinstance(benchmark, Divergence):
        asked = min(benchmark.prompts, scoring.evaluation.heldout, scoring.evaluation.limit or benchmark.prompts)
        return content | paired | {"asked": asked}
    return content | paired | {"pairs": scoring.evaluation.heldout}


def judgements(request: Request) -> list[Judgement]:
    """How the texts of an evaluation are to be judged."""
    if not request.judges:
        return []
    own = {"evaluation": request.key, "protocol": protocol(request.config)}
    return [
        Judgement(request, option, judge, {**own, "judge": judge_identity(judge)} if request.key else None)
        for option, judge in request.judges
    ]


def judge_identity(judge: Judge) -> dict[str, Any]:
    """What makes a judge: its scientific settings, and the version of the scorer that a wheel carries."""
    scorer = {"package": installed("alt-profanity-check")} if judge.kind == "profanity" else {}
    return scientific(type(judge), judge) | scorer


def protocol(benchmark: Benchmark) -> dict[str, Any]:
    """What decides a judgement besides the texts and the judge."""
    kind: str = benchmark.kind
    own = {"version": JUDGED_VERSIONS[kind]}
    if isinstance(benchmark, RealToxicity):
        return own | {"scored": benchmark.scored, "threshold": benchmark.threshold}
    text = judge_prompt(benchmark)
    return own | {"prompt": short_hash(text, 64) if text is not None else None}


def scored_adapter(run: Run, record: Mapping[str, Any], step: int) -> str | None:
    """The digest of the adapter that is scored at a step, by what made it; None where that did not save it."""
    if run.kind != "train":
        return str(record["digest"])
    return record["checkpoints"][str(step)]["digest"] if str(step) in record["checkpoints"] else None


@functools.cache
def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
