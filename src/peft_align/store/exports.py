"""An exported folder: written beside its place and put there as a whole; replaced only where it is still ours."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_align.errors import Fault, InputError
from peft_align.store.records import Damaged, read_json, remove_tree, sha256, sync_tree, umask, verify, write_json

RECORD = "peft_align.json"  # in the folder: what it was made of; its files, by which a change is found
WRITTEN, UNCHANGED, REPLACED = "written", "is there already", "written again"
AWAY = "give another folder with --to, or move it away"


def write_export(
    target: Path, source: Path, files: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], facts: dict[str, Any]
) -> str:
    """Copy files into a folder, with texts and a record beside them; returns WRITTEN, UNCHANGED or REPLACED.

    Files are copied, not linked: what people edit in the copy is to leave the run as it is.

    Args:
        target: the folder, which may be an earlier export.
        source: of the files.
        files: size and sha256 of each; the copies are checked against them.
        texts: of the other files.
        facts: for the record, JSON-ready; with `files` in it added, the same again is not written again.

    Raises:
        Damaged: a file is not what it should be.
        InputError: what is in its place is no export of ours, or was changed since.
    """
    _remove_leftovers(target)
    known = export_fault(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        for name in files:
            if not (source / name).is_file():
                raise Damaged(f"{source / name} is missing")
            shutil.copyfile(source / name, fresh / name)
        try:
            verify(fresh, files)
        except Damaged as damage:
            raise Damaged(str(damage).replace(str(fresh), str(source))) from None
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        content = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(fresh.iterdir())}
        facts = facts | {"files": content}
        if known == facts:
            return UNCHANGED
        write_json(fresh / RECORD, facts)
        fresh.chmod(0o777 & ~umask())
        sync_tree(fresh)
        _put(fresh, target)
        return WRITTEN if known is None else REPLACED
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put(fresh: Path, target: Path) -> None:
    """Put the whole folder in its place; a kill between the two renames leaves none there, and both beside it."""
    old = target.with_name(f".{target.name}.old.tmp")
    if target.exists():
        target.replace(old)
    fresh.replace(target)
    remove_tree(old)


def _remove_leftovers(target: Path) -> None:
    """Make good what a kill left between the two renames."""
    old = target.with_name(f".{target.name}.old.tmp")
    if old.is_dir() and not target.exists():
        old.replace(target)
    remove_tree(old)


def export_fault(target: Path) -> dict[str, Any] | None:
    """The facts of the export that is there, without the seal; None if nothing is there.

    Raises:
        InputError: something else is there, or the export was changed: a card that somebody edited is theirs.
    """
    if not (target.exists() or target.is_symlink()):
        return None
    if target.is_symlink() or not target.is_dir():
        raise InputError([Fault(str(target), "is no folder", AWAY)])
    known = read_json(target / RECORD, sealed=True)
    if known is None or not isinstance(known.get("files"), dict):
        if not any(target.iterdir()):
            return None
        raise InputError([Fault(str(target), "is there, and is no export of peft_align", AWAY)])
    there = {path.name for path in target.iterdir()} - {RECORD}
    changed = sorted(there ^ set(known["files"]))
    with suppress(OSError):
        changed += [name for name, entry in known["files"].items() if name in there and _differs(target / name, entry)]
    if changed:
        what = f"was changed since it was exported: {', '.join(changed[:5])}"
        raise InputError([Fault(str(target), what, AWAY)])
    known.pop("seal", None)
    return known


def _differs(path: Path, entry: Any) -> bool:
    return not path.is_file() or not isinstance(entry, dict) or sha256(path) != entry.get("sha256")
