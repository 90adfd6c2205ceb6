"""BeaverTails in the study's sense: PKU-SafeRLHF v0, a prompt and two responses a row (Ji et al. 2023).

helpful: the better response is chosen, all rows. harmless: the safe response is chosen, rows with exactly one safe
response. mixture: both sets together. helpful_length_controlled: the better response is chosen, rows whose responses
are about equally long. Another preference is one more function here, which says which response of a row is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from peft_align.data.pairs import Counts, Message, Pair, make_pair

Rule = Callable[[Mapping[str, Any], Counts], int | None]
LARGEST_LENGTH_GAP = 10  # percent of the longer response
ROW = (
    "prompt, response_0 and response_1 are texts; better_response_id is 0 or 1; is_response_0_safe and "
    "is_response_1_safe are true or false"
)
TEXTS = ("prompt", "response_0", "response_1")
SAFETY = ("is_response_0_safe", "is_response_1_safe")


def subset(rule: str) -> None:
    """All rules read the same files."""


def helpful(row: Mapping[str, Any], counts: Counts) -> int | None:
    """The index of the better response."""
    better = row.get("better_response_id")
    if better in (0, 1):
        return int(better)
    counts.drop("no better response named", applies=False)
    return None


def harmless(row: Mapping[str, Any], counts: Counts) -> int | None:
    """The index of the safe response, if exactly one is safe."""
    safe = [row.get("is_response_0_safe"), row.get("is_response_1_safe")]
    if safe == [True, False] or safe == [False, True]:
        return safe.index(True)
    counts.drop("not exactly one safe response", applies=False)
    return None


def helpful_length_controlled(row: Mapping[str, Any], counts: Counts) -> int | None:
    """The index of the better response, if both are about equally long (in characters, outer blanks left out)."""
    better = helpful(row, counts)
    if better is None:
        return None
    shorter, longer = sorted(len(str(row.get(name) or "").strip()) for name in ("response_0", "response_1"))
    if 100 * (longer - shorter) <= LARGEST_LENGTH_GAP * longer:
        return better
    counts.drop(f"lengths differ by more than {LARGEST_LENGTH_GAP} percent", applies=False)
    return None


RULES: Mapping[str, tuple[Rule, ...]] = {
    "helpful": (helpful,),
    "harmless": (harmless,),
    "mixture": (harmless, helpful),
    "helpful_length_controlled": (helpful_length_controlled,),
}


def columns(rule: str) -> tuple[str, ...]:
    """What a row must have under a rule."""
    labels = ("better_response_id",) if {helpful, helpful_length_controlled} & set(RULES[rule]) else ()
    return (*TEXTS, *labels, *(SAFETY if harmless in RULES[rule] else ()))


def pairs(rows: Iterable[Mapping[str, Any]], rule: str, split: str, counts: Counts) -> Iterator[Pair]:
    """The pairs of the rows under a preference rule; a row of the mixture may give two."""
    for i, row in enumerate(counts.rows(rows)):
        counts.read += 1
        prompt, responses = row.get("prompt"), [row.get("response_0"), row.get("response_1")]
        for choose in RULES[rule]:
            chosen = choose(row, counts)
            if chosen is None:
                continue
            counts.matching += 1
            name = f"{split}:{i}:{choose.__name__}"
            if not isinstance(prompt, str):
                counts.drop("prompt is not text", name)
                continue
            turns = (Message("user", prompt.strip()),)
            pair = make_pair(name, turns, responses[chosen], responses[1 - chosen], counts)
            if pair is not None:
                yield pair
