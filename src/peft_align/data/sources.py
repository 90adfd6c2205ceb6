"""Reads a dataset's split into pairs: from the mirror, the package or the hub, always as local files.

The hub's files are fetched into its own cache first, so that what was read has names, sizes and digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pyarrow

from peft_align.config.schema import Dataset, Preference
from peft_align.data import beavertails, everyday, hh_rlhf
from peft_align.data.pairs import Counts, Message, Pair
from peft_align.data.places import find_fault, place_of
from peft_align.errors import Fault, InputError
from peft_align.store.hub import commit_of, dataset_folder, find_repository, names_below
from peft_align.store.records import Digests, digest_of, inventory

MOST_DROPPED = 0.1  # share of rows that may be left out without a word: the real data has 2 percent
SHOWN = 3  # files in a message
LOADERS: Mapping[str, ModuleType] = {"hh_rlhf": hh_rlhf, "beavertails": beavertails, "everyday": everyday}


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
    rows, paths = _read(dataset, folder, loader, preference.rule, file_split)
    counts = Counts()
    try:
        pairs = list(loader.pairs(rows, preference.rule, file_split, counts))
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:  # of rows, which are decoded as they are asked for
        raise _unreadable(folder, paths, loader.columns(preference.rule), error) from None
    if split != "test":
        held_back = [is_validation(pair.prompt, dataset.validation_fraction) for pair in pairs]
        pairs = [pair for pair, held in zip(pairs, held_back, strict=True) if held == (split == "validation")]
    if not pairs:
        raise InputError([_no_pair(dataset, folder, split, counts, paths, loader.ROW)])
    files = inventory(folder, names_below(folder, paths), Digests())
    source = {"name": dataset.hub_id or dataset.loader, "commit": commit, "files": files, "digest": digest_of(files)}
    told = [row_warning(dataset, preference, counts)] if file_split == "train" else []
    told.append(drop_warning(dataset, preference, counts, paths))
    return Split(pairs, counts, source, "; ".join(filter(None, told)) or None)


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


def drop_warning(dataset: Dataset, preference: Preference, counts: Counts, paths: Sequence[str]) -> str | None:
    """One line that says why and where, if more than a few of the rows that a rule applies to cannot be used."""
    unused = counts.matching - counts.kept
    if unused <= MOST_DROPPED * counts.matching:
        return None
    name = dataset.hub_id or dataset.loader
    reasons = _reasons(counts, paths, all_of_them=False)
    return f"{name}, {preference.rule}: {unused:,} of {counts.matching:,} rows left out: {reasons}"


def _reasons(counts: Counts, paths: Sequence[str], *, all_of_them: bool = True) -> str:
    """Why rows were left out, the commonest first, each with its first place; or those that the rule applies to."""
    common = [(r, n) for r, n in counts.dropped.most_common() if all_of_them or r not in counts.unmatched]
    return "; ".join(f"{n:,} × {reason} (first: {place_of(paths, counts.first[reason])})" for reason, n in common)


def _no_pair(dataset: Dataset, folder: Path, split: str, counts: Counts, paths: Sequence[str], row: str) -> Fault:
    where = f"{dataset.hub_id or dataset.loader} ({folder})"
    if counts.kept:
        what = f"none of its {counts.kept} pairs falls into the {split} split"
        return Fault(
            where, what, f"more rows, or another dataset.validation_fraction than {dataset.validation_fraction}"
        )
    if not counts.dropped:
        return Fault(where, f"has no usable pair in its {split} split: no row that the preference is for", row)
    what = f"has no usable pair in its {split} split, of {counts.read:,} rows: {_reasons(counts, paths)}"
    return Fault(where, what, row)


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


def _read(dataset: Dataset, folder: Path, loader: ModuleType, rule: str, split: str) -> tuple[Any, list[str]]:
    """The rows of a split, and the files that they stand in. Raises InputError."""
    subset, columns = loader.subset(rule), loader.columns(rule)
    place, paths = folder / (subset or ""), list[str]()
    if not place.is_dir():
        raise InputError([Fault(str(place), "is not there", "fetch it: python -m peft_align.fetch")])
    try:
        if dataset.hub_id is None:
            files = {split: str(folder / f"*-{split}.jsonl")}
            builder = datasets.load_dataset_builder("json", data_files=files)
        else:
            builder = datasets.load_dataset_builder(str(folder), data_dir=subset)
        by_split = builder.config.data_files or {}
        paths = [str(path) for path in by_split.get(split, [])]
        if not paths:
            hint = f"it has: {', '.join(map(str, by_split))}" if by_split else f"name a file {split}.jsonl"
            raise InputError([Fault(str(place), f"has no files of a split '{split}'", hint)])
        names_below(folder, paths)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # what datasets lets through varies with the damage: EOFError, StopIteration, Arrow's
        raise _unreadable(place, paths, columns, error) from None
    if absent := [name for name in columns if name not in rows.column_names]:
        fault = find_fault(paths)  # where nothing is read, no column is
        what = f"has no column {', '.join(absent)}; it has {', '.join(rows.column_names) or 'none'}"
        raise InputError([fault or Fault(", ".join(paths[:SHOWN]), what, f"rename them: {loader.ROW}")])
    return rows, paths


def _unreadable(folder: Path, paths: Sequence[str], columns: Sequence[str], error: Exception) -> InputError:
    """What to tell people of files that cannot be read: the file, the line and why, where that can be found out."""
    fault = find_fault(paths, columns)
    if fault is None:
        cause = error.__cause__ or error
        reason = " ".join((str(cause) or type(cause).__name__).split())[:300]
        fault = Fault(", ".join(paths[:SHOWN]) or str(folder), f"cannot be read: {reason}", "fetch it again")
    return InputError([fault])
