"""BeaverTails in the study's sense: the three preferences on real rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from peft_align.config.schema import Dataset, Preference
from peft_align.data import beavertails
from peft_align.data.pairs import Counts
from peft_align.data.sources import load_split
from peft_align.errors import InputError

PKU = Dataset(
    loader="beavertails",
    hub_id="PKU-Alignment/PKU-SafeRLHF",
    revision="v0",
    validation_fraction=0.0,
    rules=["harmless", "helpful", "mixture"],
)


def row(**changes: object) -> dict[str, object]:
    return {
        "prompt": "q",
        "response_0": "zero",
        "response_1": "one",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    } | changes


def chosen(rule: str, *rows: dict[str, object]) -> tuple[list[str], dict[str, int]]:
    counts = Counts()
    return [pair.chosen for pair in beavertails.pairs(rows, rule, "train", counts)], dict(counts.dropped)


def test_harmless_takes_the_safe_response_of_rows_with_exactly_one() -> None:
    both, neither = row(is_response_1_safe=True), row(is_response_0_safe=False)
    assert chosen("harmless", row(), both, neither) == (["zero"], {"not exactly one safe response": 2})


def test_helpful_takes_the_better_response_of_every_row() -> None:
    assert chosen("helpful", row(), row(better_response_id=0)) == (["one", "zero"], {})
    assert chosen("helpful", row(better_response_id=None)) == ([], {"no better response named": 1})


def test_the_mixture_is_both_sets_together(mirror: Path) -> None:
    sets = {
        rule: load_split(PKU, Preference(rule), "train", str(mirror)).pairs
        for rule in ("harmless", "helpful", "mixture")
    }

    def texts(rule: str) -> list[tuple[object, ...]]:
        return sorted((str(p.prompt), p.chosen, p.rejected) for p in sets[rule])

    assert texts("mixture") == sorted(texts("harmless") + texts("helpful"))


def test_harmless_pairs_equal_the_published_mixed_safety_pairs_on_the_rows_they_share(
    mirror: Path, shared: Path
) -> None:
    published = set()
    for path in sorted((shared / "peers/pku_saferlhf/mixed_pairs").rglob("*.jsonl*")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                published.add(
                    (entry["prompt"].strip(), entry["safe_response"].strip(), entry["unsafe_response"].strip())
                )
    ours = {
        (pair.prompt[0].content, pair.chosen, pair.rejected)
        for name in ("train", "test")
        for pair in load_split(PKU, Preference("harmless"), name, str(mirror)).pairs
    }
    assert len(ours) > 1000
    assert ours <= published


def test_the_pinned_revision_is_what_is_read(mirror: Path) -> None:
    split = load_split(PKU, Preference("helpful"), "test", str(mirror))
    assert split.source["name"] == "PKU-Alignment/PKU-SafeRLHF"
    assert list(split.source["files"]) == ["test.jsonl.gz"]
    assert len(split.source["digest"]) == 64


def test_data_that_is_nowhere_is_one_clear_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"PKU-SafeRLHF@v0.*hub.mirror=DIR"):
        load_split(PKU, Preference("helpful"), "test", str(tmp_path))
