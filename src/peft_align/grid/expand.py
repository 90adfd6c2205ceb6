"""Cells into runs: each checked, named by its identity, once; their parents and the baselines beside them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_align.config.benchmarks import Benchmark
from peft_align.config.command_line import CommandLine, Override
from peft_align.config.compose import Built, ConfigSpace
from peft_align.config.identity import base_identity, base_label, baseline_id, evaluated_on, merge_id, on_base, train_id
from peft_align.config.judges import Judge
from peft_align.config.schema import (
    DPO,
    GROUPS,
    MAIN_AXES,
    SWEEP_LEVEL,
    Arithmetic,
    Config,
    Merge,
    NoMerge,
    Slerp,
)
from peft_align.errors import Fault, InputError, suggest
from peft_align.grid.benchmarks import find_benchmark, find_judge, lm_eval_has
from peft_align.grid.cells import Cell, applies, check_overrides, complete, input_cell, narrow, when_values
from peft_align.grid.language import Block, When, check_value, load_grid, load_selection
from peft_align.grid.resources import rule_faults
from peft_align.grid.runs import Run, Scoring, Sweep

INHERITED = ("r", "alpha", "target_modules")  # what a run takes from the adapter that it continues


def build_sweep(space: ConfigSpace, line: CommandLine) -> Sweep:
    """The sweep that a command line asks for. Raises InputError with every fault of one phase together."""
    faults: list[Fault] = [*line.faults, *space.faults]
    whole, tuned, per_run = _split(space, line.overrides, faults)
    grids = []
    selected: list[When] = []
    for name in line.grids:
        try:
            grids.append(load_grid(space, name))
        except InputError as error:
            faults += error.faults
    for path in line.selected:
        try:
            selected += load_selection(space, Path(path))
        except InputError as error:
            faults += error.faults
    if faults:
        check_overrides(space, per_run, faults)  # say what is wrong with these too, in the same message
        raise InputError(faults)
    blocks = [block for grid in grids for block in grid.blocks] or [Block("command line")]
    blocks = [dataclasses.replace(block, selected=tuple(selected)) for block in blocks]
    cells, excluded, notes = narrow(space, blocks, per_run)
    runs = _Builder(space, whole, tuned).build(cells, baselines=all(grid.baselines for grid in grids))
    axis_keys = list(MAIN_AXES) + [key for cell in cells for key in dict.fromkeys(cell.axes)]
    axis_keys += ["inputs"] if any(run.kind == "merge" for run in runs) else []
    name = "+".join(grid.name for grid in grids) or "adhoc"
    config = next(iter(runs)).config
    if faults := rule_faults(space, config.resources, getattr(config.launcher, "signal_before", None)):
        raise InputError(faults)
    return Sweep(name, runs, excluded, notes, tuple(dict.fromkeys(axis_keys)), config, line.words)


def _split(
    space: ConfigSpace, overrides: Sequence[Override], faults: list[Fault]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[Override]]:
    """Overrides that hold for the sweep as a whole, those of benchmarks (benchmark.NAME.SETTING), those of its runs."""
    whole: dict[str, Any] = {}
    tuned: dict[str, dict[str, Any]] = {}
    per_run: list[Override] = []
    include_path = next((str(o.values[0]) for o in overrides if o.key == "evaluation.include_path"), None)
    for o in overrides:
        if o.key.startswith("benchmark."):
            _, name, setting = [*o.key.split(".", 2), ""][:3]
            if not setting or o.is_axis:
                what = "a setting of a benchmark has one value" if setting else "names no setting of a benchmark"
                faults.append(Fault(o.text, what, "write benchmark.NAME.SETTING=value"))
            elif name not in space.options("benchmark") and not lm_eval_has(name, include_path):
                what = "there is no such benchmark"
                faults.append(Fault(o.text, what, suggest(name, space.options("benchmark"))))
            tuned.setdefault(name, {})[setting] = o.values[0]
        elif o.key.partition(".")[0] not in SWEEP_LEVEL:
            per_run.append(o)
        elif o.is_axis:
            faults.append(Fault(o.text, "holds for a sweep as a whole", "give one value"))
        else:
            whole[o.key] = check_value(space, o.key, o.values[0], o.text, faults)
    return whole, tuned, per_run


class _Builder:
    """Builds runs from cells, each run once."""

    def __init__(self, space: ConfigSpace, whole: dict[str, Any], tuned: dict[str, dict[str, Any]]) -> None:
        self.space, self.whole, self.tuned = space, whole, tuned
        self.faults: list[Fault] = []
        self.unfit: Counter[tuple[str, str]] = Counter()
        self.runs: dict[str, Run] = {}
        self._benchmarks: dict[tuple[str, str | None], Benchmark | None] = {}
        self._judges: dict[tuple[str, str, Judge], tuple[str, Judge] | None] = {}

    def build(self, cells: Sequence[Cell], *, baselines: bool) -> list[Run]:
        """The runs of the cells, parents before children, baselines last. Raises InputError."""
        for cell in cells:
            self._merge(cell) if cell.block.kind == "merge" else self._run(cell.values, cell.axes, cell)
        for (dataset, preference), count in self.unfit.items():
            loaders = ", ".join(self.space.node("preference", preference)["loaders"])
            runs = "1 run" if count == 1 else f"{count} runs"
            what = f"dataset {dataset} has no preference '{preference}' ({runs})"
            hint = f"it is defined for {loaders}; exclude these cells or narrow the axis"
            self.faults.append(Fault(f"preference={preference}", what, hint))
        known = {name for name, _ in self._benchmarks}
        for name in self.tuned.keys() - known:
            hint = suggest(name, sorted(known))
            self.faults.append(Fault(f"benchmark.{name}", "is not among the benchmarks that are evaluated", hint))
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
        if config.preference.loaders is not None and config.dataset.loader not in config.preference.loaders:
            self.unfit[choices["dataset"], choices["preference"]] += 1
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
                if key in values and key not in cell.selected and values[key] != theirs:
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
        last = config.train.max_steps
        asked = {"train.checkpoint_steps": config.train.checkpoint_steps, "evaluation.steps": config.evaluation.steps}
        for key, given in asked.items():
            if beyond := [step for step in given if step > last]:
                fault = Fault(key, f"step {beyond[0]} is beyond train.max_steps={last}", f"give {key}=[{last}] too")
                self.faults += [fault] if fault not in self.faults else []
                break  # one follows from the other
        run = self.runs.get(run_id)
        if run is None:
            named = {key: choices[key] for key in MAIN_AXES} | {k: v for k, v in values.items() if k in axes}
            run = Run(run_id, "train", config, choices, named, parents, is_parent_only=parent_only)
            self.runs[run_id] = run
        else:
            run.axes |= {k: v for k, v in values.items() if k in axes}
            run.is_parent_only = run.is_parent_only and parent_only
        steps = tuple(sorted(set(config.evaluation.steps)))
        run.steps = tuple(sorted({*run.steps, *config.train.checkpoint_steps, *([] if parent_only else steps)}))
        if not parent_only:
            scoring = self._scoring(config, choices, steps)
            if scoring not in run.scorings:
                run.scorings.append(scoring)
        return run

    def _scoring(self, config: Config, choices: dict[str, str], steps: tuple[int, ...]) -> Scoring:
        """How one cell of the grid asks its checkpoints to be evaluated."""
        evaluation = config.evaluation
        benchmarks: list[tuple[str, Benchmark]] = []
        judges: list[tuple[str, str, Judge]] = []
        for name in dict.fromkeys(evaluation.benchmarks):
            cache_key = (name, evaluation.include_path)
            if cache_key not in self._benchmarks:
                self._benchmarks[cache_key] = find_benchmark(
                    self.space, name, evaluation.include_path, self.tuned.get(name, {}), self.faults
                )
            found = self._benchmarks[cache_key]
            if found is None:
                continue
            benchmarks.append((name, found))
            of_sweep = (choices["judge"], config.judge)
            if (name, *of_sweep) not in self._judges:
                self._judges[name, *of_sweep] = find_judge(self.space, name, found, of_sweep, self.faults)
            if judge := self._judges[name, *of_sweep]:
                judges.append((name, *judge))
        return Scoring(
            steps,
            evaluation,
            config.dataset,
            config.preference,
            choices["dataset"],
            choices["preference"],
            config.train.max_length,
            evaluated_on(config.peft, evaluation.base_precision),
            tuple(benchmarks),
            tuple(judges),
        )

    def _parent(self, cell: Cell) -> Run | None:
        """The SFT run with the same cell: what the block gives for method=sft in this place."""
        options = self.space.options("method")
        kinds = [option for option in options if self.space.node("method", option).get("kind") == "sft"]
        sft = next((option for option in ("sft", *kinds) if option in kinds), None)
        if sft is None:
            self.faults.append(Fault("method.init=sft", "there is no method of kind sft"))
            return None
        outer = {k: v for k, v in cell.outer.items() if not k.startswith("method.")} | {"method": sft}
        block = dataclasses.replace(cell.block, fixed=cell.block.fixed | {"method": sft})
        found = [
            inner
            for inner in when_values(self.space, block, outer)
            if all(inner[key] in allowed for key, allowed in cell.allowed.items() if key in inner)
        ]
        same = [i for i in found if all(cell.values[key] == v for key, v in i.items() if key in cell.values)]
        found = same or found
        if not found:
            self.faults.append(Fault("method.init=sft", "the SFT run that it starts from is narrowed away"))
            return None
        if len(found) > 1:
            keys = ", ".join(found[0])
            what = f"the SFT run that it starts from is not one run but {len(found)}, which differ in {keys}"
            self.faults.append(Fault("method.init=sft", what, "narrow these axes for sft to one value"))
            return None
        values = complete(self.space, block, outer, found[0])
        selected = frozenset(values) - {*outer, *found[0], *block.fixed}
        values = {k: v for k, v in values.items() if applies(self.space, k, values)}
        parent = dataclasses.replace(cell, block=block, values=values, outer=outer, selected=selected)
        return self._run(values, (), parent, parent_only=True)

    def _merge(self, cell: Cell) -> None:
        """The merge of one cell, and the training runs that are its inputs."""
        place = f"block {cell.block.name}"
        asked = [input_cell(self.space, cell, selector) for selector in cell.inputs]
        found = [self._run(each.values, (), each, parent_only=True) for each in asked]
        inputs = [run for run in found if run is not None]
        if len(inputs) < len(found):
            return
        first = inputs[0]
        choices = first.choices | {k: v for k, v in cell.values.items() if k in GROUPS}
        assigned = asked[0].values | cell.values | self.whole
        assigned = {k: v for k, v in assigned.items() if k not in GROUPS and applies(self.space, k, choices)}
        built = self.space.build(choices, assigned, self.faults)
        if built is None:
            return
        own = built[0]
        config = dataclasses.replace(first.config, merge=own.merge, evaluation=own.evaluation, judge=own.judge)
        if told := _unfit(config, inputs):
            self.faults += [Fault(f"{place}: merge={choices['merge']}", told)]
            return
        choices |= {k: "+".join(dict.fromkeys(run.choices[k] for run in inputs)) for k in MAIN_AXES}
        label = "+".join(_labels(inputs))
        names = [choices["dataset"], label, choices["merge"], choices["model"], choices["peft"]]
        parents = tuple(run.id for run in inputs)
        run_id = merge_id(config, built[1]["merge"], names, parents)
        axes = {k: choices[k] for k in MAIN_AXES} | {k: v for k, v in cell.values.items() if k in cell.axes}
        axes |= {"merge": choices["merge"], "inputs": label}
        run = self.runs.setdefault(run_id, Run(run_id, "merge", config, choices, axes, parents))
        if isinstance(own.merge, Merge) and own.merge.save != "none":
            run.saves = tuple(sorted({*run.saves, own.merge.save}))
        steps = (max(each.config.train.max_steps for each in inputs),)
        for each in inputs:
            asked_so = dataclasses.replace(each.config, evaluation=own.evaluation, judge=own.judge)
            scoring = self._scoring(asked_so, each.choices | {"judge": choices["judge"]}, steps)
            if scoring not in run.scorings:
                run.scorings.append(scoring)

    def _baselines(self, trained: Sequence[Run]) -> list[Run]:
        baselines: dict[str, Run] = {}
        for run in trained:
            if run.is_parent_only:
                continue
            for scoring in run.scorings:
                config = dataclasses.replace(run.config, peft=on_base(run.config.peft, scoring.base))
                run_id = baseline_id(config, run.choices)
                axes = {"model": run.choices["model"], "peft": base_label(config.peft)}
                baseline = baselines.setdefault(run_id, Run(run_id, "baseline", config, run.choices, axes))
                own = dataclasses.replace(scoring, steps=(0,))
                if own not in baseline.scorings:
                    baseline.scorings.append(own)
        return list(baselines.values())


def _labels(inputs: Sequence[Run]) -> list[str]:
    """Names of a merge's inputs: sft_harmless; with the seed, or the end of the id, where others have that name."""
    names = [f"{run.choices['method']}_{run.choices['preference']}" for run in inputs]
    for more in ([f"s{run.config.seed}" for run in inputs], [run.id[-6:] for run in inputs]):
        if len(set(names)) < len(names):
            names = [f"{name}_{each}" for name, each in zip(names, more, strict=True)]
    return names


def _unfit(config: Config, inputs: Sequence[Run]) -> str:
    """Why these runs cannot be merged so, or nothing."""
    merge = config.merge
    if isinstance(merge, NoMerge):
        return "is no merge"
    if len({run.id for run in inputs}) < len(inputs):
        return "two of its inputs are the same run: name what they differ in"
    if any(
        base_identity(run.config.model, run.config.peft) != base_identity(config.model, config.peft) for run in inputs
    ):
        return "its inputs were trained on different bases: the model and its precision must be the same"
    if isinstance(merge, Slerp) and len(inputs) != 2:
        return f"slerp merges two inputs, not {len(inputs)}: name two, or take another merge, e.g. linear"
    if isinstance(merge, Arithmetic) and merge.sparsify == "none" and (merge.density != 1 or merge.rescale):
        return "merge.density and merge.rescale change nothing without merge.sparsify"
    if isinstance(merge, Arithmetic) and merge.weights is not None and len(merge.weights) != len(inputs):
        return f"merge.weights has {len(merge.weights)} values for {len(inputs)} inputs: give one for each"
    return ""
