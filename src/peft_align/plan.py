"""Show what a sweep is: its runs by axis, what is done, what is to do and why, what it will take. Starts nothing.

usage: python -m peft_align.plan [+grid=NAME] [key=value ...] [--json] [--verify] [--cfg] [--config-dir DIR]

examples:
  python -m peft_align.plan +grid=full
  python -m peft_align.plan +grid=full model=mistral_7b seed=0,1 --json
  python -m peft_align.plan +grid=quickstart method=dpo --cfg

flags:
  --verify          read all that the runs have, and say what is not what its record says: the next sweep makes it again
                    (exit code 1 if there is any)
  --json            one JSON object: runs, kinds, parents, axes, done, to_do, training_kinds, disk, run_list, ...
  --cfg             print the fully resolved config of the first run, and stop
  --config-dir DIR  take options from your own folder too (may be repeated)
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from peft_align.cli import FAILED, Asked, ask, resolved, run_verb
from peft_align.config.benchmarks import Generated
from peft_align.config.launchers import Slurm
from peft_align.config.schema import Dataset, Model
from peft_align.grid import disk
from peft_align.grid.cost import (
    adapter_parameters,
    human_bytes,
    human_time,
    measured,
    proposals,
    seconds_left,
)
from peft_align.grid.kinds import kinds_of, lines
from peft_align.grid.needs import not_here, unready
from peft_align.grid.planner import Item
from peft_align.grid.serialize import write_identity
from peft_align.launch.local import visible_gpus
from peft_align.store.damage import Damage, find_damage, records_of
from peft_align.store.records import read_json
from peft_align.store.runs import RunDir
from peft_align.terminal import plain_console, say

KINDS = ("train", "merge", "baseline")
SHOWN_REASONS = 12
SHOWN_KINDS = 8


def verb(argv: list[str]) -> int:
    asked = ask(argv, ["--json", "--verify", "--cfg"])
    if "--cfg" in asked.line.flags:
        say(resolved(asked.sweep), end="")
        return 0
    damages = verified(asked) if "--verify" in asked.line.flags else []
    items = asked.plan()
    content = describe(asked, items)
    if "--verify" in asked.line.flags:
        content["damaged"] = [asdict(damage) for damage in damages]
    if "--json" in asked.line.flags:
        say(json.dumps(content, indent=1, default=str))
    else:
        show(content, items, grid=bool(asked.line.grids), on_slurm=isinstance(asked.sweep.config.launcher, Slurm))
    return FAILED if damages else 0


def verified(asked: Asked) -> list[Damage]:
    """Read everything that the sweep's runs have; a description of a run that is damaged is written again."""
    found: list[Damage] = []
    for run in asked.sweep.runs:
        directory = RunDir(asked.root, run.id)
        found += find_damage(directory)
        described = directory.path / "run.json"
        if (described.is_file() or records_of(directory)) and read_json(described) is None:
            write_identity(run, directory)
            found.append(Damage(run.id, f"{described} is damaged or missing: written again"))
    return found


def describe(asked: Asked, items: Sequence[Item]) -> dict[str, Any]:
    """The plan as one JSON object; `parents` are runs that others need and the grid does not hold."""
    own = [item for item in items if not item.run.is_parent_only]
    kinds = Counter(item.run.kind for item in own)
    axes: dict[str, Counter[str]] = {}
    for item in own:
        shown = {"merge": item.run.choices["merge"]} if item.run.kind == "merge" else item.run.axes
        for key, value in shown.items() if item.run.kind != "baseline" else ():
            axes.setdefault(key, Counter())[f"{value:g}" if isinstance(value, float) else str(value)] += 1
    records = measured(asked.root, items)
    todo = [item for item in items if not item.done]
    return {
        "sweep": asked.sweep.name,
        "folder": str(asked.folder),
        "runs": len(own),
        "kinds": {kind: kinds[kind] for kind in (*KINDS, *(["external"] if kinds["external"] else []))},
        "parents": len(items) - len(own),
        "axes": {key: dict(values) for key, values in axes.items()},
        "done": sum(item.done for item in items),
        "to_do": sum(not item.done for item in items),
        "failed_before": sum(item.failure is not None for item in items),
        "excluded": [
            {"cells": n, "reason": reason}
            for reason, n in Counter(excluded.reason for excluded in asked.sweep.excluded).items()
        ],
        "overrides": asked.sweep.notes,
        "unpinned": sorted({name for item in own for name in _unpinned(item)}),
        "from_hub": {repo: why for (_, repo), why in sorted(not_here(todo).items(), key=lambda entry: entry[0][1])},
        "not_ready": [str(fault) for fault in unready(todo)],
        "not_judged": sorted(_unjudged(own)),
        "trainable_parameters": trainable(own),
        "training_kinds": kinds_of(items, records),
        "disk": disk.described(asked.root, items, asked.sweep.config.disk, len(visible_gpus()) or 1),
        "training_seconds": seconds_left(items, records),
        "resources": proposals(records),
        "run_list": [
            {
                "id": item.run.id,
                "kind": item.run.kind,
                "axes": item.run.axes,
                "done": item.done,
                "to_do": item.why,
                "parent_only": item.run.is_parent_only,
            }
            for item in items
        ],
    }


def _unpinned(item: Item) -> list[str]:
    """Repositories of the hub whose revision is not pinned."""
    config = item.run.config
    sources: list[Model | Dataset] = [config.model, *([] if item.run.kind == "baseline" else [config.dataset])]
    return [s.hub_id for s in sources if s.hub_id and s.revision is None]


def _unjudged(items: Sequence[Item]) -> set[str]:
    """Benchmarks whose texts are generated and judged by no one."""
    scorings = [scoring for item in items for scoring in item.run.scorings]
    generated = {name for scoring in scorings for name, b in scoring.benchmarks if isinstance(b, Generated)}
    return generated - {name for scoring in scorings for name, _, _ in scoring.judges}


def trainable(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Trainable parameters of each kind of run, by the closed formula: no weights are needed. None: unknown modules."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in items:
        if item.run.kind == "train":
            run, peft = item.run, item.run.config.peft
            key = (run.choices["model"], run.choices["method"], peft.r, *peft.target_modules)
            named = {"model": run.choices["model"], "method": run.choices["method"], "r": peft.r}
            found[key] = named | {"parameters": adapter_parameters(run)}
    return list(found.values())


def show(content: dict[str, Any], items: Sequence[Item], *, grid: bool, on_slurm: bool) -> None:
    """The plan for people; what overrides did is told where there is a grid that they did it to."""
    console = plain_console()
    kinds = ", ".join(f"{n} {kind}" for kind, n in content["kinds"].items() if n)
    parents = f" and {content['parents']} parents" if content["parents"] else ""
    name = console.render_str(content["sweep"], style="bold")
    console.print(Text.assemble(name, f": {content['runs']} runs ({kinds}){parents}"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("axis")
    table.add_column("values (runs)")
    for key, values in content["axes"].items():
        table.add_row(key, ", ".join(f"{value} ({n})" for value, n in values.items()))
    console.print(table)
    for excluded in content["excluded"]:
        console.print(f"excluded: {excluded['cells']} cells: {excluded['reason']}", markup=False)
    for note in content["overrides"] if grid else ():
        console.print(f"override: {note}", markup=False)
    if "damaged" in content:
        console.print(f"read and compared with the records: {len(content['damaged'])} damaged")
    for damage in content.get("damaged", ()):
        why = f" ({damage['left']})" if damage["left"] else ""
        console.print(f"  damaged: {damage['what']}{why}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"done: {content['done']}, to do: {content['to_do']}")
    reasons = Counter(item.why for item in items if not item.done)
    for reason, n in reasons.most_common(SHOWN_REASONS):
        console.print(f"  {n} × {reason}", markup=False, highlight=False)
    for item in [item for item in items if item.failure][:SHOWN_REASONS]:
        console.print(f"  failed before: {item.run.id}: {item.failure}", markup=False, highlight=False)
    if content["unpinned"]:
        names = ", ".join(content["unpinned"])
        console.print(
            f"unpinned: {names}: their newest revision will be read; the records keep the commit", markup=False
        )
    if content["from_hub"]:
        console.print("not on this machine, to be read from the hub:", markup=False)
        for repo, why in content["from_hub"].items():
            console.print(f"  {repo} ({why})", markup=False, highlight=False)
    for fault in content["not_ready"][:SHOWN_REASONS]:
        console.print(f"missing: {fault}", markup=False, highlight=False)
    if content["not_judged"]:
        names = ", ".join(content["not_judged"])
        console.print(f"generated, and judged by no one: {names}: give judge=NAME now or later", markup=False)
    for entry in content["trainable_parameters"][:SHOWN_REASONS]:
        count = f"{entry['parameters']:,}" if entry["parameters"] is not None else "unknown: other modules"
        line = f"trainable parameters: {count} ({entry['model']}, {entry['method']}, rank {entry['r']})"
        console.print(line, markup=False, highlight=False)
    if (more := len(content["trainable_parameters"]) - SHOWN_REASONS) > 0:
        console.print(f"  and {more} more: --json has all", markup=False, highlight=False)
    if content["training_kinds"]:
        console.print("memory of a GPU and time, estimated from the model's shape:", markup=False)
        shown, left = lines(content["training_kinds"], SHOWN_KINDS)
        for line in shown:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        if left:
            console.print(f"  and {left} more kinds of run: --json has all", markup=False, highlight=False)
    for entry in content["resources"][:SHOWN_REASONS] if on_slurm else ():
        card = f", {human_bytes(entry['gpu_bytes'])} of a GPU" if entry["gpu_bytes"] else ""
        who = f"{entry['model']} {entry['method']} on {entry['base']}"
        asks = f"time={entry['time']} mem={entry['mem']}"
        console.print(
            f"to ask for, to train: {who}: {asks}{card} ({entry['runs']} runs measured)", markup=False, highlight=False
        )
    seconds = content["training_seconds"]
    time = human_time(seconds) if seconds is not None else "unknown: no like run was measured here yet"
    for line in disk.told(content["disk"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"training time on one device: {time}", highlight=False)


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
