"""Texts that begin alike: each once, grouped by what they share, in rows that hold each token once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_align.models.shared_prefix import Group, Target, Text, groups_of, rows_of, sample_of, texts_of

Request = tuple[list[int], list[int]]
WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # few words: many texts begin alike
REQUESTS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=30)


def plain(*texts: list[int]) -> list[Text]:
    """Texts of which nothing is asked, in order."""
    return [Text(tuple(tokens), ()) for tokens in sorted(texts)]


def test_one_token_answers_to_one_context_are_one_text() -> None:
    texts = texts_of([([1, 2, 3], [answer]) for answer in (7, 8, 9)], 10)
    assert texts == [Text((1, 2, 3), (Target(2, 7, 0), Target(2, 8, 1), Target(2, 9, 2)))]


def test_requests_that_split_one_text_at_different_places_share_it() -> None:
    texts = texts_of([([1, 2], [3, 4]), ([1, 2, 3], [5])], 10)
    assert texts == [Text((1, 2, 3), (Target(1, 3, 0), Target(2, 4, 0), Target(2, 5, 1)))]


def test_of_a_text_that_is_too_long_the_end_stays() -> None:
    assert texts_of([([1, 2, 3, 4], [5, 6])], 3) == [Text((3, 4, 5), (Target(1, 5, 0), Target(2, 6, 0)))]
    assert texts_of([([1, 2, 3], [4, 5])], 4) == [Text((1, 2, 3, 4), (Target(2, 4, 0), Target(3, 5, 0)))]
    assert texts_of([([1], [4, 5, 6])], 3) == [Text((1, 4, 5), (Target(0, 4, 0), Target(1, 5, 0), Target(2, 6, 0)))]


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [1, 2, 3, 4])])
def test_what_cannot_be_scored_is_refused(request_: Request) -> None:
    with pytest.raises(ValueError, match="request 1 cannot be scored"):
        texts_of([([1], [2]), request_], 3)


def test_a_text_that_another_begins_with_has_a_token_of_its_own() -> None:
    texts = plain([1, 2, 3], [1, 2, 3, 4, 5])
    assert groups_of(texts) == [Group(2, (0, 1))]
    assert sample_of(Group(2, (0, 1)), texts).responses == ((3,), (3, 4, 5))


def test_questions_are_grouped_by_themselves_if_they_share_more_than_all() -> None:
    questions = [[0, *[q] * 10, answer] for q in (1, 2, 3) for answer in (4, 5, 6)]
    assert [group.prefix for group in groups_of(plain(*questions))] == [11, 11, 11]


def test_a_large_group_is_not_given_up_for_two_texts_that_share_a_little_more() -> None:
    texts = plain(*[[9] * 50 + [i, i, i] for i in range(8)], [9] * 50 + [3, 3, 4])
    assert groups_of(texts) == [Group(50, tuple(range(9)))]


def test_a_text_that_shares_little_does_not_join() -> None:
    texts = plain([1, 1, *range(20), 5], [1, 1, *range(20), 6], [1, 2, 3])
    assert groups_of(texts) == [Group(22, (0, 1)), Group(0, (2,))]


def test_a_group_larger_than_a_row_goes_on_in_rows_of_like_size_without_its_prefix() -> None:
    texts = plain(*[[1] * 40 + [2 + i] * 10 for i in range(9)])
    (rows,) = rows_of(groups_of(texts), texts, 60)
    assert [len(row[0].texts) for row in rows] == [1, 4, 4]
    assert {group.prefix for row in rows for group in row} == {40}


def test_small_groups_share_a_row() -> None:
    texts = plain(*[[i] * 5 + [answer] for i in range(6) for answer in (7, 8)])
    assert [len(row) for rows in rows_of(groups_of(texts), texts, 21) for row in rows] == [3, 3]


@given(REQUESTS, st.integers(12, 40))
def test_each_request_is_asked_once_of_the_end_of_its_own_text(requests: list[Request], longest: int) -> None:
    texts = texts_of(requests, longest)
    assert len({text.tokens for text in texts}) == len(texts)
    found: dict[int, list[tuple[Text, Target]]] = {}
    for text in texts:
        for target in text.targets:
            found.setdefault(target.request, []).append((text, target))
    assert found.keys() == set(range(len(requests)))
    for i, (context, continuation) in enumerate(requests):
        (text,) = {text for text, _ in found[i]}
        whole = [*context, *continuation]
        assert list(text.tokens) == whole[max(0, len(whole) - 1 - longest) : -1]
        assert [target.token for _, target in found[i]] == continuation
        behind = len(text.tokens) - len(continuation)
        assert [target.position - behind for _, target in found[i]] == list(range(len(continuation)))


@given(REQUESTS)
def test_groups_hold_each_text_once_and_whole_and_never_more_tokens(requests: list[Request]) -> None:
    texts = texts_of(requests, 30)
    groups = groups_of(texts)
    assert [i for group in groups for i in group.texts] == list(range(len(texts)))
    for group in groups:
        sample = sample_of(group, texts)
        assert len(sample.prompt) == group.prefix
        assert all(sample.responses)
        assert [sample.prompt + rest for rest in sample.responses] == [texts[i].tokens for i in group.texts]
    computed = sum(len(sample_of(group, texts)) for group in groups)
    assert computed <= sum(len(text.tokens) for text in texts)


@given(REQUESTS, st.integers(1, 60))
def test_rows_hold_each_text_once_within_the_budget(requests: list[Request], budget: int) -> None:
    texts = texts_of(requests, 30)
    groups = groups_of(texts)
    placed = rows_of(groups, texts, budget)
    assert sorted(i for rows in placed for row in rows for g in row for i in g.texts) == list(range(len(texts)))
    computed = 0
    for rows in placed:
        assert len(rows) == 1 or all(len(row) == 1 for row in rows)
        for at, row in enumerate(rows):
            own = [len(texts[i].tokens) - group.prefix for group in row for i in group.texts]
            size = sum(own) + (0 if at else sum(group.prefix for group in row))
            assert size <= budget or len(own) == 1
            computed += size
    assert computed == sum(len(sample_of(group, texts)) for group in groups)


@given(REQUESTS, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_requests(requests: list[Request], mixed: random.Random) -> None:
    def plan(given: list[Request]) -> Any:
        texts = texts_of(given, 30)
        asked = [sorted((target.position, target.token) for target in text.targets) for text in texts]
        return texts_and_rows(texts), asked

    def texts_and_rows(texts: list[Text]) -> Any:
        return [text.tokens for text in texts], rows_of(groups_of(texts), texts, 40)

    other = list(requests)
    mixed.shuffle(other)
    assert plan(requests) == plan(other)
