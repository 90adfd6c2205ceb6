"""Damaged results: records, notes, manifests, submissions; and places where nothing can be read or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bad_input import REFUSED, TOLD, Case, as_plain_user, write
from sweeping import finish_sweep, trained

from peft_align.grid.runs import Run

WORDS = (
    *("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=4"),
    "evaluation.benchmarks=[everyday_mc]",
)
Damage = Callable[[Path], object]


def done(folder: Path, words: tuple[str, ...] = WORDS) -> Run:
    """A sweep under folder/outputs that is done; returns its first training run."""
    return trained(finish_sweep(folder / "outputs", *words))[0]


def damaged(
    name: str,
    verb: str,
    damage: Damage,
    *told: str,
    code: int = TOLD,
    words: tuple[str, ...] = WORDS,
    faults: int = 1,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    of: tuple[str, ...] = (),
) -> Case:
    """A sweep that is done, with something damaged: `damage` is given the folder of its training run.

    `of` are the sweep's own words, where the program is given others.
    """

    def prepare(folder: Path) -> list[str]:
        run = done(folder, of or WORDS)
        damage(folder / "outputs/runs" / run.id)
        return [verb, *words]

    return Case("sweeps", f"{name}, {verb}", prepare, told, code, faults, around=around)


def content_of(name: str, content: str | bytes) -> Damage:
    """Another content of a file of the run."""
    return lambda run: write(run / name, content)


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """A record with something else in it."""

    def damage(run: Path) -> None:
        (path,) = run.glob(name)
        record = json.loads(path.read_text(encoding="utf-8"))
        change(record)
        write(path, json.dumps(record))

    return damage


def scored(content: str | bytes) -> Damage:
    return lambda run: [write(path, content) for path in run.glob("evaluations/*/record.json")]


def instead(name: str, *, folder: bool) -> Damage:
    """A folder in the place of a file, or a file in that of a folder."""

    def damage(run: Path) -> None:
        path = run / name
        if path.is_dir():
            path.rename(path.with_name("moved"))
        path.unlink(missing_ok=True)
        path.mkdir() if folder else write(path, "x")

    return damage


TRAINED, EVALUATION = "train.json", "evaluations/*/record.json"
RECORDS = [
    damaged(
        "record that is not JSON",
        "plan",
        content_of(TRAINED, b"\x00\xff{"),
        "1 × retrain: its train.json is damaged: no JSON",
    ),
    damaged(
        "record that is empty", "plan", content_of(TRAINED, ""), "retrain: its train.json is damaged: no JSON object"
    ),
    damaged(
        "record that is a list", "plan", content_of(TRAINED, "[1, 2]"), "its train.json is damaged: no JSON object"
    ),
    damaged(
        "record that is a list", "status", content_of(TRAINED, "[1, 2]"), "retrain: its train.json is damaged: no JSON"
    ),
    damaged("record that is a list", "report", content_of(TRAINED, "[1, 2]"), "1 of 2 runs are complete"),
    damaged(
        "record nested too deeply",
        "plan",
        content_of(TRAINED, "[" * 100_000),
        "its train.json is damaged: no JSON object",
    ),
    damaged(
        "record of another format",
        "plan",
        edited(TRAINED, lambda r: r.update(format=99)),
        "retrain: its train.json is of format 99, and this version reads 1",
    ),
    damaged(
        "record without checkpoints",
        "plan",
        edited(TRAINED, lambda r: r.pop("checkpoints")),
        "its train.json is damaged: checkpoints is missing",
    ),
    damaged(
        "record with no checkpoint",
        "plan",
        edited(TRAINED, lambda r: r.update(checkpoints={})),
        "its train.json is damaged: checkpoints is empty",
    ),
    damaged(
        "record whose checkpoints are a list",
        "status",
        edited(TRAINED, lambda r: r.update(checkpoints=[4])),
        "its train.json is damaged: checkpoints is no mapping",
    ),
    damaged(
        "record of a step that is none",
        "plan",
        edited(TRAINED, lambda r: r["checkpoints"].update(last={})),
        "checkpoints.last is named after no whole number",
    ),
    damaged(
        "record whose size is text",
        "plan",
        edited(TRAINED, lambda r: r["checkpoints"]["4"]["files"]["adapter_config.json"].update(size="3")),
        "checkpoints.4.files.adapter_config.json.size is not a whole number",
    ),
    damaged(
        "record whose digest is null",
        "report",
        edited(TRAINED, lambda r: r["checkpoints"]["4"].update(digest=None)),
        "1 of 2 runs are complete",
    ),
    damaged(
        "record whose inputs are text",
        "plan",
        edited(TRAINED, lambda r: r.update(inputs="data")),
        "its train.json is damaged: inputs is no mapping",
    ),
    damaged(
        "record whose time is text",
        "plan",
        edited(TRAINED, lambda r: r.update(seconds_per_step="fast")),
        "its train.json is damaged: seconds_per_step is not a finite number",
    ),
    damaged(
        "adapter that is gone",
        "plan",
        lambda run: (run / "adapter/adapter_model.safetensors").unlink(),
        "retrain: adapter/adapter_model.safetensors is missing",
    ),
    damaged(
        "adapter that is cut off", "plan", content_of("adapter/adapter_model.safetensors", "x"), "has 1 bytes, not"
    ),
    damaged(
        "what the run is, gone", "plan", lambda run: (run / "run.json").unlink(missing_ok=True), "done: 2, to do: 0"
    ),
    damaged(
        "scores that are not JSON", "plan", scored(b"\xff"), "evaluate everyday_mc (its record.json is damaged: no JSON"
    ),
    damaged("scores that are a list", "report", scored("[]"), "1 of 2 runs are complete"),
    damaged(
        "scores without metrics",
        "plan",
        edited(EVALUATION, lambda r: r.pop("metrics")),
        "its record.json is damaged: metrics is missing",
    ),
    damaged(
        "scores that are text",
        "plan",
        edited(EVALUATION, lambda r: r["metrics"][0].update(value="half")),
        "its record.json is damaged: metrics[0].value is not a number",
    ),
    damaged(
        "scores of a step that is text",
        "status",
        edited(EVALUATION, lambda r: r.update(step="4")),
        "its record.json is damaged: step is not a whole number",
    ),
    damaged(
        "scores of another format",
        "plan",
        edited(EVALUATION, lambda r: r.update(format="2")),
        "its record.json is of format 2",
    ),
]


SEARCH = (
    *("model=tiny", "dataset=everyday", "method=sft", "peft=lora", "train.max_steps=4", "peft.r=4,8"),
    *("evaluation.benchmarks=[preference]", "evaluation.heldout_split=validation"),
)
RECORDS += [
    damaged(
        "record that is a list",
        "evaluate",
        content_of(TRAINED, "[1, 2]"),
        "0 runs to evaluate, 1 not made yet",
        "1 of 2 runs are complete",
    ),
    damaged(
        "record that is a list",
        "select",
        content_of(TRAINED, "[1, 2]"),
        "adhoc: 1 of its 3 runs are not done",
        "finish it first",
        code=REFUSED,
        words=SEARCH,
        of=SEARCH,
    ),
    damaged(
        "scores without the one that decides",
        "select",
        lambda run: None,
        "its score of preference has no response_loss",
        "evaluate it again",
        code=REFUSED,
        words=SEARCH,
        of=SEARCH,
    ),
]


def undone(notes: dict[str, str | bytes]) -> Damage:
    """The run is not done, and has these notes."""

    def damage(run: Path) -> None:
        (run / TRAINED).unlink()
        for name, content in notes.items():
            write(run / name, content)

    return damage


NOTES = [
    damaged("progress that is not JSON", "status", undone({"progress.json": b"\xff\x00"}), "1 waiting"),
    damaged(
        "progress of other types",
        "status",
        undone({"progress.json": '{"stage": 3, "step": "x", "time": [], "eta": NaN}'}),
        "1 lost",
        "unknown stage: its process is gone",
    ),
    damaged("failure that is a list", "status", undone({"failed.json": "[]"}), "1 waiting"),
    damaged(
        "failure that says nothing",
        "status",
        undone({"failed.json": "{}"}),
        "1 failed",
        "unknown stage: failed.json does not say why",
    ),
    damaged(
        "failure of other types",
        "plan",
        undone({"failed.json": '{"stage": {}, "reason": 3}'}),
        "failed before:",
        "failed.json does not say why",
    ),
    damaged(
        "failure whose log is a number",
        "status",
        undone({"failed.json": '{"stage": "train", "reason": "x", "log": 3}'}),
        "train: x",
    ),
    damaged("history of binary garbage", "plan", undone({"history.jsonl": bytes(range(256)) * 9}), "done: 1, to do: 1"),
]


def manifest(content: str | bytes) -> Damage:
    return lambda run: write(run.parents[1] / "sweeps/adhoc-0/sweep.json", content)


def submission(content: str | bytes) -> Damage:
    return lambda run: write(run.parents[1] / "sweeps/adhoc-0/slurm/1/submission.json", content)


SWEEPS = [
    damaged(
        "manifest that is not JSON",
        "status",
        manifest(b"\xff"),
        "sweep.json: is damaged: no JSON object",
        "name the sweep",
        code=REFUSED,
        words=(),
    ),
    damaged(
        "manifest that is a list",
        "report",
        manifest("[]"),
        "sweep.json: is damaged: no JSON object",
        code=REFUSED,
        words=(),
    ),
    damaged(
        "manifest whose command is text",
        "cancel",
        manifest('{"command": "+grid=main", "config_dirs": []}'),
        "sweep.json: is damaged: command is no list",
        code=REFUSED,
        words=(),
    ),
    damaged(
        "manifest without folders",
        "status",
        manifest('{"command": []}'),
        "sweep.json: is damaged: config_dirs is missing",
        code=REFUSED,
        words=(),
    ),
    damaged(
        "manifest whose folder is gone",
        "status",
        manifest('{"command": ["seed=1"], "config_dirs": ["/nowhere"]}'),
        "--config-dir: '/nowhere' is not a folder",
        code=REFUSED,
        words=(),
    ),
    damaged(
        "manifest of what is no command",
        "status",
        manifest('{"command": ["seed=x"], "config_dirs": []}'),
        "seed=x: 'x' is not a whole number",
        code=REFUSED,
        words=(),
    ),
    damaged("submission that is not JSON", "status", submission(b"\xff"), "slurm/1: its submission.json is damaged"),
    damaged(
        "submission of other types",
        "cancel",
        submission('{"format": 1, "arrays": 3}'),
        "slurm/1: its submission.json is damaged: time is missing",
        "see squeue",
        "no jobs of adhoc were submitted",
        code=REFUSED,
    ),
]


def root_of(make: Callable[[Path], object], verb: str, name: str, *told: str, words: tuple[str, ...] = WORDS) -> Case:
    """A root that is none."""

    def prepare(folder: Path) -> list[str]:
        make(folder / "outputs")
        return [verb, *words]

    return Case("sweeps", f"{name}, {verb}", prepare, told)


def loop(path: Path) -> None:
    path.symlink_to(path)


LOOKING = ("plan", "status", "report", "sweep", "evaluate", "judge", "select", "cancel", "train")
PLACES = [
    *(
        root_of(
            lambda path: write(path, "x"),
            verb,
            "root that is a file",
            "root=outputs: is not a folder",
            "give the folder",
        )
        for verb in LOOKING
    ),
    *(
        root_of(loop, verb, "root that links to itself", "root=outputs: is a link that leads nowhere")
        for verb in LOOKING[:4]
    ),
    root_of(
        lambda path: path.symlink_to("nowhere"), "sweep", "root that links to nothing", "is a link that leads nowhere"
    ),
    root_of(
        lambda path: write(path / "runs", "x"),
        "sweep",
        "runs that are a file",
        "outputs/runs: is no folder",
        "move it away",
    ),
    root_of(
        lambda path: write(path / "sweeps", "x"), "sweep", "sweeps that are a file", "outputs/sweeps: is no folder"
    ),
    damaged(
        "lock that is a folder",
        "sweep",
        lambda run: (undone({})(run), instead("lock", folder=True)(run)),
        "lock: is a folder, and a file is to be written there",
        "move it away",
        code=REFUSED,
    ),
    damaged(
        "progress that is a folder",
        "train",
        lambda run: (undone({})(run), instead("progress.json", folder=True)(run)),
        "progress.json: is a folder, and a file is to be written there",
        code=REFUSED,
    ),
    damaged(
        "adapter that is a file",
        "sweep",
        lambda run: (undone({})(run), instead("adapter", folder=False)(run)),
        "adapter: is no folder, and one is to be made there",
        code=REFUSED,
    ),
    damaged(
        "record that is a folder",
        "plan",
        instead(TRAINED, folder=True),
        "train.json: Is a directory",
        "move away",
        code=REFUSED,
        faults=0,
    ),
    damaged(
        "record that links to itself",
        "status",
        lambda run: ((run / TRAINED).unlink(), loop(run / TRAINED)),
        "train.json: Too many levels of symbolic links",
        code=REFUSED,
        faults=0,
    ),
    damaged(
        "root whose name is too long",
        "sweep",
        lambda run: None,
        "File name too long",
        code=REFUSED,
        faults=0,
        words=(*WORDS, "seed=7", f"root={'x' * 300}"),
    ),
    damaged(
        "root that cannot be written",
        "sweep",
        lambda run: (undone({})(run), run.parents[1].joinpath("sweeps").chmod(0o500)),
        "Permission denied",
        "another root=DIR",
        code=REFUSED,
        faults=0,
        around=as_plain_user,
    ),
    damaged(
        "run that cannot be read",
        "plan",
        lambda run: (run / TRAINED).chmod(0o000),
        "train.json: Permission denied",
        code=REFUSED,
        faults=0,
        around=as_plain_user,
    ),
]


def reported(name: str, *words: str, told: tuple[str, ...], faults: int = 1) -> Case:
    """What `report` cannot report on, beside a sweep that is done."""

    def prepare(folder: Path) -> list[str]:
        done(folder)
        write(folder / "results.csv", "run_id,kind\n")
        write(folder / "noise.parquet", "PAR1 but no more")
        write(folder / "elsewhere/sweep.json", (folder / "outputs/sweeps/adhoc-0/sweep.json").read_bytes())
        return ["report", *words]

    return Case("sweeps", f"{name}, report", prepare, told, faults=faults)


REPORTED = [
    reported("no such sweep", "--sweeps", "man", told=("there is no such sweep under outputs", "adhoc-0")),
    reported("sweeps without a name", "--sweeps", told=("--sweeps: has no value",)),
    reported("sweep outside of a root", "--sweeps", "elsewhere", told=("give ROOT/sweeps/NAME",)),
    reported("sweeps with other settings", "--sweeps", "adhoc", "seed=1", told=("seed=1: with --sweeps",)),
    reported("sweeps and a table", "--sweeps", "adhoc", "--from", "results.csv", told=("give one of them",)),
    reported("a table and what was published", "--published", "--from", "a.parquet", told=("give one of them",)),
    reported("published numbers of a grid", "--published", "+grid=main", told=("+grid=main: with --published",)),
    reported("published numbers with a value", "--published=3", told=("--published takes no value",)),
    reported("table that is a CSV", "--from", "results.csv", told=("is a CSV", "results.parquet")),
    reported("tables that are none", "--from", "noise.parquet", "no.parquet", told=("damaged", "no such"), faults=2),
    reported("folder of a sweep to write to", "--to", "elsewhere", told=("is the folder of a sweep",)),
    reported("file to write to", "--to", "results.csv", told=("is not a folder",)),
    reported("port that is none", "--serve", "web", told=("--serve web: is no whole number from 0 to 65535",)),
    reported("pause without a server", "--every", "5", told=("--every: says how often", "add --serve")),
    reported("pause that is none", "--serve", "--every", "0", told=("--every 0: is no number from 0.1 to 86400",)),
]

CASES = [*RECORDS, *NOTES, *SWEEPS, *PLACES, *REPORTED]
