"""Pairs into token ids, with the boundary between prompt and response on tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_align.data.pairs import Message, Pair
from peft_align.data.templates import render
from peft_align.errors import Fault, InputError

ROWS_NAMED = 20  # of those that a fault is about, at most
FEW = 4  # tokens that a response without text may have: a blank, what ends it
MARK = "\uf8ff"  # of a place in a chat: a character that no text has, being of private use
MINIMUM_PROMPT_SHARE = 4  # a prompt is cut down to a quarter of max_length at most


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a prompt (with the beginning-of-sequence token) and of both responses (with the end token)."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def tokenize(
    pairs: Iterable[Pair],
    tokenizer: Any,
    template: str,
    max_length: int,
    known: dict[tuple[str, Pair], TokenizedPair] | None = None,
) -> tuple[list[TokenizedPair], dict[str, int]]:
    """Tokenize and truncate.

    Args:
        pairs: what to tokenize.
        tokenizer: a transformers tokenizer.
        template: vicuna, mistral or chat.
        max_length: tokens of the prompt and its longest response together.
        known: pairs that this tokenizer has encoded before, by template; the others are added.

    Returns:
        The tokenized pairs in order, and how many prompts and responses were truncated.
    """
    cut: Counter[str] = Counter({"truncated prompts": 0, "truncated responses": 0})
    known, done = {} if known is None else known, []
    for pair in pairs:
        if (template, pair) not in known:
            known[template, pair] = _encode(pair, tokenizer, template)
        done.append(_truncate(known[template, pair], max_length, tokenizer.bos_token_id, cut))
    return done, dict(cut)


def check_scored(rows: Iterable[TokenizedPair], tokenizer: Any, where: str, *, both: bool) -> None:
    """Have something to learn in every sample: a token of its response that is scored and is text.

    Behind an empty prompt, a response's first token is not scored: nothing predicts it.

    Args:
        rows: encoded and truncated.
        tokenizer: that did it.
        where: they are from, for the fault.
        both: whether the rejected response is scored, too.

    Raises:
        InputError: some have none; it names the rows.
    """
    empty: dict[str, None] = {}
    for row in rows:
        for ids in (row.chosen, row.rejected) if both else (row.chosen,):
            scored = ids[not row.prompt :]
            if len(scored) <= FEW and not tokenizer.decode(scored, skip_special_tokens=True).strip():
                empty[row.id] = None
    if empty:
        shown = ", ".join(list(empty)[:ROWS_NAMED]) + (f", ... ({len(empty)})" if len(empty) > ROWS_NAMED else "")
        what = f"row{'s' if len(empty) > 1 else ''} {shown}: nothing of a response is left to be scored"
        remedy = "once it is encoded and truncated; take these rows out, or another tokenizer or train.max_length"
        raise InputError([Fault(where, what, remedy)])


def prompt_ids(prompt: Sequence[Message], tokenizer: Any, template: str) -> list[int]:
    """The token ids of a prompt, up to where the response begins: as in training."""
    earlier, last_ids, _, _ = _encode_prompt(prompt, tokenizer, template)
    return earlier + last_ids


def cut_prompt(ids: list[int], room: int, bos: int | None) -> list[int]:
    """A prompt that is too long loses its beginning; its beginning-of-sequence token stays."""
    if len(ids) <= room:
        return ids
    return [ids[0], *ids[len(ids) - room + 1 :]] if ids[0] == bos and room > 1 else ids[-room:]


def _options(template: str) -> dict[str, bool]:
    # A chat template writes special tokens as text. The others hold none: what spells one there is the data's.
    return {"add_special_tokens": False, "split_special_tokens": template != "chat"}


def _encode_prompt(
    prompt: Sequence[Message], tokenizer: Any, template: str
) -> tuple[list[int], list[int], str | None, str]:
    """Ids of the earlier segments and of the last one, the last one's text, and the gap before the response.

    The text is None where a chat's turns spell special tokens: they are the data's, as in the other templates.
    """
    if template == "chat" and _spells_special((message.content for message in prompt), tokenizer):
        return [], _encode_turns(prompt, tokenizer), None, ""
    segments, gap = render(template, prompt, tokenizer)
    encoded = tokenizer(segments, **_options(template))["input_ids"]
    earlier = [token for ids in encoded[:-1] for token in [*ids, tokenizer.eos_token_id]]
    if template != "chat" and tokenizer.bos_token_id is not None:  # a chat template writes its own
        earlier = [tokenizer.bos_token_id, *earlier]
    return earlier, encoded[-1], segments[-1], gap


def _spells_special(texts: Iterable[str], tokenizer: Any) -> bool:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return any(token in text for text in texts for token in special)


def _encode_turns(prompt: Sequence[Message], tokenizer: Any) -> list[int]:
    """Ids of a chat whose turns spell special tokens: the template's tokens are special, what stands in a turn is text.

    Raises:
        InputError: the template does not write the turns as they are.
    """
    marked = [Message(message.role, f"{MARK}{i}{MARK}") for i, message in enumerate(prompt)]
    (text,), _ = render("chat", marked, tokenizer)
    pieces = re.split(f"{MARK}(\\d+){MARK}", text)  # the template's, a turn's number, the template's, ...
    if sorted(map(int, pieces[1::2])) != list(range(len(prompt))):
        what = "the tokenizer's chat template does not write each turn once, and one spells a special token"
        raise InputError([Fault("model.template=chat", what, "choose vicuna or mistral")])
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        text, options = (prompt[int(piece)].content, _options("text")) if i % 2 else (piece, _options("chat"))
        ids += tokenizer(text, **options)["input_ids"]
    return ids


def _encode(pair: Pair, tokenizer: Any, template: str) -> TokenizedPair:
    earlier, last_ids, last, gap = _encode_prompt(pair.prompt, tokenizer, template)
    options, eos = _options(template), [tokenizer.eos_token_id]
    alone = last is None or (template == "chat" and _spells_special((pair.chosen, pair.rejected), tokenizer))
    if alone:  # what spells a special token in a response is text too
        as_text = tokenizer([pair.chosen, pair.rejected], **_options("text"))["input_ids"]
        return TokenizedPair(pair.id, earlier + last_ids, as_text[0] + eos, as_text[1] + eos)
    texts = [f"{last}{gap}{response}" for response in (pair.chosen, pair.rejected)]
    wholes = tokenizer(texts, **options)["input_ids"]
    responses = []
    for response, whole in zip((pair.chosen, pair.rejected), wholes, strict=True):
        if whole[: len(last_ids)] == last_ids:
            responses.append(whole[len(last_ids) :] + eos)
        else:  # tokens would merge across the boundary: the response is encoded by itself, so the prompt stays whole
            responses.append(tokenizer(f"{gap}{response}", **options)["input_ids"] + eos)
    return TokenizedPair(pair.id, earlier + last_ids, responses[0], responses[1])


def _truncate(pair: TokenizedPair, max_length: int, bos: int | None, cut: Counter[str]) -> TokenizedPair:
    """Cut the prompt's beginning (its bos token stays), then the responses' ends."""
    longest = max(len(pair.chosen), len(pair.rejected))
    if len(pair.prompt) + longest <= max_length:
        return pair
    room = max(max_length - longest, min(len(pair.prompt), max_length // MINIMUM_PROMPT_SHARE))
    prompt = pair.prompt
    if len(prompt) > room:
        cut["truncated prompts"] += 1
        prompt = cut_prompt(prompt, room, bos)
    left = max_length - len(prompt)
    cut["truncated responses"] += (len(pair.chosen) > left) + (len(pair.rejected) > left)
    return TokenizedPair(pair.id, prompt, pair.chosen[:left], pair.rejected[:left])
