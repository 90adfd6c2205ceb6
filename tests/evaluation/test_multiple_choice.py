"""What is computed once for texts that begin alike, against lm-eval's own HFLM, answer by answer, on real tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from sweeping import expand, trained
from transformers import Gemma2Config, Gemma2ForCausalLM

from peft_align.config.benchmarks import LmEval
from peft_align.evaluation import harness
from peft_align.evaluation.lm_eval_tasks import Tasks, mirrored_datasets, task_manager
from peft_align.models.adapters import new_adapter, take_off
from peft_align.models.loading import Base, load_base

BATCH_TOKENS = 4096
# Task -> shots, questions.
TASKS = {"mmlu_anatomy": (5, 4), "truthfulqa_mc2": (None, 4), "hhh_alignment": (0, 4), "everyday_mc": (0, 30)}


@pytest.fixture(scope="module")
def base() -> Base:
    torch.set_num_threads(1)
    words = ("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "peft.compute_dtype=fp32")
    return load_base(trained(expand(*words))[0].config)


@pytest.fixture(scope="module")
def adapted(base: Base) -> Iterator[Any]:
    """The tiny model with an adapter that changes what it says."""
    peft = trained(expand("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "peft.compute_dtype=fp32"))[0]
    model = new_adapter(base, peft.config.peft)
    words = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=words) * 0.05
    model.requires_grad_(False).eval()
    yield model
    take_off(base, model)


def plain(model: Any, base: Base) -> Any:
    return HFLM(pretrained=model, tokenizer=base.tokenizer, backend="causal", batch_size=1)


def shared(model: Any, base: Base, done: list[int] | None = None) -> Any:
    ticks = done if done is not None else []
    return harness.counting_model(model, base, 1, BATCH_TOKENS, ticks.append)


def same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert len(found) == len(expected)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4, rel=1e-6)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


def asked(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("task", TASKS)
def test_answers_of_real_tasks_are_those_of_lm_eval(task: str, adapted: Any, base: Base, mirror: Path) -> None:
    shots, limit = TASKS[task]

    def answers(model: Any) -> list[tuple[float, bool]]:
        with mirrored_datasets(str(mirror)):
            results = lm_eval.simple_evaluate(
                model,
                tasks=[task],
                num_fewshot=shots,
                limit=limit,
                task_manager=task_manager(None),
                bootstrap_iters=0,
            )
        return [answer for part in results["samples"].values() for s in part for (answer,) in s["resps"]]

    expected = answers(plain(adapted, base))
    assert len(expected) > limit
    same(answers(shared(adapted, base)), expected)


@pytest.mark.acceptance
def test_all_questions_of_mmlu_have_the_log_probabilities_of_lm_eval(mirror: Path, smollm2: Path) -> None:
    """5-shot, 57 subjects, every question that the mirror has, in fp32."""
    words = ("model=smollm2_135m", "dataset=everyday", "peft=lora", "peft.compute_dtype=fp32")
    (run,) = (r for r in expand(*words, "evaluation.benchmarks=[mmlu]").runs if r.kind == "baseline")
    (scoring,) = run.scorings
    ((_, mmlu),) = scoring.benchmarks
    assert isinstance(mmlu, LmEval)
    requests: list[Instance] = []
    for task in Tasks().get(mmlu, scoring, str(mirror)).tasks["tasks"].values():
        task.build_all_requests()
        requests += task.instances
    assert len(requests) == 4 * 1140
    real = load_base(run.config)
    expected, found = (model.loglikelihood(requests) for model in (plain(real.model, real), shared(real.model, real)))
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) < 1e-4
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


@pytest.mark.parametrize("longest", [4096, 48])
def test_every_odd_request_is_answered_as_lm_eval_does(adapted: Any, base: Base, longest: int) -> None:
    """The byte-level tokenizer makes a token of each letter. With 48 tokens, what is too long is cut."""
    question = "What is the capital of France? It is a city on the Seine, they say."
    requests = asked(
        *[(question, answer) for answer in ("A", "B", "C", "D")],
        *[(question, answer) for answer in (" Paris", " Paris, of course", " London", " P")],
        *[(question[:n], question[n : n + 5]) for n in (1, 10, 11, 30, 60)],
        (question + " ", "Paris"),  # lm-eval moves the space to the continuation
        *[("", answer) for answer in ("A", "Paris", question[:40])],
        ("W", "h"),
        ("W", "hat"),
        (question, "A"),
        (question, " Paris"),
    )
    models = plain(adapted, base), shared(adapted, base)
    for model in models:
        model._max_length = longest
    expected, found = (model.loglikelihood(requests, disable_tqdm=True) for model in models)
    same(found, expected)


def test_the_likeliest_continuation_is_told_as_such(adapted: Any, base: Base) -> None:
    ours, theirs = shared(adapted, base), plain(adapted, base)
    contexts = [[*range(30, 60), i] for i in range(40)]
    likeliest = [int(adapted(torch.tensor([context])).logits[0, -1].argmax()) for context in contexts]
    requests = [(("", ""), context, [word]) for context, word in zip(contexts, likeliest, strict=True)]
    requests += [(("", ""), context, [50]) for context in contexts]
    found = ours._loglikelihood_tokens(requests)
    same(found, theirs._loglikelihood_tokens(requests, disable_tqdm=True))
    assert all(is_likeliest for _, is_likeliest in found[:40])
    assert not all(is_likeliest for _, is_likeliest in found[40:])


def test_the_log_probability_of_whole_texts_is_that_of_lm_eval(adapted: Any, base: Base) -> None:
    """loglikelihood_rolling, which asks in windows of the longest text."""
    texts = ["To be, or not to be, that is the question. " * 5, "Short."]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i) for i, text in enumerate(texts)
    ]
    models = plain(adapted, base), shared(adapted, base)
    for model in models:
        model._max_length = 64
    expected, found = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in models)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_examples_of_a_subject_are_computed_once(adapted: Any, base: Base, mirror: Path) -> None:
    """Tokens that pass through the model for 4 questions of 5 shots: what they share once, and the questions."""
    seen: list[int] = []
    embedding = base.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].numel()))
    done: list[int] = []
    ours = shared(adapted, base, done)
    given: list[Any] = []
    original = ours._loglikelihood_tokens
    ours._loglikelihood_tokens = lambda requests, **more: given.extend(requests) or original(requests, **more)
    try:
        with mirrored_datasets(str(mirror)):
            manager = task_manager(None)
            lm_eval.simple_evaluate(
                ours, tasks=["mmlu_anatomy"], num_fewshot=5, limit=4, task_manager=manager, bootstrap_iters=0
            )
    finally:
        hook.remove()
    texts = sorted({tuple(context + continuation[:-1]) for _, context, continuation in given})
    first, last = texts[0], texts[-1]
    prefix = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    assert (len(given), len(texts)) == (16, 4)
    assert prefix > 0.6 * max(map(len, texts))
    assert seen[3:] == [prefix + sum(len(text) - prefix for text in texts)]  # before, a row on trial
    assert done[-1] == 4
    assert max(done) == done[-1]


def test_a_model_that_knows_no_rows_is_scored_by_lm_eval_with_a_warning(
    base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(base.tokenizer)}
    gemma = Gemma2ForCausalLM(Gemma2Config(**shape, **heads)).eval().requires_grad_(False)
    requests = asked(*[("What is it", answer) for answer in (" this", " that", "?")])
    done: list[int] = []
    ours = shared(gemma, base, done)
    capsys.readouterr()
    found = [ours.loglikelihood(requests, disable_tqdm=True) for _ in range(2)]
    told = capsys.readouterr().out
    assert (
        told.count("warning: lm-eval computes what texts share anew for each of them: its attention has softcap") == 1
    )
    expected = plain(gemma, base).loglikelihood(requests, disable_tqdm=True)
    assert found == [expected, expected]
    assert done[-1] == 6
