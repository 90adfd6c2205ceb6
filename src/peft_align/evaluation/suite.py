"""Evaluates what is missing of one run: each checkpoint, each benchmark, each recorded as soon as it is done."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from peft_align.evaluation import harness
from peft_align.evaluation.preference import PreferenceBenchmark
from peft_align.evaluation.scores import Scores
from peft_align.grid.planner import Request
from peft_align.grid.runs import Run
from peft_align.models.adapters import loaded_adapter
from peft_align.models.loading import Base
from peft_align.models.merged import merged_model
from peft_align.models.provenance import provenance
from peft_align.store.records import atomic_write, sha256, write_json
from peft_align.store.runs import FORMAT, RunDir

SAMPLES = "samples.jsonl.gz"


@dataclass
class Suite:
    """Keeps what the evaluations of one process share."""

    preference: PreferenceBenchmark = field(default_factory=PreferenceBenchmark)

    def evaluate(self, run: Run, directory: RunDir, base: Base, requests: Sequence[Request]) -> None:
        """Do the requests of one run, an adapter loaded once for all benchmarks of its step.

        Raises:
            InputError: a benchmark's data cannot be read.
            Damaged: a checkpoint is not what its record says.
        """
        by_step = sorted(requests, key=lambda request: request.step)
        for step, group in groupby(by_step, key=lambda request: request.step):
            wanted = list(group)
            for request in wanted:
                if request.config.kind == "preference" and run.kind != "baseline":
                    self.preference.prepare_base(run, request.scoring, base)
            with opened(run, directory, base, step) as model:
                for request in wanted:
                    self._one(run, directory, base, model, request)

    def _one(self, run: Run, directory: RunDir, base: Base, model: object, request: Request) -> None:
        label = f"evaluate {request.benchmark}" + (f" at step {request.step}" if request.step else "")
        directory.report_progress(stage=label)
        started = time.time()
        if request.config.kind == "preference":

            def tick(done: int, total: int) -> None:
                spent = time.time() - started
                directory.report_progress(stage=label, step=done, of=total, eta=spent / done * (total - done))

            scores = self.preference.evaluate(run, request.scoring, base, model, tick)
        else:

            def count(done: int) -> None:
                directory.report_progress(stage=label, step=done)

            scores = harness.evaluate(request.config, request.scoring, base, model, run.config.hub.mirror, count)
        save(directory, base, request, scores, time.time() - started)


def opened(run: Run, directory: RunDir, base: Base, step: int) -> AbstractContextManager[Any]:
    """The model to evaluate: the bare base, the base with an adapter on it, or the merged model. Raises Damaged."""
    if run.kind == "merge":
        return merged_model(run, directory, base)
    return loaded_adapter(base, None if run.kind == "baseline" else directory.product(step))


def save(directory: RunDir, base: Base, request: Request, scores: Scores, seconds: float) -> None:
    """Write the samples, then the record."""
    folder = directory.evaluation(request.name)
    with (
        atomic_write(folder / SAMPLES) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
    ):
        for sample in scores.samples:
            packed.write((json.dumps(sample, ensure_ascii=False, default=str) + "\n").encode())
    path = folder / SAMPLES
    scoring = request.scoring
    paired = request.config.kind == "preference"
    write_json(
        folder / "record.json",
        {
            "format": FORMAT,
            "run": request.run_id,
            "stage": "evaluate",
            "step": request.step,
            "benchmark": request.benchmark,
            "dataset": scoring.dataset_name if paired else None,
            "preference": scoring.preference_name if paired else None,
            "metrics": [asdict(metric) for metric in scores.metrics],
            "key": request.key,
            "inputs": {"model": base.source, **scores.inputs},
            "details": scores.details,
            "files": {SAMPLES: {"size": path.stat().st_size, "sha256": sha256(path)}},
            "seconds": round(seconds, 3),
            "provenance": provenance(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
