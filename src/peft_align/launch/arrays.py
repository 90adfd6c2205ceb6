"""Runs into job arrays: one array for each stage, class of resources and generation of parents.

    train (+ evaluate where it asks for the same) -> children -> merges -> evaluate -> judge -> report

A run that others start from is trained in one array and evaluated in another, so that nothing waits for its scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from peft_align.config.launchers import Allocation, Resources, Slurm
from peft_align.grid.order import remade
from peft_align.grid.planner import Item
from peft_align.grid.resources import allocation
from peft_align.grid.runs import Run

MAKING = {"train": "train", "merge": "merge"}  # kind of run -> the stage that makes it


@dataclass
class Array:
    """Tasks that Slurm starts alike.

    Attributes:
        name: unique in its submission.
        stages: what every task does of its runs.
        judges: of the stage judge: the options that judge.
        asked: what a task asks for.
        tasks: the runs of each task.
        after: arrays of this submission, and jobs of earlier ones, that must have ended.
        job: the id that Slurm gave it.
    """

    name: str
    stages: tuple[str, ...]
    asked: Allocation
    tasks: list[list[str]] = field(default_factory=list)
    judges: tuple[str, ...] | None = None
    after: list[str] = field(default_factory=list)
    after_jobs: list[str] = field(default_factory=list)
    job: str | None = None


@dataclass(frozen=True)
class _Need:
    """Stages of one run that are done together, and the runs whose making must have ended before."""

    run: Run
    stages: tuple[str, ...]
    generation: int
    asked: Allocation
    judge: str | None = None
    makers: tuple[str, ...] = ()


def plan_arrays(
    items: Sequence[Item],
    resources: Resources,
    launcher: Slurm,
    largest: int,
    live: Mapping[tuple[str, str], str],
    stages: Sequence[str],
) -> list[Array]:
    """The arrays that do what is missing, in an order in which they can be submitted.

    Args:
        items: parents before children.
        resources: what the sweep asks for.
        launcher: how it is packed.
        largest: tasks that an array of this cluster may have.
        live: (run, stage) -> the job that is going to do it already; of judges, the stage is "judge OPTION".
        stages: those that are asked for.
    """
    made_by: dict[tuple[str, str], list[str]] = {}
    arrays: list[Array] = []
    groups: dict[tuple[object, ...], list[_Need]] = {}
    for need in _needs(items, resources, live, stages):
        # a generation of parents is one array: its children hang on it as a whole
        groups.setdefault((need.generation, need.stages, need.judge, repr(need.asked)), []).append(need)
    for (_, kinds, judge, _), members in sorted(groups.items(), key=lambda entry: _rank(entry[0])):
        assert isinstance(kinds, tuple)
        for chunk in _chunks(_tasks(members, launcher.runs_per_task), min(largest, launcher.max_array or largest)):
            array = Array(f"{len(arrays):02d}-{'-'.join(kinds)}", kinds, members[0].asked)
            array.judges = (str(judge),) if judge else None
            array.tasks = [[need.run.id for need in task] for task in chunk]
            behind = arrays[-1].name if launcher.throttle and _same(arrays, array) else None
            inputs = [maker for task in chunk for need in task for maker in need.makers]
            inputs += [need.run.id for task in chunk for need in task if "train" not in kinds and "merge" not in kinds]
            before = _before(kinds)
            array.after = list(dict.fromkeys(n for run in inputs for s in before for n in made_by.get((run, s), ())))
            array.after += [behind] if behind and behind not in array.after else []
            array.after_jobs = sorted({job for run in inputs for s in before if (job := live.get((run, s)))})
            arrays.append(array)
            for task in chunk:
                for need in task:
                    for stage in kinds:
                        made_by.setdefault((need.run.id, stage), []).append(array.name)
    return arrays


def _needs(
    items: Sequence[Item], resources: Resources, live: Mapping[tuple[str, str], str], stages: Sequence[str]
) -> Iterator[_Need]:
    parents = {parent for item in items if item.to_make for parent in item.run.parents}
    again = remade(items)
    generations: dict[str, int] = {}
    for item in items:
        run, making = item.run, MAKING.get(item.run.kind)
        makes = making in stages and (run.id in again or bool(item.to_save)) and (run.id, making or "") not in live
        scored = bool(item.missing or (run.id in again and item.requests))
        evaluates = "evaluate" in stages and scored and (run.id, "evaluate") not in live
        above = [generations[parent] for parent in run.parents if parent in generations]
        generation = generations[run.id] = 1 + max(above) if above else 0
        scoring = allocation(resources, "evaluate", run)
        if makes:
            assert making is not None
            asked = allocation(resources, making, run)
            together = evaluates and asked == scoring and run.id not in parents
            yield _Need(run, (making, *(["evaluate"] if together else [])), generation, asked, makers=run.parents)
            evaluates = evaluates and not together
        if evaluates:
            yield _Need(run, ("evaluate",), generation, scoring)
        if "judge" in stages:
            judged = item.judgements if run.id in again else [judgement for judgement, _ in item.unjudged]
            for option in dict.fromkeys(judgement.option for judgement in judged):
                if (run.id, f"judge {option}") not in live:
                    yield _Need(run, ("judge",), 0, allocation(resources, "judge", run, option), option)


def _rank(key: tuple[object, ...]) -> tuple[object, ...]:
    generation, kinds, judge, asked = key
    assert isinstance(kinds, tuple)
    order = ("train", "merge", "evaluate", "judge")
    first = order.index(kinds[0])
    return (first >= 2, first, generation, kinds, judge or "", asked)


def _before(kinds: tuple[object, ...]) -> tuple[str, ...]:
    """The stages whose products these read."""
    return ("train", "merge", "evaluate") if "judge" in kinds else ("train", "merge")


def _tasks(members: Sequence[_Need], size: int) -> list[list[_Need]]:
    """Runs of one base model together, so that a task loads it once."""
    bases: dict[str, list[_Need]] = {}
    for need in members:
        peft = need.run.config.peft
        key = repr((need.run.config.model, peft.base_precision, peft.double_quantization, peft.compute_dtype))
        bases.setdefault(key, []).append(need)
    return [group[i : i + size] for group in bases.values() for i in range(0, len(group), size)]


def _chunks(tasks: Sequence[list[_Need]], size: int) -> Iterator[Sequence[list[_Need]]]:
    for i in range(0, len(tasks), size):
        yield tasks[i : i + size]


def _same(arrays: Sequence[Array], array: Array) -> bool:
    """Whether the array before is an earlier part of the same: with a throttle, one part runs at a time."""
    if not arrays:
        return False
    before = arrays[-1]
    return (before.stages, before.judges, before.asked) == (array.stages, array.judges, array.asked)
