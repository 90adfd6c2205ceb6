"""HH-RLHF: two whole dialogues a row, which share all turns but the last (Bai et al. 2022, arXiv 2204.05862).

Pitfalls of the real rows: a response may hold blank lines and role words, so a dialogue is split at the LAST
"\\n\\nAssistant:"; in a few rows the prompts differ, or a response is empty; a few have two turns of one role in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft_align.data.pairs import Counts, Message, Pair, make_pair

LAST_TURN = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
RULES = {"harmless": "harmless-base", "helpful": "helpful-base"}  # rule -> folder
ROW = 'chosen and rejected are dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ...", that share all turns but the last'


def subset(rule: str) -> str:
    """The folder of the repository that holds the pairs of a preference."""
    return RULES[rule]


def columns(rule: str) -> tuple[str, ...]:
    """What a row must have."""
    return ("chosen", "rejected")


def pairs(rows: Iterable[Mapping[str, Any]], rule: str, split: str, counts: Counts) -> Iterator[Pair]:
    """The pairs of the rows; the rule chose the folder already."""
    for i, row in enumerate(counts.rows(rows)):
        counts.read += 1
        counts.matching += 1
        chosen, rejected, name = row.get("chosen"), row.get("rejected"), f"{split}:{i}"
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            counts.drop("response is not text", name)
            continue
        prompt, marker, good = chosen.rpartition(LAST_TURN)
        other_prompt, other_marker, bad = rejected.rpartition(LAST_TURN)
        if not marker or not other_marker:
            counts.drop("no assistant turn", name)
        elif prompt != other_prompt:
            counts.drop("prompts differ", name)
        else:
            pair = make_pair(name, parse_dialogue(prompt), good, bad, counts)
            if pair is not None:
                yield pair


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue; turns of one role in a row are joined by a blank line, empty ones are left out."""
    pieces = TURN.split(text)
    messages: list[Message] = []
    for role_word, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = ROLES[role_word], content.strip()
        if not content:
            continue
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, f"{messages[-1].content}\n\n{content}")
        else:
            messages.append(Message(role, content))
    return tuple(messages)
