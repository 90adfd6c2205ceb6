"""Pairs as token ids on disk: tokenized/<key>.npz, shared by all runs of a root that read and encode alike.

Kept before truncation, by the pair's text. A file that is damaged, or of another key, is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from peft_align.config.identity import short_hash
from peft_align.data import templates, tokenization
from peft_align.data.pairs import Pair
from peft_align.data.tokenization import TokenizedPair
from peft_align.store.records import atomic_write, one_at_a_time

DIGEST = 20  # bytes of a pair's


def encoding_key(data: str, template: str, tokenizer: str) -> dict[str, str]:
    """All that token ids depend on besides the pair.

    Args:
        data: digest of the files that the pairs come from.
        template: vicuna, mistral or chat.
        tokenizer: digest of its files.
    """
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (templates, tokenization))
    versions = {"code": hashlib.sha256(code).hexdigest(), "tokenizers": tokenizers.__version__}
    return {"data": data, "template": template, "tokenizer": tokenizer, **versions}


@dataclass(frozen=True)
class Encodings:
    """What is kept under a key.

    Attributes:
        root: of the results.
        key: see encoding_key.
    """

    root: Path
    key: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.root / "tokenized" / f"{short_hash(json.dumps(dict(self.key), sort_keys=True), 16)}.npz"

    def of(self, pairs: Iterable[Pair]) -> dict[Pair, TokenizedPair]:
        """Those of the pairs that are there."""
        with suppress(OSError):
            os.utime(self.path)  # what was not used for long goes first (`clean`)
        digests, lengths, tokens = self._read()
        places = {digest.tobytes(): i for i, digest in enumerate(digests)}
        starts = np.concatenate(([0], lengths.sum(1).cumsum()))
        found = {}
        for pair in pairs:
            if (i := places.get(_digest(pair))) is not None:
                parts = np.split(tokens[starts[i] : starts[i + 1]], lengths[i].cumsum()[:2])
                found[pair] = TokenizedPair(pair.id, *(part.tolist() for part in parts))
        return found

    def add(self, encoded: Mapping[Pair, TokenizedPair]) -> None:
        """Keep more; not while another process does, whose file is as good."""
        with one_at_a_time(self.path.with_suffix(".lock")) as mine:
            if not mine:
                return
            ids = [(pair.prompt, pair.chosen, pair.rejected) for pair in encoded.values()]
            fresh: tuple[Any, ...] = (
                np.frombuffer(b"".join(map(_digest, encoded)), np.uint8).reshape(-1, DIGEST),
                np.array([[len(part) for part in parts] for parts in ids], np.int32).reshape(-1, 3),
                np.fromiter(chain.from_iterable(chain.from_iterable(ids)), np.int32),
            )
            whole: list[Any] = [np.concatenate(both) for both in zip(self._read(), fresh, strict=True)]
            key = np.array(json.dumps(dict(self.key), sort_keys=True))
            with atomic_write(self.path, durable=False) as temporary, temporary.open("wb") as file:
                np.savez(file, key=key, **dict(zip(("digests", "lengths", "tokens"), whole, strict=True)))

    def _read(self) -> tuple[Any, Any, Any]:
        """Digests (N, DIGEST), lengths of prompt and responses (N, 3), all tokens; the zip holds a checksum of each."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                digests, lengths, tokens = file["digests"], file["lengths"], file["tokens"]
                whole = json.loads(str(file["key"])) == self.key and len(tokens) == lengths.sum()
        except Exception:  # what a damaged zip raises is of a dozen kinds
            whole = False
        if not whole:
            return np.zeros((0, DIGEST), np.uint8), np.zeros((0, 3), np.int32), np.zeros(0, np.int32)
        return digests, lengths, tokens


def _digest(pair: Pair) -> bytes:
    texts = astuple(pair)[1:]  # not its id
    return hashlib.sha256(json.dumps(texts).encode()).digest()[:DIGEST]
