"""Texts from a model: batched by length, greedy or sampled, each the same whatever is generated beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria


@dataclass(frozen=True)
class Settings:
    """How texts are generated.

    Attributes:
        max_new_tokens: longest text.
        temperature: 0 is greedy.
        top_p: sampled are the likeliest tokens that make up this probability.
        stop: texts that end it; they are not part of it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What is gone on with.

    Attributes:
        id: names the text.
        ids: token ids, not empty.
        seed: of the samples; two prompts with other seeds are sampled independently.
    """

    id: str
    ids: list[int]
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """What the model wrote.

    Attributes:
        id: the prompt's.
        text: without special tokens and without what ended it.
        tokens: how many it generated, the end token included.
        ended: by the "end" token, by a "stop" text, or by the largest "length".
        ids: the generated token ids.
    """

    id: str
    text: str
    tokens: int
    ended: str
    ids: list[int]


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    batch_size: int,
    done: Collection[str] = (),
    keep: Callable[[list[Text]], None] = lambda texts: None,
) -> list[Text]:
    """Generate what is not done yet.

    Batches are made of all prompts, longest first, whatever is done of them: what is generated after an interruption is
    what would have been without it.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        prompts: in any order, with ids of their own.
        settings: how.
        batch_size: prompts per forward pass.
        done: ids whose texts there are already.
        keep: called with the new texts of each batch.

    Returns:
        The new texts, in the order in which they were generated.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    found: list[Text] = []
    for start in range(0, len(order), batch_size):
        batch = [prompts[i] for i in order[start : start + batch_size]]
        if all(prompt.id in done for prompt in batch):
            continue
        fresh = [text for text in _one_batch(model, tokenizer, batch, settings) if text.id not in done]
        keep(fresh)
        found += fresh
    return found


def _one_batch(model: Any, tokenizer: Any, batch: Sequence[Prompt], settings: Settings) -> list[Text]:
    longest = max(len(prompt.ids) for prompt in batch)
    device = next(model.parameters()).device
    pad, ends = int(tokenizer.pad_token_id), end_tokens(model, tokenizer)
    ids = torch.full((len(batch), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, longest - len(prompt.ids) :] = 1
    stopped = StopAt(tokenizer, settings.stop, longest)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,  # sampling is SeededSampling's, so that a text does not depend on its batch
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    sampling = SeededSampling([prompt.seed for prompt in batch], settings.temperature, settings.top_p)
    with no_settings_of_its_own(model) as bare:
        generated = bare.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=[sampling] if settings.temperature > 0 else [],
            stopping_criteria=[stopped] if settings.stop else [],
        )[:, longest:].tolist()
    return [
        _text(prompt.id, tokens, stopped.lengths.get(row), ends, tokenizer, settings)
        for row, (prompt, tokens) in enumerate(zip(batch, generated, strict=True))
    ]


def _text(
    name: str, tokens: list[int], stopped: int | None, ends: list[int], tokenizer: Any, settings: Settings
) -> Text:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    if stopped is not None and stopped <= end:
        own = tokens[:stopped]
        text = tokenizer.decode(own, skip_special_tokens=True)
        first = min(at for stop in settings.stop if (at := text.find(stop)) >= 0)
        return Text(name, text[:first], len(own), "stop", own)
    own = tokens[: end + 1]
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Text(name, text, len(own), "end" if end < len(tokens) else "length", own)


@contextmanager
def no_settings_of_its_own(model: Any) -> Iterator[Any]:
    """The model (its adapter's layers are in it) without the generation settings that its repository gives it.

    transformers fills what a GenerationConfig leaves open from those: a repetition penalty, say.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield inner
    finally:
        inner.generation_config = own


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's, and what the model's own settings add."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return [int(token) for token in dict.fromkeys([tokenizer.eos_token_id, *listed]) if token is not None]


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Turns the greedy choice into a sample: the largest of log-probability plus Gumbel noise is one (Gumbel 1954).

    Each row draws its noise from a generator of its own, on the CPU: a text depends on its seed, not on its batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ranked, order = scores.sort(dim=-1, descending=True)
            before = ranked.exp().cumsum(dim=-1) - ranked.exp()  # probability of what is likelier
            unlikely = (before >= self.top_p).scatter(-1, order, before >= self.top_p)
            scores = scores.masked_fill(unlikely, -torch.inf)
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=each) for each in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-20)))
        return scores + noise.to(scores.device)


class StopAt(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when its text holds one of the stops; remembers after how many tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, prompt_length
        self.window = max((len(stop.encode()) for stop in stops), default=0) + 8  # a token is at least a byte
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        generated = input_ids[:, self.start :]
        tails = self.tokenizer.batch_decode(generated[:, -self.window :], skip_special_tokens=True)
        for row, tail in enumerate(tails):
            if row not in self.lengths and any(stop in tail for stop in self.stops):
                self.lengths[row] = generated.shape[1]
        done = [row in self.lengths for row in range(len(tails))]
        return torch.tensor(done, device=input_ids.device)
