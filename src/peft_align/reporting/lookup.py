"""From a step of a training back to its samples: which rows they were, what loss each had, what stands in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.config.schema import Dataset, Preference
from peft_align.config.validate import convert
from peft_align.data.pairs import Pair
from peft_align.data.sources import Split, load_split
from peft_align.errors import Fault, InputError, suggest
from peft_align.store.records import json_number, read_json
from peft_align.store.runs import RunDir


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    Attributes:
        row: its id: `split:number`, of a mixture with the rule behind it; of the project's own data, the row's.
        loss: its own; None where the engine does not say.
        tokens: as it was trained on; of a pair, with the prompt twice.
        pair: its texts; None if the data has no such row any more.
    """

    row: str
    loss: float | None
    tokens: int | None
    pair: Pair | None

    def plain(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        split, number = place(self.row)
        found: dict[str, Any] = {"row": self.row, "split": split, "number": number, "tokens": self.tokens}
        found["loss"] = None if self.loss is None else json_number(self.loss)
        if self.pair is not None:
            turns = [{"role": turn.role, "content": turn.content} for turn in self.pair.prompt]
            found |= {"prompt": turns, "chosen": self.pair.chosen, "rejected": self.pair.rejected}
        return found


@dataclass(frozen=True)
class Step:
    """One step of a training.

    Attributes:
        number: of the step, from 1.
        loss: of its batch, before its update.
        before: the loss of the step before; None for the first.
        norm: of the gradient before it was clipped.
        rows, losses, tokens: of its samples, in order; losses may be empty.
    """

    number: int
    loss: float
    before: float | None
    norm: float | None
    rows: tuple[str, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def jump(self) -> float:
        """How much the loss rose; without end where it is not a number."""
        if not math.isfinite(self.loss):
            return math.inf
        return self.loss - self.before if self.before is not None and math.isfinite(self.before) else 0.0

    def samples(self, pairs: Mapping[str, Pair]) -> list[Sample]:
        """Its samples, those of the largest loss first where they are known.

        Args:
            pairs: of the data, by the id of their row.
        """
        losses: Sequence[float | None] = self.losses or [None] * len(self.rows)
        known = zip(self.rows, losses, self.tokens, strict=True)
        found = [Sample(row, loss, tokens, pairs.get(row)) for row, loss, tokens in known]
        return sorted(found, key=lambda sample: -_size(sample.loss))

    def plain(self, pairs: Mapping[str, Pair]) -> dict[str, Any]:
        """All of it, as JSON has it."""
        numbers = {"loss": self.loss, "loss_before": self.before, "grad_norm": self.norm}
        plain = {name: None if value is None else json_number(value) for name, value in numbers.items()}
        return {"step": self.number, **plain, "samples": [sample.plain() for sample in self.samples(pairs)]}


def _size(loss: float | None) -> float:
    return 0.0 if loss is None else loss if math.isfinite(loss) else math.inf


def place(row: str) -> tuple[str, int | None]:
    """The split of a row and its number there, from 0; None where the row has a name instead."""
    parts = row.split(":")
    if len(parts) > 1 and parts[1].isdigit():
        return parts[0], int(parts[1])
    return "train", None


def find_run(root: Path, run_id: str) -> RunDir:
    """The directory of a run. Raises InputError if there is none, or it is not of the kind that is trained."""
    folder = root / "runs"
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if run_id not in there:
        remedy = suggest(run_id, there) if there else "give the folder of the results: root=DIR"
        raise InputError([Fault(run_id, f"there is no such run in {folder}", remedy)])
    directory = RunDir(root, run_id)
    kind = (read_json(directory.path / "run.json") or {}).get("kind")
    if kind != "train":
        what = f"is a run of kind {kind}: no samples are trained on" if kind else "was never started"
        raise InputError([Fault(run_id, what, "name a run of kind train")])
    return directory


def steps_of(directory: RunDir) -> tuple[Path, list[Step]]:
    """The steps that a run has made, and the file that says so: of the training in progress, or of the last whole one.

    Raises:
        InputError: there are none.
    """
    for path in (directory.attempt / "metrics.jsonl", directory.path / "metrics.jsonl"):
        lines = _lines(path)
        if lines:
            before = [None, *(float(line["loss"]) for line in lines)]
            return path, [_step(line, last) for line, last in zip(lines, before, strict=False)]
    raise InputError([Fault(directory.id, "has made no step yet", "see its train.log")])


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics that are whole."""
    found = []
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with suppress(json.JSONDecodeError, UnicodeDecodeError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and {"step", "loss"} <= line.keys()]


def _step(line: Mapping[str, Any], before: float | None) -> Step:
    rows = tuple(line.get("rows", ()))  # earlier versions did not say
    losses, tokens = tuple(line.get("row_losses", ())), tuple(line.get("row_tokens", ()))
    return Step(line["step"], float(line["loss"]), before, line.get("grad_norm"), rows, losses, tokens)


def step_of(steps: Sequence[Step], number: int) -> Step:
    """The step of that number. Raises InputError if it was not made."""
    for step in steps:
        if step.number == number:
            return step
    made = f"{steps[0].number} to {steps[-1].number}"
    raise InputError([Fault(f"--step {number}", "this step was not made", f"there are steps {made}")])


def worst(steps: Sequence[Step], count: int) -> list[Step]:
    """The steps at which the loss rose most."""
    return sorted(steps, key=lambda step: (-step.jump, step.number))[:count]


def data_of(directory: RunDir, mirror: str | None = None) -> tuple[Split, str | None]:
    """The training split of a run, read again, and a warning if it is not what the run was trained on.

    Args:
        directory: the run's.
        mirror: looked into before the hub; None: as the run did.

    Raises:
        InputError: it cannot be read.
    """
    config = (read_json(directory.path / "run.json") or {}).get("config") or {}
    faults: list[Fault] = []
    dataset = convert(Dataset, config.get("dataset"), "dataset", faults)
    preference = convert(Preference, config.get("preference"), "preference", faults)
    if faults:
        raise InputError(faults)
    split = load_split(dataset, preference, "train", mirror or (config.get("hub") or {}).get("mirror"))
    known = _data_digest(directory)
    changed = known is not None and known != split.source["digest"]
    return split, f"{split.source['name']} has changed since the run was trained on it" if changed else None


def _data_digest(directory: RunDir) -> str | None:
    """Of the data that the run is or was trained on, if something on disk says so."""
    for folder in directory.states():
        if found := ((read_json(folder / "record.json") or {}).get("inputs") or {}).get("data"):
            return str(found)
    found = (((directory.train_record() or {}).get("inputs") or {}).get("data") or {}).get("digest")
    return None if found is None else str(found)
