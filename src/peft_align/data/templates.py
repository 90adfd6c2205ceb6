"""How a dialogue becomes text: Vicuna's and Mistral's formats, or the tokenizer's own chat template.

A dialogue is a list of segments; after each but the last comes the end-of-sequence token, by its id, so that text which
happens to spell "</s>" in the data is never what ends a turn of ours. Each segment is encoded by itself, so that a
SentencePiece tokenizer puts its dummy blank before it, as those of LLaMA-1 and Mistral 7B v0.1 do after an end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from peft_align.data.pairs import Message
from peft_align.errors import Fault, InputError

# The system prompt of Vicuna v1.1 (lm-sys/FastChat, conversation template `vicuna_v1.1`), quoted by the study.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna(prompt: Sequence[Message]) -> list[str]:
    """`SYSTEM USER: question ASSISTANT: answer</s>USER: question ASSISTANT:`"""
    segments = [f"{VICUNA_SYSTEM} "]
    for message in prompt:
        if message.role == "user":
            segments[-1] += f"USER: {message.content} ASSISTANT:"
        else:
            segments[-1] += f" {message.content}"
            segments.append("")
    return segments


def mistral(prompt: Sequence[Message]) -> list[str]:
    """`[INST] question [/INST] answer</s>[INST] question [/INST]`, Mistral's v1 format.

    Mistral's tokenizer encodes an answer by itself, with the dummy blank before it: the blank that stands there here.
    """
    segments = [""]
    for message in prompt:
        if message.role == "user":
            segments[-1] += f"[INST] {message.content} [/INST]"
        else:
            segments[-1] += f" {message.content}"
            segments.append("")
    return segments


def chat(prompt: Sequence[Message], tokenizer: Any) -> list[str]:
    """The tokenizer's own template, up to where the assistant's answer begins."""
    turns = [{"role": message.role, "content": message.content} for message in prompt]
    if tokenizer.chat_template is None:
        what = "is chat, and the model's tokenizer has no chat template"
        raise InputError([Fault("model.template", what, "choose vicuna or mistral, or a model that has one")])
    try:
        return [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)]
    except (TemplateError, TypeError, ValueError) as error:
        what = f"the tokenizer's chat template cannot be used: {' '.join(str(error).split())[:200]}"
        raise InputError([Fault("model.template=chat", what, "choose vicuna or mistral, or another model")]) from None


# What a model writes when it goes on with the user's next turn instead of ending its own.
STOPS: dict[str, tuple[str, ...]] = {"vicuna": ("USER:",), "mistral": ("[INST]",), "chat": ()}


def render(template: str, prompt: Sequence[Message], tokenizer: Any) -> tuple[list[str], str]:
    """The segments of a prompt, and what stands between it and the response (a blank, or nothing)."""
    if template == "chat":
        return chat(prompt, tokenizer), ""
    return {"vicuna": vicuna, "mistral": mistral}[template](prompt), " "
