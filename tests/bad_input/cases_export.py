"""What cannot be exported, and where it cannot be put."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bad_input import Case, line, write
from cases_sweeps import WORDS
from sweeping import finish_sweep, trained

from peft_align.grid.serialize import write_identity
from peft_align.store.runs import RunDir

AREA = "export"


def finished(folder: Path) -> tuple[str, str]:
    """A sweep that is done under folder/outputs: the ids of its training and of its baseline."""
    sweep = finish_sweep(folder / "outputs", *WORDS)
    for run in sweep.runs:
        write_identity(run, RunDir(folder / "outputs", run.id))
    (base,) = (run for run in sweep.runs if run.kind == "baseline")
    return trained(sweep)[0].id, base.id


def of_a_run(
    name: str, *told: str, words: tuple[str, ...] = (), before: Callable[[Path, str], object] = lambda folder, run: None
) -> Case:
    """A run that is done, with something done to it before; of the words, RUN and BASE stand for ids."""

    def prepare(folder: Path) -> list[str]:
        run, base = finished(folder)
        before(folder, run)
        return ["export", *(word.replace("RUN", run).replace("BASE", base) for word in words or ("RUN",))]

    return Case(AREA, name, prepare, told)


def in_run(name: str, content: str | bytes) -> Callable[[Path, str], object]:
    """Another content of a file of the run."""

    def change(folder: Path, run: str) -> None:
        path = folder / "outputs/runs" / run / name
        path.unlink()  # a checkpoint may be linked to it
        write(path, content)

    return change


def in_place(name: str, content: str) -> Callable[[Path, str], object]:
    return lambda folder, run: write(folder / name, content)


def without(name: str) -> Callable[[Path, str], object]:
    return lambda folder, run: (folder / "outputs/runs" / run / name).unlink()


CASES = [
    line("no run", "export", told=("0 runs are named", "give the id of a run"), area=AREA),
    line("two runs", "export", "a", "b", told=("2 runs are named; one is exported at a time",), area=AREA),
    line(
        "no results, all faults at once",
        *("export", "a", "--stp=1", "rot=x", "--step", "x", "license=My own", "--push", "a/b/c", "root="),
        told=(
            *("--stp=1: no such flag (did you mean '--step'?)", "did you mean 'root'?", "'x' is not a whole number"),
            *(
                "is no licence as the hub writes them",
                "'a/b/c' is no repository of the hub",
                "root: the value is empty",
            ),
            "HF_HUB_OFFLINE is set",
        ),
        faults=7,
        area=AREA,
    ),
    line("a folder without results", "export", "a", told=("there is no such run", "root=DIR"), area=AREA),
    line(
        "a flag without its value", "export", "a", "--to", "--step", "3", told=("--to: the value is empty",), area=AREA
    ),
    line("a flag twice", "export", "a", "--step=1", "--step=2", told=("'--step' is given twice",), area=AREA),
    line("step that is none", "export", "a", "--step", "0", told=("'0' is not a whole number above 0",), area=AREA),
    of_a_run("a run misspelt", "there is no such run", "did you mean", words=("RUNx",)),
    of_a_run("a baseline", "is an unaligned base: there is no adapter", words=("BASE",)),
    of_a_run("a step that was not kept", "has no checkpoint of it", "kept: 4", words=("RUN", "--step", "3")),
    of_a_run("a run that is not done", "is not done", "finish it", before=without("train.json")),
    of_a_run("a damaged record", "its train.json is damaged", before=in_run("train.json", "[]")),
    of_a_run("no run.json", "has no run.json", before=without("run.json")),
    of_a_run("run.json that is a list", "has no run.json", before=in_run("run.json", "[]")),
    of_a_run(
        "another folder in its place",
        *("is there, and is no export of peft_align", "--to"),
        words=("RUN", "--to", "mine"),
        before=in_place("mine/notes.txt", "mine"),
    ),
    of_a_run(
        "a file in its place", "mine: is no folder", words=("RUN", "--to=mine"), before=in_place("mine", "my notes")
    ),
    of_a_run("a place among the runs", "is where runs are kept", words=("RUN", "--to", "outputs/runs/mine")),
    of_a_run("no folder of options", "'nowhere' is not a folder", words=("RUN", "--config-dir", "nowhere")),
]
