"""The page's data: JSON that can stand in an HTML file, made small, since 300 runs have much in common."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft_align.secrecy import redacted

TOLD = ("label", "kind", "state", "reason", "faults", "parents", "cost")  # of a run, as it is
DIGITS = 5  # significant ones, of what is drawn; results.csv has them all
# What could end the script element or begin another, line ends of old JavaScript, and halves of characters.
RISKY = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def embedded(data: Any) -> str:
    """JSON for a `<script type="application/json">`: no text in it can end the element, and all of it is UTF-8.

    Numbers that are not finite are null: JSON has none, and one would make the whole unreadable.
    """
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return RISKY.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(data: Any) -> Any:
    if data is None or isinstance(data, (str, bool, int)):
        return data
    if isinstance(data, (list, tuple, set, frozenset)):
        return [_plain(value) for value in data]
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if hasattr(data, "item"):  # a number of numpy
        return _plain(data.item())
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return str(data)


class Table:
    """Values by number, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        """The number of a value, a new one if it was not there."""
        key = repr(value)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]


def compact_details(details: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Details of runs (see details.py) with what several have in common told once, and secrets taken out.

    Returns:
        `settings`, `steps` and `names`: tables; `runs`: by id, with `config` as numbers of settings, `curves` as
        {name: [number of its steps, values]}, and `scores` as [step, number of [benchmark, metric, judge], value,
        stderr, n].
    """
    settings, steps, names = Table(), Table(), Table()
    runs = {}
    for run_id, told in details.items():
        own = {key: _redacted(told.get(key)) for key in TOLD}
        own["config"] = [settings.number([k, v]) for k, v in (told.get("config") or {}).items()]
        own["curves"] = {
            name: [steps.number([step for step, _ in points]), [_short(value) for _, value in points]]
            for name, points in (told.get("curves") or {}).items()
            if points
        }
        own["scores"] = [
            [step, names.number([benchmark, metric, *judge]), _short(value), _short(error), n]
            for step, benchmark, metric, value, error, n, *judge in told.get("scores") or ()
        ]
        runs[run_id] = own
    return {"settings": _redacted(settings.values), "steps": steps.values, "names": names.values, "runs": runs}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: _redacted(each) for key, each in value.items()}
    return [_redacted(each) for each in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> Any:
    """A number with as many digits as can be seen."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def compact_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers side by side (see answers.py), runs by number.

    Returns:
        `runs`: [id, label]; `prompts`: as they are, their answers as [number of the run, text, cut, scores].
    """
    runs = Table()
    prompts = []
    for one in answers:
        given = [
            [runs.number([own["run_id"], own["label"]]), own["text"], bool(own.get("cut")), own.get("scores") or {}]
            for own in one["answers"]
        ]
        prompts.append({key: value for key, value in one.items() if key != "answers"} | {"answers": given})
    return {"runs": runs.values, "prompts": prompts}
