"""Evaluates what is missing of one run: each checkpoint, each benchmark, each recorded as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from peft_align.config.benchmarks import PAIRED, Benchmark, Divergence, Generated, LmEval
from peft_align.evaluation import harness
from peft_align.evaluation.generated import GENERATED
from peft_align.evaluation.lm_eval_tasks import Tasks
from peft_align.evaluation.preference import PreferenceBenchmark
from peft_align.evaluation.records import record_of, save
from peft_align.evaluation.scores import Scores
from peft_align.evaluation.texts import Data, generate_samples
from peft_align.evaluation.vllm_model import Engine
from peft_align.grid.planner import Request
from peft_align.grid.runs import Run
from peft_align.models.adapters import loaded_adapter
from peft_align.models.loading import Base
from peft_align.models.merged import merged_model
from peft_align.store.journal import Journal
from peft_align.store.runs import UNFINISHED, RunDir

Tick = Callable[[int, int], None]


@dataclass
class Suite:
    """Keeps what the evaluations of one process share."""

    preference: PreferenceBenchmark = field(default_factory=PreferenceBenchmark)
    _data: dict[str, Data] = field(default_factory=dict)
    _tasks: Tasks = field(default_factory=Tasks)
    _vllm: Engine = field(default_factory=Engine)

    def evaluate(self, run: Run, directory: RunDir, base: Base, requests: Sequence[Request]) -> None:
        """Do the requests of one run on one base, an adapter loaded once for all benchmarks of its step.

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
            on_base: list[Callable[[], None]] = []  # what is left to do when the adapter is off again
            with opened(run, directory, base, step) as model:
                for request in wanted:
                    later = self._one(run, directory, base, model, request)
                    on_base += [later] if later else []
            for finish in on_base:
                finish()

    def _one(self, run: Run, directory: RunDir, base: Base, model: Any, request: Request) -> Callable[[], None] | None:
        """One benchmark; what it returns is to be done on the bare base."""
        label = f"evaluate {request.benchmark}" + (f" at step {request.step}" if request.step else "")
        directory.report_progress(stage=label)
        started = time.monotonic()
        before: list[int] = []

        def tick(done: int, total: int) -> None:
            before.append(done) if not before else None  # what an earlier attempt had done tells nothing of the speed
            fresh, spent = done - before[0], time.monotonic() - started
            eta = spent / fresh * (total - done) if fresh else None
            directory.report_progress(stage=label, step=done, of=total, eta=eta)

        def record(scores: Scores) -> None:
            directory.check()
            folder = directory.evaluation(request.name)
            content = record_of(run, request, time.monotonic() - started) | {
                "stage": "evaluate",
                "dataset": request.scoring.dataset_name if request.config.kind in PAIRED else None,
                "preference": request.scoring.preference_name if request.config.kind in PAIRED else None,
                "key": request.key,
                "inputs": {"model": base.source, **scores.inputs},
            }
            save(folder, scores, content)

        config = request.config
        if isinstance(config, Divergence):
            return self._divergence(run, directory, base, model, request, tick, record)
        if isinstance(config, Generated):
            self._generated(run, directory, base, model, request, tick, record)
        elif isinstance(config, LmEval):

            def count(done: int) -> None:
                directory.report_progress(stage=label, step=done)

            if request.scoring.evaluation.backend == "vllm":
                precision, adapter = request.scoring.base.base_precision, adapter_of(run, directory, request.step)
                model = self._vllm.with_adapter(base, precision, adapter)
            mirror = run.config.hub.mirror
            record(harness.evaluate(config, request.scoring, base, model, mirror, self._tasks, count))
        else:
            record(self.preference.evaluate(run, request.scoring, base, model, tick))
        return None

    def _generated(
        self,
        run: Run,
        directory: RunDir,
        base: Base,
        model: Any,
        request: Request,
        tick: Tick,
        record: Callable[[Scores], None],
    ) -> None:
        config, evaluation = shortened(request), request.scoring.evaluation
        assert isinstance(config, Generated)
        module, mirror = GENERATED[config.kind], run.config.hub.mirror
        place = repr((config, mirror))
        if place not in self._data:
            self._data[place] = module.data(config, mirror)
        data = self._data[place]
        samples, journal = generate_samples(
            config,
            data.questions[: evaluation.limit],
            base,
            model,
            run.config.model.template,
            evaluation.batch_size,
            lambda head: Journal(directory.evaluation(request.name) / UNFINISHED, head),
            tick,
        )
        scores: Scores = module.scores(config, samples, f"{run.id}/{request.step}" if request.step else run.id)
        scores.inputs = data.inputs
        record(scores)
        journal.remove()

    def _divergence(
        self,
        run: Run,
        directory: RunDir,
        base: Base,
        model: Any,
        request: Request,
        tick: Tick,
        record: Callable[[Scores], None],
    ) -> Callable[[], None]:
        from peft_align.evaluation.divergence import draw, score

        config, evaluation = shortened(request), request.scoring.evaluation
        assert isinstance(config, Divergence)
        heldout = self.preference.heldout(run, request.scoring, base)
        head = {"model": base.source["digest"], "data": heldout.source["digest"]}
        journal = Journal(directory.evaluation(request.name) / UNFINISHED, head)
        size = evaluation.batch_size
        drawn = draw(config, heldout, evaluation.limit, base, model, size, journal, tick)

        def finish() -> None:
            with loaded_adapter(base, None):
                record(score(drawn, base, size, aligned=run.kind != "baseline"))
            journal.remove()

        return finish


def shortened(request: Request) -> Benchmark:
    """The benchmark with texts no longer than the evaluation allows."""
    longest, config = request.scoring.evaluation.max_new_tokens, request.config
    if longest is None or not isinstance(config, (Generated, Divergence)):
        return config
    return replace(config, max_new_tokens=min(longest, config.max_new_tokens))


def opened(run: Run, directory: RunDir, base: Base, step: int) -> AbstractContextManager[Any]:
    """The model to evaluate: the bare base, the base with an adapter on it, or the merged model. Raises Damaged."""
    if run.kind == "merge":
        return merged_model(run, directory, base)
    return loaded_adapter(base, adapter_of(run, directory, step))


def adapter_of(run: Run, directory: RunDir, step: int) -> Path | None:
    """The folder of a run's adapter; None for a bare base. Raises Damaged."""
    if run.kind == "external":
        return Path(str(run.adapter))
    return None if run.kind == "baseline" else directory.product(step)
