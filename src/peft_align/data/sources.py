"""Reads a dataset's split into pairs: from the mirror, the package or the hub, always as local files.

The hub's files are fetched into its own cache first, so that what was read has names, sizes and digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets

from peft_align.config.schema import Dataset, Preference
from peft_align.data import beavertails, everyday, hh_rlhf
from peft_align.data.pairs import Counts, Message, Pair
from peft_align.errors import Fault, InputError
from peft_align.store.hub import commit_of, dataset_folder, find_repository, names_below
from peft_align.store.records import Digests, digest_of, inventory

LOADERS: Mapping[str, ModuleType] = {"hh_rlhf": hh_rlhf, "beavertails": beavertails, "everyday": everyday}
# RuntimeError: of a loading script, which is never run
UNREADABLE = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError)


@dataclass
class Split:
    """The pairs of one split and where they come from."""

    pairs: list[Pair]
    counts: Counts
    source: dict[str, Any]  # name, commit, files, digest: what a record keeps of it
    warning: str | None = None  # one line for people if the train files are not all that the full data has


def load_split(dataset: Dataset, preference: Preference, split: str, mirror: str | None) -> Split:
    """The pairs of `split`: train and validation are parts of the train files by prompt; test is its own.

    Raises:
        InputError: the loader lacks the rule, or the data is neither in the mirror nor on the hub, or lacks the split.
    """
    loader = LOADERS[dataset.loader]
    if preference.rule not in loader.RULES:
        what = f"is not a rule of the loader {dataset.loader}"
        raise InputError([Fault(f"preference.rule={preference.rule}", what, f"it has {', '.join(loader.RULES)}")])
    folder, commit = _folder(dataset, mirror, loader.subset(preference.rule))
    file_split = "test" if split == "test" else "train"
    rows, files = _read(dataset, folder, loader.subset(preference.rule), file_split)
    counts = Counts()
    pairs = list(loader.pairs(rows, preference.rule, file_split, counts))
    if split != "test":
        held_back = [is_validation(pair.prompt, dataset.validation_fraction) for pair in pairs]
        pairs = [pair for pair, held in zip(pairs, held_back, strict=True) if held == (split == "validation")]
    if not pairs:
        raise InputError([Fault(f"{dataset.hub_id or dataset.loader}", f"has no usable pair in its {split} split")])
    source = {"name": dataset.hub_id or dataset.loader, "commit": commit, "files": files, "digest": digest_of(files)}
    warning = row_warning(dataset, preference, counts) if file_split == "train" else None
    return Split(pairs, counts, source, warning)


def row_warning(dataset: Dataset, preference: Preference, counts: Counts) -> str | None:
    """One line that names both numbers, if the train files do not hold as many rows for the rule as are expected.

    Args:
        dataset: its expected_rows say how many rows of its full train split a rule applies to.
        preference: of the rule.
        counts: of the train files.
    """
    expected = (dataset.expected_rows or {}).get(preference.rule)
    if expected is None or counts.matching == expected:
        return None
    name = (dataset.hub_id or dataset.loader) + (f"@{dataset.revision}" if dataset.revision else "")
    verdict = "not the full data" if counts.matching < expected else "more than the full data, so not the same data"
    return f"{name}, {preference.rule}: {counts.matching:,} rows before filters, {expected:,} expected: {verdict}"


def is_validation(prompt: tuple[Message, ...], fraction: float) -> bool:
    """Whether a prompt is held back: by the hash of its text, so that all its rows go together, in every version."""
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in prompt)
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return share < fraction


def _folder(dataset: Dataset, mirror: str | None, subset: str | None) -> tuple[Path, str | None]:
    local = dataset_folder(dataset, mirror)
    if local is not None:
        return local, commit_of(local)
    assert dataset.hub_id is not None
    patterns = [f"{subset}/*", "README.md"] if subset else None
    return find_repository(dataset.hub_id, dataset.revision, "dataset", mirror, patterns=patterns)


def _read(dataset: Dataset, folder: Path, subset: str | None, split: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    pattern = {split: f"*-{split}.jsonl"} if dataset.hub_id is None else None
    try:
        if pattern is not None:
            builder = datasets.load_dataset_builder("json", data_files={split: str(folder / pattern[split])})
        else:
            builder = datasets.load_dataset_builder(str(folder), data_dir=subset)
        paths = list((builder.config.data_files or {}).get(split, []))
        if not paths:
            raise InputError([Fault(str(folder / (subset or "")), f"has no files of a split '{split}'")])
        names = names_below(folder, paths)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except UNREADABLE as error:
        raise InputError([Fault(str(folder), f"cannot be read: {str(error).splitlines()[0][:300]}")]) from None
    return rows, inventory(folder, names, Digests())
