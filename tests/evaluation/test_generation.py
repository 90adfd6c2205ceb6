"""Generated texts: the same in any batch, sampled from the softmax, ended where they should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from sweeping import expand, shipped
from transformers import AutoModelForCausalLM, GenerationConfig

from peft_align.config.benchmarks import AlpacaEval
from peft_align.data.pairs import Message
from peft_align.data.tokenization import prompt_ids
from peft_align.evaluation.alpaca_eval import data
from peft_align.evaluation.generation import Prompt, Settings, StopAt, Text, generate
from peft_align.evaluation.texts import seed_of
from peft_align.grid.benchmarks import find_benchmark
from peft_align.models.adapters import new_adapter, take_off
from peft_align.models.loading import Base, load_base
from peft_align.models.tokenizer import load_tokenizer

WORDS = ("model=tiny", "dataset=everyday", "method=dpo", "peft=lora", "evaluation.benchmarks=[preference]")
GREEDY, SAMPLED = Settings(24), Settings(24, temperature=1.0)
QUESTIONS = (
    *("Hello", "x", "?", "Why is the sky blue?", "What is the capital of France?", "Name three fruits.", "ü ± ”", "12"),
    *(
        "Translate into German: good morning, my dear friend.",
        "Write a haiku about the sea, please. " * 4,
        "Sort: 3 1 2",
    ),
    *(
        "Who wrote Faust?",
        "A" * 60,
        "Tell me more about it. " * 9,
        "How do magnets work?",
        "List the planets, in order.",
    ),
)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(expand(*WORDS, "peft.compute_dtype=fp32").runs[0].config)


@pytest.fixture(scope="module")
def rounded() -> Base:
    """In bf16, where a text can depend on what it shares a batch with."""
    return load_base(expand(*WORDS, "peft.compute_dtype=bf16").runs[0].config)


def prompts_of(base: Base, questions: Sequence[str] = QUESTIONS, seed: int = 0) -> list[Prompt]:
    encoded = base.tokenizer(list(questions), add_special_tokens=False)["input_ids"]
    begin = base.tokenizer.bos_token_id
    return [Prompt(f"q{i}", [begin, *ids], seed_of(seed, f"q{i}")) for i, ids in enumerate(encoded)]


def texts_of(base: Base, prompts: Sequence[Prompt], settings: Settings, size: int, **more: Any) -> dict[str, Text]:
    made = generate(base.model, base.tokenizer, prompts, settings, batch_size=size, **more)
    assert len({text.id for text in made}) == len(made)
    return {text.id: text for text in made}


@torch.inference_mode()
def plain_greedy(base: Base, ids: list[int], length: int) -> list[int]:
    """The likeliest token again and again, without a batch, padding, a cache or transformers' generate."""
    found: list[int] = []
    while len(found) < length and found[-1:] != [base.tokenizer.eos_token_id]:
        found.append(int(base.model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax()))
    return found


@torch.inference_mode()
def softmax_of(base: Base, ids: list[int], temperature: float) -> torch.Tensor:
    return torch.softmax(base.model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature, dim=-1)


def test_greedy_texts_in_fp32_are_the_likeliest_tokens_whatever_the_batch(base: Base) -> None:
    prompts = prompts_of(base)
    assert len({len(prompt.ids) for prompt in prompts}) > 10
    alone, together = texts_of(base, prompts, GREEDY, 1), texts_of(base, prompts, GREEDY, 16)
    assert alone == together
    assert {name: text.ids for name, text in alone.items()} == {p.id: plain_greedy(base, p.ids, 24) for p in prompts}
    assert {text.ended for text in alone.values()} == {"end", "length"}
    assert len({text.text for text in alone.values()}) > 10


def test_the_longest_prompts_come_first_and_prompts_may_come_in_any_order(base: Base) -> None:
    prompts = prompts_of(base)
    made = generate(base.model, base.tokenizer, prompts, GREEDY, batch_size=4)
    lengths = {prompt.id: len(prompt.ids) for prompt in prompts}
    assert [lengths[text.id] for text in made] == sorted(lengths.values(), reverse=True)
    assert texts_of(base, prompts[::-1], GREEDY, 4) == {text.id: text for text in made}
    assert generate(base.model, base.tokenizer, [], GREEDY, batch_size=4) == []


@pytest.mark.parametrize("settings", [SAMPLED, Settings(24, temperature=0.7, top_p=0.9)], ids=["softmax", "nucleus"])
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(base: Base, settings: Settings) -> None:
    prompts = prompts_of(base)
    alone = texts_of(base, prompts, settings, 1)
    assert texts_of(base, prompts, settings, 16) == alone
    assert texts_of(base, prompts[::-1], settings, 5) == alone
    assert texts_of(base, prompts[3:4], settings, 16) == {"q3": alone["q3"]}
    other = texts_of(base, prompts_of(base, seed=1), settings, 16)
    assert all(other[name].text != text.text for name, text in alone.items())


def test_samples_leave_torchs_own_random_numbers_alone(base: Base) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = texts_of(base, prompts_of(base)[:2], SAMPLED, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert texts_of(base, prompts_of(base)[:2], SAMPLED, 2) == first


def drawn(base: Base, ids: list[int], temperature: float, top_p: float, times: int) -> torch.Tensor:
    """How often each token came first."""
    prompts = [Prompt(f"s{i}", ids, seed_of(3, f"s{i}")) for i in range(times)]
    made = texts_of(base, prompts, Settings(1, temperature, top_p), 1000)
    return torch.bincount(torch.tensor([text.ids[0] for text in made.values()]), minlength=259)


def fit(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The p value of Pearson's test; tokens that are expected fewer than 8 times are one class."""
    often = expected >= 8
    seen = [*counts[often].tolist(), int(counts[~often].sum())]
    wanted = [*expected[often].tolist(), float(expected[~often].sum())]
    if wanted[-1] < 1:
        seen, wanted = seen[:-1], wanted[:-1]
        wanted = [w * sum(seen) / sum(wanted) for w in wanted]
    return float(chisquare(seen, wanted).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_tokens_are_sampled_from_the_softmax_at_the_temperature(base: Base, temperature: float) -> None:
    times = 3000
    ids = prompts_of(base)[0].ids
    counts = drawn(base, ids, temperature, 1.0, times)
    assert fit(counts, times * softmax_of(base, ids, temperature)) > 1e-3
    assert fit(counts, times * softmax_of(base, ids, 1.3 - temperature)) < 1e-9  # the test sees another temperature


def test_only_the_nucleus_is_sampled_and_within_it_by_the_softmax(base: Base) -> None:
    times, top_p, temperature = 3000, 0.6, 0.5
    ids = prompts_of(base)[0].ids
    counts = drawn(base, ids, temperature, top_p, times)
    chances = softmax_of(base, ids, temperature)
    ranked, nucleus, mass = chances.argsort(descending=True).tolist(), [], 0.0
    while mass < top_p:  # the fewest likeliest tokens that make up top_p
        nucleus.append(ranked[len(nucleus)])
        mass += float(chances[nucleus[-1]])
    assert 5 < len(nucleus) < 200
    inside = torch.zeros_like(chances)
    inside[nucleus] = chances[nucleus] / mass
    assert int(counts[inside == 0].sum()) == 0
    assert int(counts[nucleus[-1]]) > 0  # the one that crosses top_p is still in it
    assert fit(counts, times * inside) > 1e-3


def test_a_later_token_is_sampled_given_the_earlier_ones(base: Base) -> None:
    times, temperature = 3000, 0.3
    ids = prompts_of(base)[0].ids
    prompts = [Prompt(f"s{i}", ids, seed_of(3, f"s{i}")) for i in range(times)]
    made = list(texts_of(base, prompts, Settings(2, temperature), 1000).values())
    usual = int(torch.bincount(torch.tensor([text.ids[0] for text in made])).argmax())
    seconds = torch.tensor([text.ids[1] for text in made if text.ids[0] == usual])
    assert len(seconds) > 500
    expected = len(seconds) * softmax_of(base, [*ids, usual], temperature)
    assert fit(torch.bincount(seconds, minlength=259), expected) > 1e-3


def test_a_nucleus_of_almost_nothing_is_greedy(base: Base) -> None:
    prompts = prompts_of(base)
    certain = texts_of(base, prompts, Settings(24, temperature=1.0, top_p=1e-6), 16)
    assert certain == texts_of(base, prompts, GREEDY, 16)


def stops_of(free: dict[str, Text]) -> tuple[str, ...]:
    """Two characters of each of three texts, not at their beginnings; and three that end as the last of them does."""
    found = [
        (text.text[at : at + 2], text.text[at - 1 : at + 2])
        for text in free.values()
        if (at := next((at for at in range(4, 40) if text.text[at : at + 2].isalnum()), 0))
    ]
    return (*(two for two, _ in found[:3]), found[2][1])


def test_a_stop_text_ends_its_row_alone_and_is_no_part_of_the_text(base: Base) -> None:
    prompts, settings = prompts_of(base), Settings(60, temperature=1.0)
    free = texts_of(base, prompts, settings, 16)
    stops = stops_of(free)
    made = texts_of(base, prompts, dataclasses.replace(settings, stop=stops), 16)
    assert made == texts_of(base, prompts, dataclasses.replace(settings, stop=stops), 1)
    ended = 0
    for name, text in made.items():
        places = [at for stop in stops if (at := free[name].text.find(stop)) >= 0]
        if not places:
            assert text == free[name]
            continue
        ended += 1
        assert (text.text, text.ended) == (free[name].text[: min(places)], "stop")
        assert text.ids == free[name].ids[: text.tokens]
        whole, before = base.tokenizer.decode(text.ids), base.tokenizer.decode(text.ids[:-1])
        assert any(stop in whole for stop in stops)  # it went on to where the stop is whole,
        assert not any(stop in before for stop in stops)  # and no further
    assert 3 <= ended < len(prompts)


def test_a_stop_in_the_prompt_ends_nothing(base: Base) -> None:
    prompts = prompts_of(base)
    stopped = texts_of(base, prompts, dataclasses.replace(GREEDY, stop=("Hello", "planets", "Why")), 16)
    assert stopped == texts_of(base, prompts, GREEDY, 16)


@pytest.mark.parametrize(
    "stop", ["USER:", "</answer>", "用户:", "Следующий вопрос пользователя:", "ユーザーの次の質問です"]
)
def test_a_stop_is_seen_when_its_last_byte_is_written(base: Base, stop: str) -> None:
    written = base.tokenizer(f"An answer. {stop}", add_special_tokens=False)["input_ids"]  # of a token a byte
    watch = StopAt(base.tokenizer, [stop], 3)
    seen = [bool(watch(torch.tensor([[1, 40, 41, *written[:n]]]), None)[0]) for n in range(1, len(written) + 1)]
    assert seen == [False] * (len(written) - 1) + [True]
    assert watch.lengths == {0: len(written)}


def test_a_text_ends_at_the_tokenizers_end_token_or_one_that_the_model_adds(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(base)
    free = texts_of(base, prompts, SAMPLED, 16)
    own = next(text.ids[5] for text in free.values() if text.ids[5] not in text.ids[:5])
    monkeypatch.setattr(
        base.model, "generation_config", GenerationConfig(eos_token_id=[base.tokenizer.eos_token_id, own])
    )
    made = texts_of(base, prompts, SAMPLED, 16)
    assert sum(text.ids[-1] == own for text in made.values()) > 0
    for name, text in made.items():
        ids = free[name].ids
        at = ids.index(own) if own in ids else None
        wanted = ids if at is None else ids[: at + 1]
        assert (text.ids, text.tokens) == (wanted, len(wanted))
        if at is not None:
            assert text.ended == "end"
            assert text.text == base.tokenizer.decode(wanted[:-1], skip_special_tokens=True)


def test_a_text_of_the_largest_length_says_so(base: Base) -> None:
    for text in texts_of(base, prompts_of(base), Settings(7), 16).values():
        assert (text.ended, text.tokens) in {("length", 7), *(("end", n) for n in range(1, 8))}
        assert (text.ended == "end") == (text.ids[-1] == base.tokenizer.eos_token_id)
        assert len(text.ids) == text.tokens


OWN = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [33, 61, 84],
    "min_new_tokens": 20,
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 2,
    "max_length": 9,
}


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_models_own_generation_settings_have_no_influence_and_are_given_back(
    base: Base, settings: Settings, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(base)
    before = texts_of(base, prompts, settings, 16)
    own = GenerationConfig(**OWN)
    monkeypatch.setattr(base.model, "generation_config", own)
    model = new_adapter(base, expand(*WORDS, "peft.compute_dtype=fp32").runs[0].config.peft) if adapted else base.model
    try:
        after = generate(model, base.tokenizer, prompts, settings, batch_size=16)
        assert {text.id: text for text in after} == before
        assert base.model.generation_config is own
        with pytest.raises(IndexError):  # a token that the model does not have
            generate(model, base.tokenizer, [Prompt("x", [1, 9999])], settings, batch_size=1)
        assert base.model.generation_config is own
        assert own.to_dict() == GenerationConfig(**OWN).to_dict()
    finally:
        if adapted:
            take_off(base, model)


def test_those_settings_would_have_an_influence(base: Base) -> None:
    ids = torch.tensor([prompts_of(base)[0].ids])
    plain, own = GenerationConfig(max_new_tokens=24), GenerationConfig(max_new_tokens=24, repetition_penalty=5.0)
    made = [base.model.generate(input_ids=ids, generation_config=each).tolist() for each in (plain, own)]
    assert made[0] != made[1]


def first_batches(base: Base) -> tuple[list[list[int]], Any]:
    """Hears the first forward pass of each batch: how many rows of which length."""
    heard: list[list[int]] = []

    def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            heard.append(list(kwargs["input_ids"].shape))

    return heard, base.model.register_forward_pre_hook(hear, with_kwargs=True)


@pytest.mark.parametrize("settings", [Settings(12), Settings(12, temperature=1.0)], ids=["greedy", "sampled"])
def test_what_is_generated_after_an_interruption_is_what_would_have_been(rounded: Base, settings: Settings) -> None:
    prompts = prompts_of(rounded)
    undisturbed = texts_of(rounded, prompts, settings, 4)
    for after in (1, 3):
        kept: dict[str, Text] = {}

        def killed(texts: list[Text], kept: dict[str, Text] = kept, enough: int = 4 * after) -> None:
            kept.update({text.id: text for text in texts})
            if len(kept) == enough:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            texts_of(rounded, prompts, settings, 4, keep=killed)
        assert len(kept) == 4 * after
        again = texts_of(rounded, prompts, settings, 4, done=set(kept))
        assert not set(again) & set(kept)
        assert kept | again == undisturbed


def test_a_batch_of_which_a_part_is_done_keeps_its_composition(rounded: Base) -> None:
    prompts = prompts_of(rounded)
    undisturbed = texts_of(rounded, prompts, GREEDY, 4)
    order = list(undisturbed)
    done = {*order[:4], order[5], order[6], order[12]}  # of the first batch all, of others a part
    heard, hook = first_batches(rounded)
    kept: list[list[str]] = []
    try:
        made = texts_of(rounded, prompts, GREEDY, 4, done=done, keep=lambda texts: kept.append([t.id for t in texts]))
    finally:
        hook.remove()
    lengths = {prompt.id: len(prompt.ids) for prompt in prompts}
    assert heard == [[4, lengths[order[start]]] for start in (4, 8, 12)]
    assert kept == [[name for name in order[start : start + 4] if name not in done] for start in (4, 8, 12)]
    assert made == {name: text for name, text in undisturbed.items() if name not in done}


def test_nothing_is_generated_where_all_is_done(base: Base) -> None:
    prompts = prompts_of(base)
    heard, hook = first_batches(base)
    try:
        assert texts_of(base, prompts, GREEDY, 4, done={prompt.id for prompt in prompts}) == {}
    finally:
        hook.remove()
    assert heard == []


def real_prompts(tokenizer: Any, mirror: Path, count: int) -> list[Prompt]:
    """The first real instructions of AlpacaEval in the tokenizer's own dialogue."""
    benchmark = find_benchmark(shipped(), "alpaca_eval", None, {}, [])
    assert isinstance(benchmark, AlpacaEval)
    questions = data(benchmark, str(mirror)).questions[:count]
    return [Prompt(q.id, prompt_ids([Message("user", q.text)], tokenizer, "chat")) for q in questions]


def alone_and_together(smollm2: Path, mirror: Path, dtype: torch.dtype) -> tuple[dict[str, Text], dict[str, Text]]:
    """A real model's greedy texts in batches of one, and of 16."""
    tokenizer = load_tokenizer(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype).eval()
    prompts = real_prompts(tokenizer, mirror, 32)
    made = [generate(model, tokenizer, prompts, Settings(32), batch_size=size) for size in (1, 16)]
    alone, together = ({text.id: text for text in texts} for texts in made)
    assert len(alone) == len(together) == 32
    assert sum(len(text.text.split()) > 5 for text in alone.values()) > 20
    return alone, together


@pytest.mark.slow
def test_a_real_models_greedy_texts_in_fp32_are_the_same_in_any_batch(smollm2: Path, mirror: Path) -> None:
    alone, together = alone_and_together(smollm2, mirror, torch.float32)
    assert alone == together


@pytest.mark.slow
def test_how_many_greedy_texts_in_bf16_depend_on_their_batch_is_told(smollm2: Path, mirror: Path) -> None:
    alone, together = alone_and_together(smollm2, mirror, torch.bfloat16)
    rate = sum(alone[name].ids != together[name].ids for name in alone) / 32
    print(f"\nbf16: {rate:.1%} of 32 texts of at most 32 tokens are others in batches of 16 than alone")
    assert 0 <= rate <= 1
