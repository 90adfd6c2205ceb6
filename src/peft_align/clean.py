"""Show what can be removed under a root, and with --yes remove it: what no result depends on, unless it is named.

usage: python -m peft_align.clean [root=DIR] [WHAT ...] [--yes] [--json] [disk.cache_gb=N] [days=N]

  Without WHAT: states, temporary, caches, code. Only when named: logs, evaluations, runs, models.
  What a living process works on is left alone. Nothing is removed without --yes.

examples:
  python -m peft_align.clean
  python -m peft_align.clean root=/scratch/me/outputs states caches disk.cache_gb=5 --yes
  python -m peft_align.clean evaluations logs days=60 --json

what:
  states            training states and attempts in runs that are done
  temporary         temporary files that kills left, an hour old or more
  caches            reference/ and tokenized/, used least recently, beyond disk.cache_gb (0: all)
  code              frozen code of Slurm jobs that have ended
  logs              logs of workers, and their job files, of runs that have been done for days=N (30)
  evaluations       evaluations and judgements that no sweep under the root asks for any more
  runs              runs that no sweep under the root names (those of the verb `train` too), with all that they hold
  models            models converted or built on this machine, in its cache folder; they are made again when needed

flags:
  --yes             remove what is listed
  --json            one JSON object: root, groups with their paths and bytes, bytes, notes, removed, failed
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_align.cli import FAILED, run_verb
from peft_align.config import validate
from peft_align.config.command_line import CommandLine, parse
from peft_align.config.compose import config_dir, read_yaml
from peft_align.errors import Fault, InputError, suggest
from peft_align.grid.cost import human_bytes
from peft_align.launch.leftovers import BY_ITSELF, WHAT, Leftovers
from peft_align.store.removal import Leftover, remove
from peft_align.terminal import say

KEYS = ("root", "days", "disk.cache_gb")
DAYS = 30.0
SHOWN = 5  # paths of a group


def verb(argv: list[str]) -> int:
    whats = [word for word in argv if not word.startswith("-") and "=" not in word]
    line = parse([word for word in argv if word not in whats], ["--yes", "--json"])
    root, leftovers = read(line, whats)
    groups = {what: leftovers.find(what) for what in dict.fromkeys(whats or BY_ITSELF)}
    gone: list[Leftover] = []
    as_json = "--json" in line.flags
    if not as_json:
        say(listing(root, groups, leftovers.notes))
    if "--yes" in line.flags:
        gone = [found for group in groups.values() for found in group if remove(root, found)]
    failed = sum(map(len, groups.values())) - len(gone) if "--yes" in line.flags else 0
    if as_json:
        say(json.dumps(described(root, groups, leftovers.notes, gone, failed), indent=1))
    elif "--yes" in line.flags:
        left = f"; {failed} could not be, or are in use now" if failed else ""
        say(f"removed: {len(gone)}, {human_bytes(sum(found.bytes for found in gone))}{left}")
    elif any(groups.values()):
        say("nothing was removed: the same command with --yes removes it")
    return FAILED if failed else 0


def read(line: CommandLine, whats: Sequence[str]) -> tuple[Path, Leftovers]:
    """The root that is looked through, and how. Raises InputError."""
    faults = [*line.faults]
    faults += [
        Fault(word, "is nothing that is cleaned", suggest(word, [*WHAT, *KEYS])) for word in whats if word not in WHAT
    ]
    given: dict[str, Any] = {}
    for override in line.overrides:
        if override.key not in KEYS:
            faults.append(Fault(override.text, "no such key of clean", suggest(override.key, KEYS)))
        elif override.is_axis:
            faults.append(Fault(override.text, "has one value here", f"{override.key}=VALUE"))
        else:
            given[override.key] = override.values[0]
    faults += [
        Fault(word, "no such key of clean", suggest(word, [*WHAT, *KEYS])) for word in (*line.grids, *line.selected)
    ]
    rule = validate.leaves()["disk.cache_gb"].rule
    budget = given.get("disk.cache_gb", read_yaml(config_dir() / "config.yaml")["disk"]["cache_gb"])
    cache_gb = validate.check(budget, float, rule, "disk.cache_gb", faults)
    days = validate.check(given.get("days", DAYS), float, rule, "days", faults)
    root = Path(str(given.get("root", "outputs"))).expanduser()
    if not any((root / name).is_dir() for name in ("runs", "sweeps")):
        faults.append(Fault(f"root={root}", "there are no results there", "give the root of your sweeps: root=DIR"))
    if faults:
        raise InputError(faults)
    return root.resolve(), Leftovers(root.resolve(), cache_gb * 1e9, days)


def listing(root: Path, groups: dict[str, list[Leftover]], notes: Sequence[str]) -> str:
    """What was found, for people."""
    lines = []
    for what, found in groups.items():
        size = human_bytes(sum(each.bytes for each in found))
        lines.append(f"{what}: {WHAT[what]}: {f'{len(found)}, {size}' if found else 'none'}")
        lines += [f"  {human_bytes(each.bytes):>9}  {_name(root, each.path)}" for each in found[:SHOWN]]
        lines += [f"  and {len(found) - SHOWN} more: --json has all"] if len(found) > SHOWN else []
    lines += notes
    total = sum(each.bytes for found in groups.values() for each in found)
    lines.append(f"{root}: {human_bytes(total)} can be removed")
    return "\n".join(lines)


def described(
    root: Path, groups: dict[str, list[Leftover]], notes: Sequence[str], gone: Sequence[Leftover], failed: int
) -> dict[str, Any]:
    """What was found, as one JSON object."""
    return {
        "root": str(root),
        "groups": {
            what: {
                "bytes": sum(each.bytes for each in found),
                "paths": [{"path": _name(root, each.path), "bytes": each.bytes} for each in found],
            }
            for what, found in groups.items()
        },
        "bytes": sum(each.bytes for found in groups.values() for each in found),
        "notes": list(notes),
        "removed": {"count": len(gone), "bytes": sum(each.bytes for each in gone)},
        "failed": failed,
    }


def _name(root: Path, path: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
