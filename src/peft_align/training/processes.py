"""The processes that train one run together, as torch.distributed knows them; one alone sends nothing to anybody."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

from peft_align import terminal

T = TypeVar("T")


def count() -> int:
    """How many they are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The place of this one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that writes, reports and decides."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line once."""
    if is_main():
        terminal.say(text, flush=True)


def agreed(value: T) -> T:
    """What the main process says, in all of them; all must come here."""
    if count() == 1:
        return value
    said = [value]
    distributed.broadcast_object_list(said, src=0)
    return said[0]


def gathered(value: T) -> list[T]:
    """What each of them says, in their order; all must come here."""
    said = [value] * count()
    if len(said) > 1:
        distributed.all_gather_object(said, value)
    return said


def wait_for_all() -> None:
    """Go on when all have come here."""
    gathered(None)
