"""Rows without padding: every token once, its position, what is scored; batches cut without changing them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_align.data.tokenization import TokenizedPair
from peft_align.models.packing import Sample, Segment, join, micro_batches, pack, sample_of

IDS = st.lists(st.integers(0, 99), max_size=12).map(tuple)
WORDS = st.lists(st.integers(0, 99), min_size=1, max_size=12).map(tuple)
SAMPLES = st.lists(st.builds(Sample, IDS, st.lists(WORDS, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=6)


def test_a_row_is_prompt_and_responses_one_behind_the_other() -> None:
    row = pack([Sample((1, 2, 3), ((4, 5), (6, 7, 8))), Sample((9,), ((10,),))])
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    assert row.segments == (Segment(0, 3, (2, 3)), Segment(8, 1, (1,)))
    assert row.sources.tolist() == [2, 3, 2, 5, 6, 8]
    assert row.targets.tolist() == [4, 5, 6, 7, 8, 10]
    assert row.owners.tolist() == [0, 0, 1, 1, 1, 2]
    assert row.responses == 3


def test_a_pair_is_a_prompt_with_both_responses_or_the_chosen_one() -> None:
    pair = TokenizedPair("1", [1, 2], [3], [4, 5])
    assert sample_of(pair, both=True) == Sample((1, 2), ((3,), (4, 5)))
    assert sample_of(pair, both=False) == Sample((1, 2), ((3,),))


@given(SAMPLES)
def test_each_scored_token_is_predicted_by_the_one_before_it_in_its_own_text(samples: list[Sample]) -> None:
    row = pack(samples)
    assert row.tokens.shape[1] == sum(map(len, samples))
    texts = [sample.prompt + words for sample in samples for words in sample.responses]
    starts = [len(sample.prompt) for sample in samples for _ in sample.responses]
    for source, target, owner in zip(row.sources, row.targets, row.owners, strict=True):
        place = int(row.positions[0, source])
        assert texts[owner][place] == int(row.tokens[0, source])
        assert texts[owner][place + 1] == int(target)
        assert place + 1 >= starts[owner]
    scored = sum(len(text) - max(1, start) for text, start in zip(texts, starts, strict=True))
    assert len(row.targets) == scored


@given(st.lists(SAMPLES, min_size=1, max_size=3))
def test_rows_that_are_joined_are_the_row_of_all_samples(several: list[list[Sample]]) -> None:
    joined, whole = join([pack(samples) for samples in several]), pack([s for samples in several for s in samples])
    assert joined.segments == whole.segments
    for name in ("tokens", "positions", "sources", "targets", "owners"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist(), name


@given(SAMPLES, st.integers(1, 60))
def test_a_batch_is_cut_into_parts_that_fit_and_nothing_is_lost(samples: list[Sample], budget: int) -> None:
    parts = micro_batches(samples, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    for part in parts:
        assert part
        assert sum(len(samples[i]) for i in part) <= budget or len(part) == 1
    lengths = [len(samples[i]) for part in parts for i in part]
    assert lengths == sorted(lengths, reverse=True)


def test_parts_are_of_like_size() -> None:
    samples = [Sample((1,) * 99, ((1,),)) for _ in range(9)]
    assert [len(part) for part in micro_batches(samples, 800)] == [5, 4]


@pytest.mark.parametrize("budget", [1, 10_000])
def test_a_batch_of_none_has_no_parts(budget: int) -> None:
    assert micro_batches([], budget) == []
