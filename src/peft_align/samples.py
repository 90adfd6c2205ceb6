"""Look up what a run was trained on at a step, or where its loss jumped.

usage: python -m peft_align.samples RUN_ID [--step N | --worst N] [root=DIR] [hub.mirror=DIR] [--json]

  Without --step and --worst: the rows that a failed run failed at, else the 3 steps at which the loss rose most.
  Texts are shortened and escaped; --json has all of them, as they are. Rows count from 0.

examples:
  python -m peft_align.samples harmless-dpo-tiny-lora-4f0c9a1b2d3e
  python -m peft_align.samples harmless-dpo-tiny-lora-4f0c9a1b2d3e --step 120 root=/scratch/me/outputs
  python -m peft_align.samples harmless-dpo-tiny-lora-4f0c9a1b2d3e --worst 10 --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_align.cli import run_verb
from peft_align.data.pairs import Pair
from peft_align.errors import Fault, InputError, suggest
from peft_align.reporting.lookup import Sample, Step, data_of, find_run, place, step_of, steps_of, worst
from peft_align.terminal import say

KEYS, NUMBERS, FLAGS = ("root", "hub.mirror"), ("--step", "--worst"), ("--json", "--help")
STEPS = 3  # shown where no number is given
ROWS = 3  # of each of several steps
SHOWN = 160  # characters of a text


@dataclass(frozen=True)
class Asked:
    """A command line of this verb."""

    run_id: str
    root: Path
    mirror: str | None
    step: int | None
    worst: int | None
    as_json: bool


def read(argv: Sequence[str]) -> Asked:
    """Parse a command line: flags and keys in any order, no abbreviations. Raises InputError with all faults."""
    faults: list[Fault] = []
    ids: list[str] = []
    keys: dict[str, str] = {}
    numbers: dict[str, int] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, given = word.partition("=")
        if name in NUMBERS:
            given = given if equals else (rest.pop(0) if rest else "")
            if given.isdecimal() and int(given):
                numbers[name] = int(given)
            else:
                faults.append(Fault(name, f"{given!r} is not a whole number above 0", f"e.g. {name} 3"))
        elif word.startswith("-") and word not in FLAGS:
            faults.append(Fault(word, "no such flag", suggest(name, [*NUMBERS, *FLAGS])))
        elif not equals and not word.startswith("-"):
            ids.append(word)
        elif equals and name.lstrip("+") not in KEYS:
            faults.append(Fault(word, "is none of this verb's settings", suggest(name, KEYS)))
        elif equals and not given:
            faults.append(Fault(word, "the value is empty", f"write {name}=DIR"))
        elif equals:
            keys[name.lstrip("+")] = given
    if len(ids) != 1:
        what = f"{len(ids)} runs are named; this verb looks at one"
        faults.append(Fault("command line", what, "give the id of a run, as `python -m peft_align.status` shows it"))
    if len(numbers) > 1:
        faults.append(Fault("--step, --worst", "one of them can be had at a time", "leave one out"))
    if faults:
        raise InputError(faults)
    root, mirror = Path(keys.get("root", "outputs")), keys.get("hub.mirror")
    return Asked(ids[0], root, mirror, numbers.get("--step"), numbers.get("--worst"), "--json" in argv)


def verb(argv: list[str]) -> int:
    asked = read(argv)
    directory = find_run(asked.root, asked.run_id)
    failure = directory.failure() or {}
    failed_rows = failure.get("rows") or [] if asked.step is None and asked.worst is None else []
    steps: list[Step] = []
    path = directory.path
    if not (failed_rows and failure.get("what") == "reference"):  # which is scored before the first step
        path, made = steps_of(directory)
        if asked.step is not None:
            steps = [step_of(made, asked.step)]
        elif failed_rows:
            steps = [step for step in made if step.number == failure["step"]]
        else:
            steps = worst(made, asked.worst or STEPS)
    split, warning = data_of(directory, asked.mirror)
    pairs = {pair.id: pair for pair in split.pairs}
    if asked.as_json:
        content: dict[str, Any] = {"run": directory.id, "metrics": str(path), "warning": warning}
        content |= {"failure": failure or None, "steps": [step.plain(pairs) for step in steps]}
        content["failed_at"] = [Sample(row, None, None, pairs.get(row)).plain() for row in failed_rows]
        say(json.dumps(content, indent=1))
        return 0
    say(f"{directory.id}: {path}")
    if warning:
        say(f"warning: {warning}")
    if failure:
        say(f"{failure.get('stage')}: {escaped(str(failure.get('reason')), 1000)}")
    for step in steps:
        say(f"\n{headline(step)}")
        show(step, pairs, failed_rows if failed_rows else None, len(steps) > 1)
    if failed_rows and not steps:
        say()
        for row in failed_rows:
            show_sample(Sample(row, None, None, pairs.get(row)))
    return 0


def headline(step: Step) -> str:
    """'step 3: loss 2.1034 (step 2: 0.6931), gradient norm 12.5'"""
    before = f" (step {step.number - 1}: {step.before:.4f})" if step.before is not None else ""
    norm = f", gradient norm {step.norm:.4g}" if step.norm is not None else ""
    return f"step {step.number}: loss {step.loss:.4f}{before}{norm}"


def show(step: Step, pairs: Mapping[str, Pair], only: Sequence[str] | None, briefly: bool) -> None:
    """The samples of a step.

    Args:
        step: the step.
        pairs: of the data, by the id of their row.
        only: rows that are shown; None: all.
        briefly: one of several steps: the samples of the largest losses.
    """
    if not step.rows:
        say("  its rows are not known: an earlier version wrote the metrics")
    samples = [sample for sample in step.samples(pairs) if only is None or sample.row in only]
    shown = samples[:ROWS] if briefly and step.losses else [] if briefly else samples
    for sample in shown:
        show_sample(sample)
    if len(shown) < len(samples):
        others = ", ".join(sample.row for sample in samples[len(shown) :])
        say(f"  {'other rows' if shown else 'rows'}: {escaped(others, 400)} (--step {step.number} shows them)")


def show_sample(sample: Sample) -> None:
    """A sample: where it stands, its loss and lengths, the beginning of its texts."""
    split, number = place(sample.row)
    known = [f"row {number if number is not None else sample.row} of {split}"]
    known += [f"({rule})" for rule in sample.row.split(":")[2:]]
    figures = [f"loss {sample.loss:.4f}"] if sample.loss is not None else []
    figures += [f"{sample.tokens} tokens"] if sample.tokens is not None else []
    say(f"  {escaped(' '.join(known), 200)}" + "".join(f", {figure}" for figure in figures))
    if sample.pair is None:
        say("    is not in the data any more")
        return
    prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in sample.pair.prompt)
    texts = {"prompt": prompt, "chosen": sample.pair.chosen, "rejected": sample.pair.rejected}
    for name, text in texts.items():
        say(f"    {name:8} {len(text):6} characters  {quoted(text)}")


def quoted(text: str) -> str:
    """The beginning of a text as Python writes it, in which nothing that a terminal would obey is left."""
    return repr(text[:SHOWN]) + (" ..." if len(text) > SHOWN else "")


def escaped(text: str, most: int) -> str:
    """Likewise, of what is no quotation."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:most])
    return shown + (" ..." if len(text) > most else "")


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
