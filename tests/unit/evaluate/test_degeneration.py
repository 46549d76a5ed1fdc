"""What is wrong with an answer, seen from the answer alone: values worked out by hand."""

from __future__ import annotations

import pytest

from tunesmith.evaluate.degeneration import (
    compute_foreign_share,
    compute_repetition,
    count_distinct_bigrams,
    find_scripts,
    flag_identical_answers,
    is_json,
)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ((), 0),
        ((1, 2, 3), 0),
        ((1, 2, 3, 4), 0),
        ((7, 7, 7, 7, 7, 7), 2 / 3),
        ((1, 2, 3, 4, 1, 2, 3, 4), 1 / 5),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_that_stood_there_before(
    tokens: tuple[int, ...], share: float
) -> None:
    assert compute_repetition(tokens) == pytest.approx(share)


def test_distinct_counts_what_no_answer_before_has() -> None:
    assert count_distinct_bigrams([(1, 2, 3), (1, 2, 4), (5,)]) == ([2, 1, 0], [2, 2, 0])


def test_one_answer_for_all_and_different_ones() -> None:
    assert flag_identical_answers([" yes", "yes ", "no"]) == [1, 1, 0]
    assert flag_identical_answers(["a", "b", "c"]) == [0, 0, 0]


def test_letters_of_other_scripts_and_broken_bytes_are_foreign() -> None:
    scripts = find_scripts(["Grüße 42"])
    assert scripts == {"LATIN"}
    assert compute_foreign_share("abc", scripts) == 0
    assert compute_foreign_share("abc где", scripts) == 0.5
    assert compute_foreign_share("a\ufffd", scripts) == 0.5
    assert compute_foreign_share("12", scripts) == 0


@pytest.mark.parametrize(
    ("text", "full", "cut"),
    [
        ('{"a": 1}', True, True),
        ('{"a": [1, "b', False, True),
        ('{"a": ', False, True),
        ('{"a"', False, True),
        ("Sure! {", False, False),
        ("", False, False),
        ('{"a": 1} and', False, False),
        ("[" * 100_000, False, False),
        ("1" * 5_000, False, False),
    ],
)
def test_an_answer_without_room_need_only_begin_like_json(text: str, full: bool, cut: bool) -> None:
    assert (is_json(text, is_truncated=False), is_json(text, is_truncated=True)) == (full, cut)
