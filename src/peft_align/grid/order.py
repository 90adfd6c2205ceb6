"""Which runs of a plan come before which, and which are to be looked at again."""

from __future__ import annotations

from collections.abc import Sequence

from peft_align.grid.planner import Item


def remade(items: Sequence[Item]) -> set[str]:
    """The runs that are made now, and what starts from those: it is looked at again, even if it is done."""
    found: set[str] = set()
    for item in order(items):
        if item.to_make or found & set(item.run.parents):
            found.add(item.run.id)
    return found


def order(items: Sequence[Item]) -> list[Item]:
    """Parents before children, otherwise as they came."""
    by_id = {item.run.id: item for item in items}
    placed: dict[str, Item] = {}

    def place(item: Item) -> None:
        for parent in item.run.parents:
            if parent in by_id:
                place(by_id[parent])
        placed.setdefault(item.run.id, item)

    for item in items:
        place(item)
    return list(placed.values())


def ancestors(item: Item, items: Sequence[Item]) -> set[str]:
    """The runs that one starts from, theirs included."""
    by_id = {each.run.id: each for each in items}
    found: set[str] = set()
    left = list(item.run.parents)
    while left:
        parent = left.pop()
        found.add(parent)
        left += by_id[parent].run.parents
    return found
