"""Write an adapter into a folder of its own in PEFT's format, with a model card: to keep it, or to give it to others.

usage: python -m peft_align.export RUN [--to DIR] [--step N] [--push REPO] [root=DIR] [license=ID] [--config-dir DIR]

  RUN is the id of a run, or the beginning of one. Its files are checked by their digests and copied; the card has the
  data, the settings, the scores of all seeds under the root, the licences of base and data, and how it is used.
  The same again changes nothing; a folder that is no export, or was edited since, is not written over.

examples:
  python -m peft_align.export harmless-dpo-tiny-lora-4f0c9a1b2d3e
  python -m peft_align.export harmless-dpo --to adapters/harmless root=/scratch/me/outputs license=apache-2.0
  python -m peft_align.export harmless-dpo-tiny-lora-4f0c9a1b2d3e --step 100 --push me/harmless-dpo

flags:
  --to DIR          the folder (default: ROOT/exports/RUN)
  --step N          a checkpoint that was kept (default: the last one)
  --push REPO       upload it into a private repository on the hub, with the token of `hf auth login` or $HF_TOKEN
  --config-dir DIR  your own options: for the licences and the metrics that they name
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_align import __version__
from peft_align.cli import FAILED, run_verb
from peft_align.config.compose import config_dir, read_yaml
from peft_align.config.schema import LICENSE_FORM
from peft_align.errors import Fault, InputError, suggest
from peft_align.grid.needs import offline
from peft_align.reporting.cell_scores import cell_scores
from peft_align.reporting.exported import Exported, exported, named_run
from peft_align.reporting.model_card import Licences, Trained, card
from peft_align.store.exports import AWAY, export_fault, write_export
from peft_align.store.hub import not_a_repository, push_folder
from peft_align.store.records import Damaged, read_json
from peft_align.store.runs import RunDir
from peft_align.terminal import say

KEYS, VALUED = ("root", "license"), ("--to", "--step", "--push", "--config-dir")
FORMAT = 1  # of the record in the folder


@dataclass(frozen=True)
class Asked:
    """A command line of this verb."""

    run: str
    root: Path
    to: Path | None = None
    step: int | None = None
    push: str | None = None
    license: str | None = None
    config_dirs: tuple[Path, ...] = field(default=())


def read(argv: Sequence[str]) -> Asked:
    """Parse a command line: flags and keys in any order, no abbreviations. Raises InputError with all faults."""
    faults: list[Fault] = []
    runs: list[str] = []
    given: dict[str, str] = {}
    dirs: list[Path] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.partition("=")
        name = name.lstrip("+")
        if name in VALUED:
            text = text if equals else (rest.pop(0) if rest and not rest[0].startswith("--") else "")
        elif word.startswith("-"):
            faults.append(Fault(word, "no such flag", suggest(name, VALUED)))
            continue
        elif not equals:
            runs.append(word)
            continue
        elif name not in KEYS:
            faults.append(Fault(word, "is none of this verb's settings", suggest(name, KEYS)))
            continue
        if not text:
            faults.append(Fault(name, "the value is empty", f"write {name}{'=' if name in KEYS else ' '}VALUE"))
        elif name == "--config-dir":
            dirs.append(Path(text))
        elif name in given:
            faults.append(Fault(word, f"'{name}' is given twice", "leave one out"))
        else:
            given[name] = text
    if len(runs) != 1:
        what = f"{len(runs)} runs are named; one is exported at a time"
        faults.append(Fault("command line", what, "give the id of a run, as `python -m peft_align.status` shows it"))
    faults += _faults_of(given, dirs)
    if faults:
        raise InputError(faults)
    to, step = given.get("--to"), given.get("--step")
    root = Path(given.get("root", "outputs")).expanduser()
    target = None if to is None else Path(to).expanduser()
    number = None if step is None else int(step)
    return Asked(runs[0], root, target, number, given.get("--push"), given.get("license"), tuple(dirs))


def _faults_of(given: Mapping[str, str], dirs: Sequence[Path]) -> list[Fault]:
    """What is wrong with the values of flags and keys."""
    found = [
        Fault("--config-dir", f"'{folder}' is not a folder", "give that of your own options")
        for folder in dirs
        if not folder.is_dir()
    ]
    step, repository, license = given.get("--step"), given.get("--push"), given.get("license")
    if step is not None and not (step.isascii() and step.isdecimal() and 0 < int(step[:12]) == int(step)):
        found.append(Fault("--step", f"{step!r} is not a whole number above 0", "e.g. --step 100"))
    if license is not None and not re.fullmatch(LICENSE_FORM[0], license):
        found.append(Fault("license", *LICENSE_FORM[1:]))
    if repository is not None and (wrong := not_a_repository(repository, None)):
        found.append(Fault("--push", f"'{repository}' {wrong}", "e.g. --push me/harmless-dpo"))
    if repository is not None and offline():
        found.append(Fault("--push", "HF_HUB_OFFLINE is set: the hub is switched off", "unset it, or leave --push out"))
    return found


def verb(argv: list[str]) -> int:
    asked = read(argv)
    adapter = exported(named_run(asked.root, asked.run), asked.step)
    name = adapter.directory.id + ("" if adapter.is_last else f"-step-{adapter.step}")
    target = asked.to or asked.root / "exports" / name
    if _is_within(target, asked.root / "runs"):
        raise InputError([Fault(str(target), "is where runs are kept", AWAY)])
    export_fault(target)
    trained = _trained(adapter)
    licences = _licences(asked, adapter, trained)
    scores = cell_scores(adapter, _shown(asked.config_dirs))
    text = card(adapter, trained, scores, licences, __version__)
    facts: dict[str, Any] = {"format": FORMAT, "run": adapter.directory.id, "kind": adapter.kind, "step": adapter.step}
    facts |= {"digest": adapter.digest, "template": adapter.config["model"]["template"]}
    facts |= {"tokenizer": adapter.tokenizer, "peft_align": __version__}
    try:
        done = write_export(target, adapter.folder, adapter.files, {"README.md": text}, facts)
    except Damaged as damage:
        remedy = "`python -m peft_align.plan --verify` with the sweep's words sets its record aside; train it again"
        raise InputError([Fault(adapter.directory.id, str(damage), remedy)]) from None
    say(f"{target}: {done}")
    if Path(str(adapter.config["model"]["hub_id"] or "")).is_absolute():
        say("warning: its adapter_config.json and run name a folder of this machine as the base", file=sys.stderr)
    return _push(target, asked.push) if asked.push else 0


def _push(folder: Path, repository: str) -> int:
    """Upload the folder; what is written stays, whatever comes of it."""
    try:
        say(f"uploaded: {push_folder(folder, repository)}")
    except (OSError, ValueError) as error:
        say(f"peft_align: {folder} is written, but was not uploaded: {str(error).strip()[:500]}", file=sys.stderr)
        say("the same command tries it again; a token is read from `hf auth login` or $HF_TOKEN", file=sys.stderr)
        return FAILED
    return 0


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _trained(adapter: Exported) -> list[Trained]:
    """The run itself, or the inputs of a merge. Raises InputError if an input's run.json is gone."""
    if adapter.kind == "train":
        axes = adapter.identity.get("axes") or {}
        return [Trained(adapter.directory.id, adapter.config, axes, adapter.record)]
    found = []
    for parent in adapter.identity.get("parents", ()):
        directory = RunDir(adapter.directory.root, str(parent))
        identity = read_json(directory.path / "run.json") or {}
        if not isinstance(identity.get("config"), dict) or "dataset" not in identity["config"]:
            what = f"its input {parent} has no run.json any more, which says what it was trained on"
            raise InputError([Fault(adapter.directory.id, what, "train it again, or name another run")])
        axes = identity.get("axes") or {}
        found.append(Trained(directory.id, identity["config"], axes, directory.train_record() or {}))
    return found


def _licences(asked: Asked, adapter: Exported, trained: Sequence[Trained]) -> Licences:
    """Those that the runs' own options name; of runs that were made before options did, those that they name now."""
    base = _licence(adapter.config["model"], "model", asked.config_dirs)
    data = {run.data: _licence(run.config["dataset"], "dataset", asked.config_dirs) for run in trained}
    return Licences(asked.license, base, data)


def _licence(node: Mapping[str, Any], group: str, dirs: Sequence[Path]) -> str | None:
    if node.get("license") is not None:
        return str(node["license"])
    name = node.get("hub_id") or node.get("loader")
    for folder in (*dirs, config_dir()) if name else ():
        for path in sorted((folder / group).glob("*.yaml")):
            option = read_yaml(path)
            if name in (option.get("hub_id"), option.get("loader")) and option.get("license"):
                return str(option["license"])
    return None


def _shown(dirs: Sequence[Path]) -> dict[str, list[str]]:
    """The metrics that the options of benchmarks name."""
    found: dict[str, list[str]] = {}
    for folder in (config_dir(), *dirs):
        for path in sorted((folder / "benchmark").glob("*.yaml")):
            metrics = read_yaml(path).get("metrics")
            if isinstance(metrics, list):
                found[path.stem] = [str(metric) for metric in metrics]
    return found


def main() -> int:
    """Entry point."""
    return run_verb(verb, __doc__)


if __name__ == "__main__":
    sys.exit(main())
