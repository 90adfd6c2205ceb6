"""The judge stage: scores the texts that were generated, with a judge that is opened once for many runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align.config.benchmarks import RealToxicity
from peft_align.config.identity import short_hash, slug
from peft_align.config.judges import SCORING, Classifier, judge_label
from peft_align.data.pairs import Message
from peft_align.errors import InputError
from peft_align.evaluation import real_toxicity
from peft_align.evaluation.generated import GENERATED
from peft_align.evaluation.judges import Answers, open_scorer
from peft_align.evaluation.records import read_samples, record_of, save
from peft_align.evaluation.scores import Scores
from peft_align.grid.benchmarks import judge_prompt, no_prompt
from peft_align.grid.planner import Judgement, judge_identity
from peft_align.grid.runs import Run
from peft_align.store.runs import RunDir


@dataclass
class Judging:
    """Keeps the judges that a process has opened."""

    root: Path
    _scorers: dict[str, Any] = field(default_factory=dict)
    _answers: dict[str, Answers] = field(default_factory=dict)

    def judge(self, run: Run, directory: RunDir, wanted: Sequence[Judgement]) -> None:
        """Judge the texts of a run, each judgement recorded as soon as it is done.

        Raises:
            InputError: a judge's model or prompt cannot be had.
            JudgeUnavailable: an API gives no answers; what it answered before is kept.
            Damaged: the texts are not what their record says.
        """
        for judgement in wanted:
            self._one(run, directory, judgement)

    def _one(self, run: Run, directory: RunDir, judgement: Judgement) -> None:
        request, config = judgement.request, judgement.request.config
        label = f"judge {request.benchmark}" + (f" at step {request.step}" if request.step else "")
        directory.report_progress(stage=f"{label} by {judgement.option}")
        started = time.monotonic()
        evaluated = directory.evaluation_record(request.name)
        assert evaluated is not None
        samples = read_samples(directory.evaluation(request.name), evaluated)
        mirror = run.config.hub.mirror
        if judgement.judge.kind in SCORING:
            assert isinstance(config, RealToxicity)
            score = self._scorer(judgement, mirror)
            better = isinstance(judgement.judge, Classifier) and judgement.judge.higher_is_better
            scores = real_toxicity.judge(config, samples, score, higher_is_better=better)
        else:
            prompt = judge_prompt(config)
            if prompt is None:
                raise InputError([no_prompt(request.benchmark, config)])
            answers = self._asked(judgement, mirror)

            def tick(done: int, total: int) -> None:
                directory.report_progress(stage=f"{label} by {judgement.option}", step=done, of=total)

            def ask(dialogues: Sequence[list[Message]]) -> list[str | None]:
                return answers.ask(dialogues, tick)

            answers.details()  # what an attempt that failed before was told is not this judging's
            scores = GENERATED[config.kind].judge(config, samples, prompt, ask)
            scores.details = answers.details() | _warning(judgement, scores)
        self._save(run, directory, judgement, scores, evaluated, time.monotonic() - started)

    def _save(
        self,
        run: Run,
        directory: RunDir,
        judgement: Judgement,
        scores: Scores,
        evaluated: dict[str, Any],
        seconds: float,
    ) -> None:
        directory.check()
        content = record_of(run, judgement.request, seconds) | {
            "stage": "judge",
            "judge": judge_label(judgement.option, judgement.judge),
            "dataset": None,
            "preference": None,
            "key": judgement.key,
            "samples": evaluated["files"],
        }
        save(directory.judgement(judgement.request.name, judgement.name), scores, content)

    def _scorer(self, judgement: Judgement, mirror: str | None) -> Any:
        key = repr((judgement.judge, mirror))
        if key not in self._scorers:
            self._scorers = {key: open_scorer(judgement.judge, mirror)}  # one at a time is in memory
        return self._scorers[key]

    def _asked(self, judgement: Judgement, mirror: str | None) -> Answers:
        key = repr((judgement.judge, mirror))
        if key not in self._answers:
            name = f"{slug([judgement.option])}-{short_hash(repr(judge_identity(judgement.judge)))}"
            self._answers = {key: Answers(judgement.judge, self.root / "judges" / name, mirror)}
        return self._answers[key]


def _warning(judgement: Judgement, scores: Scores) -> dict[str, Any]:
    """A line for people where none of a judge's answers could be read, with one of them."""
    if any(metric.name not in ("unlabelled_rate", "failed_rate") for metric in scores.metrics) or not scores.samples:
        return {}
    example = next((" ".join(s["answer"].split())[:100] for s in scores.samples if s["answer"]), None)
    label, n = judge_label(judgement.option, judgement.judge), len(scores.samples)
    told = f"e.g. '{example}'" if example else "it refuses or says nothing"
    what = f"none of its {n} answers has the form that its prompt asks for, {told}"
    return {"warning": f"{judgement.request.benchmark} by {label}: {what}: its model or prompt_file may be wrong"}
