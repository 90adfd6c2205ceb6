"""What a sweep is made of: runs, and what is evaluated of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_align.config.benchmarks import Benchmark
from peft_align.config.identity import Precision, base_label
from peft_align.config.judges import Judge
from peft_align.config.schema import Config, Dataset, Evaluation, Peft, Preference
from peft_align.grid.cells import Excluded

STAGES = ("train", "merge", "evaluate", "judge")  # what is done to a run, in this order


@dataclass(frozen=True)
class Scoring:
    """What is evaluated at which steps, and which pairs are held out for it.

    Attributes:
        steps: training steps; (0,) for a baseline.
        dataset_name, preference_name: the options whose pairs are held out; columns of the result table.
    """

    steps: tuple[int, ...]
    evaluation: Evaluation
    dataset: Dataset
    preference: Preference
    dataset_name: str
    preference_name: str
    max_length: int
    base: Precision  # of the base that is evaluated
    benchmarks: tuple[tuple[str, Benchmark], ...]
    judges: tuple[tuple[str, str, Judge], ...] = ()  # benchmark, option and settings of its judge, if it has one


@dataclass
class Run:
    """One cell of the table: one directory."""

    id: str
    kind: str  # train, merge, baseline, or external: an adapter that was not trained here
    config: Config
    choices: dict[str, str]
    axes: dict[str, Any]
    parents: tuple[str, ...] = ()
    scorings: list[Scoring] = field(default_factory=list)
    steps: tuple[int, ...] = ()  # every checkpoint asked for
    is_parent_only: bool = False
    saves: tuple[str, ...] = ()  # forms in which a merge is kept besides its recipe: adapter, full
    adapter: str | None = None  # of an external run: the adapter's folder

    @property
    def base(self) -> str:
        """How tables name the precision of the base that it is made on."""
        return self.base_of(self.config.peft)

    def base_of(self, peft: Peft | Precision) -> str:
        """How tables name the precision of a base that it is evaluated on."""
        merged = " dequantized" if self.kind == "merge" and peft.base_precision == "nf4" else ""
        return base_label(peft) + merged


@dataclass
class Sweep:
    """One invocation: a grid narrowed by overrides, as runs in the order in which they can be done."""

    name: str
    runs: list[Run]
    excluded: list[Excluded]
    notes: list[str]
    axis_keys: tuple[str, ...]
    config: Config  # of any run: for what holds for the sweep as a whole
    command: tuple[str, ...] = ()

    def by_id(self) -> dict[str, Run]:
        return {run.id: run for run in self.runs}


def value(run: Run, key: str) -> Any:
    """The option of a group, or the value of a dotted setting."""
    node: Any = run.choices.get(key, run.config)
    for name in key.split(".") if key not in run.choices else ():
        node = getattr(node, name, None)
    return node
