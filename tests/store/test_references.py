"""Values of a reference: each computed once, by whoever comes first; what is damaged is computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from flips import flipped

from peft_align.store.references import References, sample_digest

KEY = {"model": "a", "dtype": "fp32"}


def samples(first: int, last: int) -> dict[str, int]:
    return {sample_digest([i]): i for i in range(first, last)}


class Counted:
    """Computes, and counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, some: Sequence[int]) -> list[list[float]]:
        self.asked += some
        return [[i / 3, -i / 7] for i in some]


def values(given: dict[str, int]) -> dict[str, list[float]]:
    return {digest: [i / 3, -i / 7] for digest, i in given.items()}


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    compute = Counted()
    assert References(tmp_path, KEY).of(samples(0, 300), compute) == (values(samples(0, 300)), 300)
    assert References(tmp_path, KEY).of(samples(200, 400), compute) == (values(samples(200, 400)), 100)
    assert sorted(compute.asked) == list(range(400))


def test_no_bit_can_be_another_without_it_being_found(tmp_path: Path) -> None:
    References(tmp_path, KEY).of(samples(0, 1), Counted())
    (path,) = (tmp_path / "reference").glob("*/*.json")
    for place in flipped(path):
        found = References(tmp_path, KEY)._read(path.stem)
        assert found in ({}, values(samples(0, 1))), place


def test_another_key_has_other_values(tmp_path: Path) -> None:
    compute = Counted()
    References(tmp_path, KEY).of(samples(0, 5), compute)
    References(tmp_path, KEY | {"dtype": "bf16"}).of(samples(0, 5), compute)
    assert sorted(compute.asked) == sorted([*range(5), *range(5)])


@pytest.mark.parametrize("harm", ["cut", "bit", "value", "key", "gone", "empty"])
def test_what_is_damaged_or_anothers_is_computed_again(tmp_path: Path, harm: str) -> None:
    References(tmp_path, KEY).of(samples(0, 1), Counted())
    (path,) = (tmp_path / "reference").glob("*/*.json")
    content = json.loads(path.read_text())
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif harm == "bit":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif harm == "value":
        content["values"][next(iter(content["values"]))] = [1.0, 2.0]
        path.write_text(json.dumps(content))
    elif harm == "key":
        path.write_text(json.dumps(content | {"key": {"model": "b"}}))
    elif harm == "gone":
        path.unlink()
    else:
        path.write_text("")
    compute = Counted()
    assert References(tmp_path, KEY).of(samples(0, 1), compute)[0] == values(samples(0, 1))
    assert compute.asked == [0]
    assert References(tmp_path, KEY).of(samples(0, 1), compute) == (values(samples(0, 1)), 0)


def test_a_crash_while_computing_leaves_what_was_computed_before(tmp_path: Path) -> None:
    def crash(some: Sequence[int]) -> list[list[float]]:
        if compute.asked:
            raise RuntimeError("no power")
        return compute(some)

    compute = Counted()
    with pytest.raises(RuntimeError, match="no power"):
        References(tmp_path, KEY).of(samples(0, 300), crash)
    before = len(compute.asked)
    assert 0 < before < 300
    assert References(tmp_path, KEY).of(samples(0, 300), compute) == (values(samples(0, 300)), 300 - before)


def take_part(root: Path, first: int, last: int) -> int:
    return References(root, KEY).of(samples(first, last), Counted())[1]


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    spans = [(0, 400), (100, 500), (0, 500), (300, 600)]
    with ProcessPoolExecutor(4) as pool:
        jobs = [pool.submit(take_part, tmp_path, *span) for span in spans]
        computed = [job.result() for job in jobs]
    assert sum(computed) == 600
    assert References(tmp_path, KEY).of(samples(0, 600), Counted())[1] == 0
