"""Have on this machine what a sweep needs from the hub: models, datasets, data of benchmarks.

usage: python -m peft_align.fetch [+grid=NAME] [key=value ...] hub.mirror=DIR [--config-dir DIR]

  Fills DIR/<repository>[@<revision>], which every command with hub.mirror=DIR looks into before the hub, and nodes
  without a network can read. What is there is not fetched again; an interrupted download goes on.

examples:
  python -m peft_align.fetch +grid=quickstart model=smollm2_135m_hub hub.mirror=mirror
  python -m peft_align.fetch +grid=full evaluation=paper hub.mirror=/scratch/me/mirror
  python -m peft_align.fetch dataset=beavertails model=mistral_7b hub.mirror=/scratch/me/mirror
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_align.cli import FAILED, ask, run_verb
from peft_align.errors import Fault, InputError
from peft_align.grid.needs import from_hub, offline
from peft_align.store.hub import fetch_into
from peft_align.terminal import say


def verb(argv: list[str]) -> int:
    asked = ask(argv)
    mirror = asked.sweep.config.hub.mirror
    if mirror is None:
        raise InputError([Fault("hub.mirror", "is not set: it is the folder that is filled", "e.g. hub.mirror=mirror")])
    if offline():
        raise InputError([Fault("HF_HUB_OFFLINE", "is set: the hub is switched off", "unset it, and fetch again")])
    wanted = from_hub(asked.plan())
    if not wanted:
        say(f"everything that {asked.sweep.name} needs is on this machine")
        return 0
    failed = 0
    for i, ((kind, repo, revision), why) in enumerate(wanted.items(), start=1):
        name = f"{repo}@{revision}" if revision else repo
        say(f"[{i}/{len(wanted)}] {kind} {name} ({why})", flush=True)
        try:
            place = fetch_into(Path(mirror).expanduser(), repo, revision, kind)
            say(f"  {place}", flush=True)
        except (OSError, ValueError) as error:
            failed += 1
            say(f"  not fetched: {str(error).splitlines()[0][:300]}", file=sys.stderr, flush=True)
    say(f"{len(wanted) - failed} of {len(wanted)} fetched into {mirror}")
    if failed:
        say("the same command fetches what is missing", file=sys.stderr)
    return FAILED if failed else 0


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
