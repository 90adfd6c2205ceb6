"""What training cannot go on from: values that are not finite, and files that cannot be written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peft_align.data.tokenization import TokenizedPair
from peft_align.errors import WorkError
from peft_align.store.records import json_number
from peft_align.store.references import sample_digest
from peft_align.training.state import CANNOT_WRITE

NAMED = 8  # rows that a message names, at most


class TrainingFailed(WorkError):
    """Training cannot go on; the message says why.

    Attributes:
        details: what the record of the failure has besides: the step, the value, the rows and what each had.
    """

    def __init__(self, text: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self.details = dict(details or {})


@contextmanager
def must_be_written(what: str) -> Iterator[None]:
    """Around the writing of something that a run is not done without. Raises TrainingFailed if it cannot be written."""
    try:
        yield
    except CANNOT_WRITE as error:
        raise TrainingFailed(f"{what} cannot be written: {' '.join(str(error).split())}") from error


def largest(weights: Sequence[torch.Tensor]) -> float:
    """The largest absolute value of all, not finite if one is not; one transfer from the device."""
    return float(torch.nn.utils.get_total_norm([w.detach() for w in weights], norm_type=math.inf))


def check(step: int, values: Mapping[str, float], rows: Sequence[TokenizedPair], losses: Sequence[float]) -> None:
    """Raise TrainingFailed if a value of a step is not finite, naming the rows that it may come from.

    Args:
        step: of the values.
        values: by what they are, in the order in which they come to be.
        rows: the samples of the step.
        losses: of each sample; empty where they are not known.
    """
    what = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if what is None:
        return
    guilty = [row for row, loss in zip(rows, losses, strict=False) if not math.isfinite(loss)]
    whose = f"; that of {names(guilty)} is not finite" if guilty and what == "loss" else f"; it had {names(rows)}"
    details = {
        "step": step,
        "what": what,
        "value": json_number(values[what]),
        "values": {name: json_number(value) for name, value in values.items()},
        **of_rows(guilty if what == "loss" and guilty else rows),
        "rows_of_step": [row.id for row in rows],
        "row_losses": [json_number(loss) for loss in losses],
    }
    raise TrainingFailed(f"the {what} is {values[what]} at step {step}{whose}", details)


def of_rows(rows: Iterable[TokenizedPair]) -> dict[str, Any]:
    """What a record says of samples: the rows that they are of, and digests of their token ids."""
    rows = list(rows)
    return {
        "rows": [row.id for row in rows],
        "samples": [sample_digest(row.prompt, row.chosen, row.rejected) for row in rows],
    }


def names(rows: Sequence[TokenizedPair]) -> str:
    """'row train:3', 'rows train:3, train:9, ... (16)'"""
    shown = ", ".join(row.id for row in rows[:NAMED])
    more = f", ... ({len(rows)})" if len(rows) > NAMED else ""
    return f"row{'s' if len(rows) != 1 else ''} {shown}{more}"
