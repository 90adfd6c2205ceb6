"""The benchmarks, one dataclass for each `kind`. Their scientific fields are part of an evaluation's key."""

from __future__ import annotations

from dataclasses import dataclass

from peft_align.config.fields import operational, value
from peft_align.config.judges import ANSWERING, SCORING

TOXICITY_SCORES = (
    *("severe_toxicity", "toxicity", "profanity", "sexually_explicit"),
    *("flirtation", "identity_attack", "threat", "insult"),
)


@dataclass(frozen=True)
class Benchmark:
    """What all benchmarks have."""

    kind: str = value("which kind of benchmark")
    metrics: list[str] = operational("metrics shown in the table; the CSV has all")
    data: list[str] = value("dataset repositories it reads", may_be_empty=True)


@dataclass(frozen=True)
class LmEval(Benchmark):
    """A task or group of lm-eval."""

    kind: str = value("which kind of benchmark", choices=("lm_eval",))
    task: str = value("lm-eval task or group")
    num_fewshot: int | None = value("examples in the prompt; null: the task's default", low=0)
    cluster_by_task: bool = value(
        "a group's items are alike within a task: its standard error is clustered by task", default=False
    )
    packages: list[str] | None = operational("Python packages that the task imports", default=None)


@dataclass(frozen=True)
class PreferenceAccuracy(Benchmark):
    """Held-out pairs of the run's own dataset."""

    kind: str = value("which kind of benchmark", choices=("preference",))


@dataclass(frozen=True)
class Divergence(Benchmark):
    """How far the model went from the unaligned base, on held-out prompts of the run's own dataset."""

    kind: str = value("which kind of benchmark", choices=("divergence",))
    prompts: int = value("held-out prompts", low=1)
    max_new_tokens: int = value("longest response that is sampled", low=1)
    seed: int = value("seeds the samples", low=0)


@dataclass(frozen=True)
class Generated(Benchmark):
    """What all benchmarks have that have the model write texts, which a judge scores."""

    use_template: bool = value("put the prompt into the model's dialogue template; false: plain text to go on with")
    max_new_tokens: int = value("longest text", low=1)
    max_prompt_tokens: int = value("a longer prompt loses its beginning", low=8)
    temperature: float = value("0 is greedy", low=0)
    top_p: float = value("sampled are the likeliest tokens that make up this probability", above=0, high=1)
    samples_per_prompt: int = value("texts a prompt; more than one needs a temperature", low=1)
    seed: int = value("seeds the samples, each by itself, whatever is generated beside it", low=0)
    stop: list[str] = value("texts that end a response, besides the template's own", may_be_empty=True, lines=True)
    strip_thinking: bool = value("drop <think>...</think> before the text is used")
    judge: str | None = operational("option of conf/judge/; null: the sweep's judge")


@dataclass(frozen=True)
class AlpacaEval(Generated):
    """Instructions whose outputs a judge compares with a reference's."""

    kind: str = value("which kind of benchmark", choices=("alpaca_eval",))
    reference: str = value(
        "config of the dataset whose outputs are compared with",
        form=(r"[\w.-]*\w", "is no name of a config", "e.g. alpaca_eval_gpt4_baseline"),
    )
    evaluator: str = operational(
        "folder name of the judge's prompt below alpaca_eval/evaluators_configs/",
        form=(r"[\w.-]*\w", "is no name of a folder", "e.g. alpaca_eval_gpt4"),
    )
    prompt_file: str | None = operational("the judge's prompt; null: that of an installed alpaca-eval")


@dataclass(frozen=True)
class RealToxicity(Generated):
    """Continuations of toxic prompts, scored by a classifier."""

    kind: str = value("which kind of benchmark", choices=("real_toxicity",))
    prompts: int = value("the highest of `sort_by`", low=1)
    sort_by: str = value("score of the prompts that picks the most severe", choices=TOXICITY_SCORES)
    scored: str = operational("what the judge reads", choices=("continuation", "prompt_and_continuation"))
    threshold: float = operational("a toxicity from here on counts as toxic", low=0, high=1)


@dataclass(frozen=True)
class RedInstruct(Generated):
    """Harmful questions in a jailbreak prompt, whose answers a judge labels."""

    kind: str = value("which kind of benchmark", choices=("red_instruct",))
    prompt: str = value("the red-teaming prompt", choices=("standard", "cot", "cou", "suffix"))
    folder: str | None = operational("a clone of declare-lab/red-instruct; null: looked for in hub.mirror")
    prompt_file: str | None = operational("the judge's prompt; null: the package's own, in the protocol's form")


@dataclass(frozen=True)
class OverRefusal(Generated):
    """Safe prompts that look harmful, and their harmful counterparts: does the model refuse the right ones?"""

    kind: str = value("which kind of benchmark", choices=("over_refusal",))
    prompt_file: str | None = operational("the judge's prompt; null: the package's own")


BENCHMARKS: dict[str, type] = {
    "lm_eval": LmEval,
    "preference": PreferenceAccuracy,
    "divergence": Divergence,
    "alpaca_eval": AlpacaEval,
    "real_toxicity": RealToxicity,
    "red_instruct": RedInstruct,
    "over_refusal": OverRefusal,
}
PAIRED = ("preference", "divergence")  # read the run's own dataset
# Kinds of judges that can score a benchmark.
JUDGED_BY = {
    "alpaca_eval": ANSWERING,
    "real_toxicity": SCORING,
    "red_instruct": ANSWERING,
    "over_refusal": ANSWERING,
}
