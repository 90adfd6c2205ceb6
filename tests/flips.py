"""The bits of a file, turned over one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def flipped(path: Path, every: int = 1) -> Iterator[str]:
    """Leave the file with one bit turned over, each or one of so many in turn, at last as it was; yields which."""
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), every):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        yield f"bit {place % 8} of byte {place // 8}"
    path.write_bytes(whole)
