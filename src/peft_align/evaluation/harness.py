"""lm-eval 0.4.13 on a model that is loaded already. Its own answer cache is never used: its key holds no adapter."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable
from typing import Any

import datasets

from peft_align.config.benchmarks import LmEval
from peft_align.errors import Fault, InputError
from peft_align.evaluation.lm_eval_tasks import Tasks, mirrored_datasets, set_seeds
from peft_align.evaluation.scores import Metric, Scores, clustered_error
from peft_align.grid.runs import Scoring
from peft_align.models.loading import Base
from peft_align.models.prefix_scoring import log_likelihoods, try_attention, why_not_shared
from peft_align.terminal import say

BOOTSTRAP_ITERATIONS = 1000  # for metrics whose standard error has no closed form


def counting_model(model: Any, base: Base, batch_size: int, batch_tokens: int, tick: Callable[[int], None]) -> Any:
    """lm-eval's HFLM around a loaded model: tells how many sequences it has done, computes shared prefixes once.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        base: for its tokenizer, and for what that has encoded before.
        batch_size: texts that are generated at a time.
        batch_tokens: tokens of a forward pass where continuations are scored (models/prefix_scoring.py).
        tick: called with the number of sequences done.
    """
    from lm_eval.models.huggingface import HFLM

    class CountingHFLM(HFLM):  # type: ignore[misc]
        done = 0
        told: str | None = None
        attention: str | None = None

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            known, asked = base.shared.encoded, (context, continuation)
            if asked not in known:
                ids = super()._encode_pair(context, continuation)
                known[asked] = array("i", ids[0]), array("i", ids[1])  # of some bytes a token; a list takes many
            before, after = known[asked]
            return before.tolist(), after.tolist()

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            asked = [(context, continuation) for _, context, continuation in requests]
            longest = max((len(context) + len(continuation) - 1 for context, continuation in asked), default=0)
            why = why_not_shared(self.model, min(longest, self.max_length))
            if why is None:
                self.attention = base.shared.attention.get("evaluation") or self._attention(asked)
                base.shared.attention["evaluation"] = self.attention
                return log_likelihoods(
                    self.model, asked, self.max_length, batch_tokens, self._count, attention=self.attention
                )
            if why != self.told:
                say(f"warning: lm-eval computes what texts share anew for each of them: {why}", flush=True)
                self.told = why
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
            return found

        def _attention(self, asked: Any) -> str:
            """The faster way on a GPU."""
            if self.device.type == "cpu":
                return "parts"
            trial = try_attention(self.model, asked, self.max_length, batch_tokens)
            say(trial, flush=True)
            return trial.chosen

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            result = super()._model_call(inps, *args, **kwargs)
            self._count(len(inps))
            return result

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            result = super()._model_generate(context, *args, **kwargs)
            self._count(len(context))
            return result

        def _count(self, more: int) -> None:
            self.done += more
            tick(self.done)

    return CountingHFLM(
        pretrained=model,
        tokenizer=base.tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # as with shared prefixes; lm-eval's default is the model's precision
    )


def evaluate(
    benchmark: LmEval,
    scoring: Scoring,
    base: Base,
    model: Any,
    mirror: str | None,
    tasks: Tasks,
    tick: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score `model` on an lm-eval task or group.

    Args:
        benchmark: which task, with how many examples in the prompt.
        scoring: how many samples a task, and the batch sizes.
        base: for its tokenizer, and for what that has encoded before.
        model: the base with or without an adapter; or an lm-eval model that is that.
        mirror: folder that is looked into before the hub.
        tasks: that were loaded before.
        tick: called with the number of sequences done.

    Raises:
        InputError: the task's data is neither in the mirror nor reachable.
    """
    import lm_eval
    from lm_eval.api.model import LM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluation = scoring.evaluation
    wrapped = model
    if not isinstance(model, LM):
        wrapped = counting_model(model, base, evaluation.batch_size, evaluation.batch_tokens, tick)
    set_seeds()
    try:
        loaded = tasks.get(benchmark, scoring, mirror)
        with mirrored_datasets(mirror, loaded.read):
            results = lm_eval.evaluate(
                wrapped, loaded.tasks, limit=evaluation.limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True
            )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        what = f"its data cannot be read: {' '.join(str(error).split())[:300]}"
        raise InputError([Fault(f"benchmark {benchmark.task}", what, "set hub.mirror=DIR, or be online")]) from None
    assert results is not None
    metrics = _metrics(benchmark.task, results, benchmark.cluster_by_task)
    return Scores(
        metrics, _samples(results), loaded.read, _details(results) | {"attention": getattr(wrapped, "attention", None)}
    )


def _metrics(task: str, results: dict[str, Any], clustered: bool) -> list[Metric]:
    """The task's own numbers; for a tag, which has none, those of its tasks."""
    if task in results["results"]:
        return _of_one(task, results, "", clustered)
    return [metric for part in results["results"] for metric in _of_one(part, results, part, clustered)]


def _of_one(task: str, results: dict[str, Any], part: str, clustered: bool) -> list[Metric]:
    found = []
    values = results["results"][task]
    leaves = [leaf for leaf in _leaves(task, results) if leaf in results["n-samples"]]
    n = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
    filters = {key.partition(",")[2] for key in values if "," in key}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        shown = name if len(filters) == 1 else f"{name},{filtered}"
        error = float(stderr) if isinstance(stderr, (int, float)) else None
        if clustered and len(leaves) > 1:
            clustered_one = _over_leaves(leaves, name, filtered, float(value), results)
            error = error if clustered_one is None else clustered_one
        found.append(Metric(shown, float(value), error, n, _better(name, [task, *leaves], results), part))
    return found


def _over_leaves(leaves: list[str], metric: str, filtered: str, value: float, results: dict[str, Any]) -> float | None:
    """The standard error of a group's mean, clustered by its tasks; None if the mean is not that of its items."""
    scored = [
        (float(sample[metric]), leaf)
        for leaf in leaves
        for sample in results.get("samples", {}).get(leaf, [])
        if sample.get("filter", "none") == filtered and isinstance(sample.get(metric), (int, float))
    ]
    values, clusters = [v for v, _ in scored], [leaf for _, leaf in scored]
    if not values or not math.isclose(math.fsum(values) / len(values), value, abs_tol=1e-9):
        return None
    return clustered_error(values, clusters)


def _better(metric: str, tasks: list[str], results: dict[str, Any]) -> bool | None:
    """Whether higher is better: as the task says, or for a group, which says nothing, as its first task does."""
    said = (results.get("higher_is_better", {}).get(task, {}).get(metric) for task in tasks)
    return next((better for better in said if better is not None), None)


def _leaves(task: str, results: dict[str, Any]) -> list[str]:
    children = results.get("group_subtasks", {}).get(task, [])
    return [leaf for child in children for leaf in _leaves(child, results)] if children else [task]


def _samples(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each sample with its answers and scores; the prompt by its hash, as few-shot prompts repeat the examples."""
    keep = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "resps", "filtered_resps")
    return [
        {
            "task": task,
            **{key: sample[key] for key in keep if key in sample},
            **{metric: sample[metric] for metric in sample.get("metrics", [])},
            "doc": sample["doc"],
        }
        for task, samples in results.get("samples", {}).items()
        for sample in samples
    ]


def _details(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "versions": results.get("versions", {}),
        "n_shot": results.get("n-shot", {}),
        "subtasks": {
            task: {k: v for k, v in values.items() if isinstance(v, (int, float))}
            for task, values in results["results"].items()
        },
    }
