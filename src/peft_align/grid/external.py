"""Adapters that were not trained here, as runs that are evaluated and judged like all others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from peft_align.config.identity import base_identity, base_label, short_hash, slug
from peft_align.errors import Fault, InputError
from peft_align.grid.runs import Run, Sweep
from peft_align.store.hub import find_repository
from peft_align.store.records import Digests, digest_of, inventory
from peft_align.store.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_faults

FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]


def with_adapters(sweep: Sweep, adapters: Sequence[str]) -> Sweep:
    """The sweep with runs of these adapters in the place of those that it would train; its baselines stay.

    Args:
        sweep: for the model, the precision of the base, and what is evaluated.
        adapters: folders, or repositories in the mirror or on the hub.

    Raises:
        InputError: an adapter is not there or not one that can be loaded safely, or the sweep has several bases.
    """
    trained = [run for run in sweep.runs if run.kind == "train" and not run.is_parent_only]
    if len(trained) != 1:
        what = f"is evaluated on one base with one set of settings; {len(trained)} cells are asked for"
        raise InputError([Fault("adapter", what, "give one model and no axes, e.g. model=mistral_7b evaluation=paper")])
    (like,) = trained
    faults: list[Fault] = []
    found = []
    for given in adapters:
        try:
            found.append(_run(like, given, find_adapter(given, like.config.hub.mirror)))
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    baselines = [run for run in sweep.runs if run.kind == "baseline"]
    return dataclasses.replace(sweep, name="external", runs=[*found, *baselines])


def _run(like: Run, given: str, folder: Path) -> Run:
    names = [part for part in Path(given).parts if part != "adapter"]  # runs here keep theirs in a folder of that name
    name = slug(names[-1:] or ["adapter"])
    base = base_identity(like.config.model, like.config.peft)
    text = json.dumps({"base": base, "adapter": adapter_digest(folder)}, sort_keys=True)
    label = base_label(like.config.peft)
    run_id = f"{slug(['external', name, like.choices['model'], label])}-{short_hash(f'external {text}')}"
    axes = {"model": like.choices["model"], "peft": label, "adapter": name}
    scorings = [dataclasses.replace(scoring, steps=(0,)) for scoring in like.scorings]
    return Run(run_id, "external", like.config, like.choices, axes, scorings=scorings, adapter=str(folder))


def find_adapter(given: str, mirror: str | None) -> Path:
    """The folder of an adapter, fetched from the hub where it is not here. Raises InputError."""
    folder, _ = find_repository(given, None, "model", mirror, where=f"adapter={given}", patterns=FILES)
    if faults := adapter_faults(folder, f"adapter={given}"):
        raise InputError(faults)
    return folder


def adapter_digest(folder: Path) -> str:
    """The digest of an adapter's files."""
    return digest_of(inventory(folder, FILES, Digests()))
