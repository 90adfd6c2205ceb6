"""peft-align VERB ...: one front for all verbs; each is also `python -m peft_align.VERB`."""

from __future__ import annotations

import importlib
import sys

from peft_align import __version__
from peft_align.errors import suggest
from peft_align.terminal import say

VERBS = {
    "sweep": "do everything that is missing of a grid: train, evaluate, report",
    "plan": "show what a grid is, what is done and what is missing",
    "train": "train one run in this process",
    "merge": "merge adapters into one model, in this process",
    "select": "choose the best settings of a search by its validation scores",
    "evaluate": "score the checkpoints that exist",
    "judge": "judge the texts that are generated, now or again with another judge",
    "status": "show what the runs are doing",
    "samples": "show what a run was trained on at a step, and where its loss jumped",
    "cancel": "end the Slurm jobs of a sweep, or of some of its runs",
    "fetch": "have on this machine what a sweep needs from the hub",
    "report": "write the result table",
    "export": "write an adapter into a folder with a model card",
    "clean": "show what no result depends on, and remove it",
}


def main() -> int:
    """Dispatch to a verb."""
    words = sys.argv[1:]
    if words and words[0] in VERBS:
        sys.argv = [f"peft-align {words[0]}", *words[1:]]
        return int(importlib.import_module(f"peft_align.{words[0]}").main())
    if words == ["--version"]:
        say(__version__)
        return 0
    asked_for_help = words in ([], ["--help"], ["-h"])
    if not asked_for_help:
        say(f"peft_align: no verb '{words[0]}' ({suggest(words[0], VERBS)})", file=sys.stderr)
    usage = "\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items())
    say(
        f"usage: peft-align VERB [+grid=NAME] [overrides]\n\n{usage}\n\nMore on each: peft-align VERB --help",
        file=sys.stdout if asked_for_help else sys.stderr,
    )
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main())
