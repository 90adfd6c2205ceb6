"""Parents come before what starts from them."""

from __future__ import annotations

from sweeping import expand

from peft_align.grid.order import order
from peft_align.grid.planner import Item


def test_parents_are_placed_before_children() -> None:
    runs = expand("method=dpo,sft", "method.init=sft", "model=tiny", "seed=0,1").runs
    backwards = [Item(run) for run in reversed(runs)]
    placed = [item.run for item in order(backwards)]
    assert sorted(run.id for run in placed) == sorted(run.id for run in runs)
    names = [run.id for run in placed]
    assert all(names.index(parent) < names.index(run.id) for run in placed for parent in run.parents)
