"""Log-probabilities of a reference model, by content: reference/<key>/<00 to ff>.json, shared by all runs of a root.

Many processes may fill it at once: each takes buckets that nobody is at, so every value is computed once, by whoever
comes first, and nobody waits while there is something left to compute. A bucket is replaced as a whole; one that is
damaged, or of another key, is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from peft_align.config.identity import short_hash
from peft_align.store.records import one_at_a_time, read_json, write_json
from peft_align.store.runs import FORMAT

S = TypeVar("S", bound=Hashable)
TOGETHER = 64  # samples that are computed at a time, at least, where so many are missing
LOOK = 0.5  # seconds between looks at what others compute


class References:
    """The values of one reference.

    Args:
        root: of the results.
        key: all that the values depend on besides the sample.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        self.key = dict(key)
        self.folder = root / "reference" / short_hash(json.dumps(self.key, sort_keys=True), 16)

    def of(
        self,
        samples: Mapping[str, S],
        compute: Callable[[Sequence[S]], Sequence[Sequence[float]]],
        tick: Callable[[int], None] = lambda done: None,
    ) -> tuple[dict[str, list[float]], int]:
        """The values of samples.

        Args:
            samples: by their digests.
            compute: the values of some of them.
            tick: told how many are there.

        Returns:
            the values by digest, and how many of them were computed here.
        """
        with suppress(OSError):
            os.utime(self.folder)  # what was not used for long goes first (`clean`)
        found: dict[str, list[float]] = {}
        open_ends: dict[str, list[str]] = {}
        for name in sorted(samples):
            open_ends.setdefault(name[:2], []).append(name)
        computed = 0
        while open_ends:
            with ExitStack() as held:
                mine: dict[str, dict[str, list[float]]] = {}  # buckets that are ours for now, and what they have
                missing: list[str] = []
                for bucket, names in list(open_ends.items()):
                    known = self._read(bucket)
                    if not all(name in known for name in names):
                        if len(missing) >= TOGETHER or not held.enter_context(self._alone(bucket)):
                            continue
                        known = mine[bucket] = self._read(bucket)  # someone may have written it just now
                        missing += [name for name in names if name not in known]
                    found |= {name: known[name] for name in names if name in known}
                    del open_ends[bucket]
                if missing:
                    values = compute([samples[name] for name in missing])
                    fresh = {name: [float(x) for x in value] for name, value in zip(missing, values, strict=True)}
                    computed += len(fresh)
                    found |= fresh
                    for bucket, known in mine.items():
                        self._write(bucket, known | {n: v for n, v in fresh.items() if n.startswith(bucket)})
            tick(len(found))
            if open_ends and not mine:
                time.sleep(LOOK)
        return found, computed

    def _alone(self, bucket: str) -> Any:
        return one_at_a_time(self.folder / f"{bucket}.lock")

    def _read(self, bucket: str) -> dict[str, list[float]]:
        content = read_json(self.folder / f"{bucket}.json") or {}
        values: dict[str, list[float]] = content.get("values") or {}
        whole = content.get("format") == FORMAT and content.get("key") == self.key
        return dict(values) if whole and content.get("sha256") == _digest(values) else {}

    def _write(self, bucket: str, values: Mapping[str, list[float]]) -> None:
        content = {"format": FORMAT, "key": self.key, "sha256": _digest(values), "values": values}
        write_json(self.folder / f"{bucket}.json", content, durable=False)  # what a crash loses is computed again


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sample_digest(*texts: Sequence[int]) -> str:
    """What a sample's values are kept under: its texts as token ids, in order."""
    return hashlib.sha256(json.dumps(texts, separators=(",", ":")).encode()).hexdigest()[:40]
