"""Cells into runs: each checked, named by its identity, once; their parents and the baselines beside them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_align.config.command_line import CommandLine, Override
from peft_align.config.compose import Built, ConfigSpace
from peft_align.config.identity import base_label, baseline_id, train_id
from peft_align.config.schema import (
    DPO,
    GROUPS,
    MAIN_AXES,
    SWEEP_LEVEL,
    Benchmark,
    Config,
    Dataset,
    Evaluation,
    Preference,
)
from peft_align.errors import Fault, InputError
from peft_align.grid.benchmarks import find_benchmark
from peft_align.grid.cells import Cell, Excluded, applies, check_overrides, narrow, when_values
from peft_align.grid.language import Block, check_value, load_grid

INHERITED = ("r", "alpha", "target_modules")  # what a run takes from the adapter that it continues


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
    benchmarks: tuple[tuple[str, Benchmark], ...]


@dataclass
class Run:
    """One cell of the table: one directory."""

    id: str
    kind: str  # train or baseline
    config: Config
    choices: dict[str, str]
    axes: dict[str, Any]
    parents: tuple[str, ...] = ()
    scorings: list[Scoring] = field(default_factory=list)
    steps: tuple[int, ...] = ()  # every checkpoint asked for
    is_parent_only: bool = False

    @property
    def base(self) -> str:
        """How tables name the precision of its base."""
        return base_label(self.config.peft)


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


def build_sweep(space: ConfigSpace, line: CommandLine) -> Sweep:
    """The sweep that a command line asks for. Raises InputError with every fault of one phase together."""
    faults: list[Fault] = [*line.faults, *space.faults]
    whole, per_run = _split(space, line.overrides, faults)
    grids = []
    for name in line.grids:
        try:
            grids.append(load_grid(space, name))
        except InputError as error:
            faults += error.faults
    if faults:
        check_overrides(space, per_run, faults)  # say what is wrong with these too, in the same message
        raise InputError(faults)
    blocks = [block for grid in grids for block in grid.blocks] or [Block("command line")]
    cells, excluded, notes = narrow(space, blocks, per_run)
    runs = _Builder(space, whole).build(cells, baselines=all(grid.baselines for grid in grids))
    axis_keys = list(MAIN_AXES) + [key for cell in cells for key in dict.fromkeys(cell.axes)]
    name = "+".join(grid.name for grid in grids) or "adhoc"
    config = next(iter(runs)).config
    return Sweep(name, runs, excluded, notes, tuple(dict.fromkeys(axis_keys)), config, line.words)


def _split(
    space: ConfigSpace, overrides: Sequence[Override], faults: list[Fault]
) -> tuple[dict[str, Any], list[Override]]:
    """Overrides that hold for the sweep as a whole, and those that go to its runs."""
    whole: dict[str, Any] = {}
    per_run: list[Override] = []
    for o in overrides:
        if o.key.partition(".")[0] not in SWEEP_LEVEL:
            per_run.append(o)
        elif o.is_axis:
            faults.append(Fault(o.text, "holds for a sweep as a whole", "give one value"))
        else:
            whole[o.key] = check_value(space, o.key, o.values[0], o.text, faults)
    return whole, per_run


class _Builder:
    """Builds runs from cells, each run once."""

    def __init__(self, space: ConfigSpace, whole: dict[str, Any]) -> None:
        self.space, self.whole = space, whole
        self.faults: list[Fault] = []
        self.unfit: Counter[tuple[str, str]] = Counter()
        self.runs: dict[str, Run] = {}
        self._benchmarks: dict[tuple[str, str | None], Benchmark | None] = {}

    def build(self, cells: Sequence[Cell], *, baselines: bool) -> list[Run]:
        """The runs of the cells, parents before children, baselines last. Raises InputError."""
        for cell in cells:
            self._run(cell.values, cell.axes, cell)
        for (dataset, rule), count in self.unfit.items():
            rules = ", ".join(self.space.node("dataset", dataset)["rules"])
            what = f"dataset {dataset} has no preference '{rule}' ({count} runs)"
            self.faults.append(
                Fault(f"preference={rule}", what, f"it has {rules}; exclude these cells or narrow the axis")
            )
        if self.faults:
            raise InputError(self.faults)
        trained = list(self.runs.values())
        return trained + (self._baselines(trained) if baselines else [])

    def _run(
        self, values: dict[str, Any], axes: tuple[str, ...], cell: Cell, *, parent_only: bool = False
    ) -> Run | None:
        choices = {group: values.get(group, self.whole.get(group, self.space.defaults[group])) for group in GROUPS}
        assigned = {k: v for k, v in (values | self.whole).items() if k not in GROUPS}
        built = self.space.build(
            choices, {k: v for k, v in assigned.items() if applies(self.space, k, choices)}, self.faults
        )
        if built is None:
            return None
        config, parts = built
        if config.preference.rule not in config.dataset.rules:
            self.unfit[choices["dataset"], config.preference.rule] += 1
            return None
        if config.model.source != "random" and config.model.hub_id is None:
            what = f"is empty, and source is {config.model.source}"
            self.faults.append(Fault(f"model={choices['model']}: model.hub_id", what, "name the repository"))
            return None
        parents: tuple[str, ...] = ()
        if isinstance(config.method, DPO) and config.method.init == "sft":
            parent = self._parent(cell)
            if parent is None:
                return None
            inherited = {f"peft.{name}": getattr(parent.config.peft, name) for name in INHERITED}
            for key, theirs in inherited.items():
                if key in values and values[key] != theirs:
                    what = f"{values[key]} differs from the SFT run's {theirs}, whose adapter this run continues"
                    self.faults.append(Fault(f"{key}={values[key]}", what, "leave it out, or set it for both methods"))
            rebuilt = self.space.build(choices, {**assigned, **inherited}, self.faults)
            if rebuilt is None:
                return None
            (config, parts), parents = rebuilt, (parent.id,)
        return self._add(config, parts, choices, values, axes, parents, parent_only=parent_only)

    def _add(
        self,
        config: Config,
        parts: dict[str, Built],
        choices: dict[str, str],
        values: dict[str, Any],
        axes: tuple[str, ...],
        parents: tuple[str, ...],
        *,
        parent_only: bool,
    ) -> Run:
        run_id = train_id(config, parts, choices, parents)
        beyond = [s for s in config.train.checkpoint_steps if s > config.train.max_steps]
        if beyond:
            what = f"step {beyond[0]} is beyond train.max_steps={config.train.max_steps}"
            self.faults.append(Fault("train.checkpoint_steps", what, "ask for steps up to train.max_steps"))
        run = self.runs.get(run_id)
        if run is None:
            named = {key: choices[key] for key in MAIN_AXES} | {k: v for k, v in values.items() if k in axes}
            run = Run(run_id, "train", config, choices, named, parents, is_parent_only=parent_only)
            self.runs[run_id] = run
        else:
            run.axes |= {k: v for k, v in values.items() if k in axes}
            run.is_parent_only = run.is_parent_only and parent_only
        steps = tuple(sorted(set(config.train.checkpoint_steps)))
        run.steps = tuple(sorted({*run.steps, *steps}))
        if not parent_only:
            scoring = self._scoring(config, choices, steps)
            if scoring not in run.scorings:
                run.scorings.append(scoring)
        return run

    def _scoring(self, config: Config, choices: dict[str, str], steps: tuple[int, ...]) -> Scoring:
        """How one cell of the grid asks its checkpoints to be evaluated."""
        evaluation = config.evaluation
        benchmarks: list[tuple[str, Benchmark]] = []
        for name in dict.fromkeys(evaluation.benchmarks):
            cache_key = (name, evaluation.include_path)
            if cache_key not in self._benchmarks:
                self._benchmarks[cache_key] = find_benchmark(self.space, name, evaluation.include_path, self.faults)
            found = self._benchmarks[cache_key]
            if found is not None:
                benchmarks.append((name, found))
        return Scoring(
            steps,
            evaluation,
            config.dataset,
            config.preference,
            choices["dataset"],
            choices["preference"],
            config.train.max_length,
            tuple(benchmarks),
        )

    def _parent(self, cell: Cell) -> Run | None:
        """The SFT run with the same cell: what the block gives for method=sft in this place."""
        sft = next((o for o in self.space.options("method") if self.space.node("method", o).get("kind") == "sft"), None)
        if "sft" in self.space.options("method"):
            sft = "sft"
        if sft is None:
            self.faults.append(Fault("method.init=sft", "there is no method of kind sft"))
            return None
        outer = {k: v for k, v in cell.outer.items() if not k.startswith("method.")} | {"method": sft}
        found = [
            inner
            for inner in when_values(self.space, cell.block, outer)
            if all(inner[key] in allowed for key, allowed in cell.allowed.items() if key in inner)
        ]
        same = [i for i in found if all(cell.values[key] == v for key, v in i.items() if key in cell.values)]
        found = same or found
        if not found:
            self.faults.append(Fault("method.init=sft", "the SFT run that it starts from is narrowed away"))
            return None
        if len(found) > 1:
            keys = ", ".join(found[0])
            what = f"{len(found)} SFT runs fit as the parent: they differ in {keys}"
            self.faults.append(Fault("method.init=sft", what, "narrow these axes for sft to one value"))
            return None
        values = {**outer, **found[0], **cell.block.fixed, "method": sft}
        values = {k: v for k, v in values.items() if applies(self.space, k, values)}
        return self._run(values, (), cell, parent_only=True)

    def _baselines(self, trained: Sequence[Run]) -> list[Run]:
        baselines: dict[str, Run] = {}
        for run in trained:
            if run.is_parent_only:
                continue
            run_id = baseline_id(run.config, run.choices)
            axes = {"model": run.choices["model"], "peft": run.base}
            baseline = baselines.setdefault(run_id, Run(run_id, "baseline", run.config, run.choices, axes))
            for scoring in run.scorings:
                own = dataclasses.replace(scoring, steps=(0,))
                if own not in baseline.scorings:
                    baseline.scorings.append(own)
        return list(baselines.values())
