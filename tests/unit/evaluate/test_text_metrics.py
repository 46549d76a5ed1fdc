"""Metrics on texts: against the reference implementations, and where they are easily wrong."""

from __future__ import annotations

import math

import pytest
import regex
from sacrebleu.metrics.chrf import CHRF

from tunesmith.core.errors import InputError
from tunesmith.evaluate import text_metrics
from tunesmith.evaluate.metrics import grade_answer, parse_metric_arg
from tunesmith.evaluate.text_metrics import (
    chrf,
    contains,
    exact_match,
    normalized_match,
    numeric,
    regex_match,
    rouge_l,
    token_f1,
)

PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("The quick brown fox", "A fast brown fox jumps"),
    ("a", "abcdef"),
    ("Grüße aus Köln!", "Viele Grüße aus Köln"),
    ("x", "y"),
    ("one two three four five six seven", "seven six five four three two one"),
    ("", "abc"),
]


def test_chrf_is_that_of_sacrebleu() -> None:
    reference = CHRF()
    for answer, expected in PAIRS:
        score = reference.sentence_score(answer, [expected]).score / 100
        assert chrf(answer, expected, None) == pytest.approx(score, abs=1e-6)


def test_rouge_l_is_that_of_rouge_score() -> None:
    """rouge-score 0.1.2: fmeasure of rougeL; but it reads ASCII letters only, and takes ü for a
    space."""
    wanted = [0.833333, 0.444444, 0.0, 6 / 7, 0.0, 0.142857, 0.0]
    assert [rouge_l(answer, expected, None) for answer, expected in PAIRS] == pytest.approx(
        wanted, abs=1e-6
    )


def test_token_f1_counts_words_wherever_they_stand() -> None:
    wanted = [5 / 6, 4 / 9, 0.0, 6 / 7, 0.0, 1.0, 0.0]
    assert [token_f1(answer, expected, None) for answer, expected in PAIRS] == pytest.approx(wanted)
    assert token_f1("no no no", "no", None) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "metric", [chrf, rouge_l, token_f1, exact_match, normalized_match, contains]
)
def test_the_expected_answer_is_right_even_if_it_holds_no_word(metric) -> None:
    for text in ("a b", "", "…", "三つ", "word " * 3000):
        assert metric(text, text, None) == 1


def test_exact_match_forgives_space_at_the_ends_only() -> None:
    assert exact_match(" yes\n", "yes", None) == 1
    assert exact_match("Yes", "yes", None) == 0
    assert exact_match("yes yes", "yes", None) == 0


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        ("Yes.", "yes", 1),
        ("NEW  YORK!", "New York", 1),
        ("ﬁne", "fine", 1),
        ("yes no", "no yes", 0),
        ("-5", "5", 1),
    ],
)
def test_normalized_match_forgives_case_punctuation_and_space(
    answer: str, expected: str, equal: int
) -> None:
    assert normalized_match(answer, expected, None) == equal


@pytest.mark.parametrize(
    ("answer", "arg", "expected"),
    [
        ("It is  Paris.", None, 1),
        ("it is paris", "IS PARIS", 1),
        ("London", None, 0),
        ("Par is", None, 0),
        ("Parisian", None, 0),
        ("3.8.12", "3.8.1", 0),
    ],
)
def test_contains_looks_for_the_expected_answer_or_the_given_text(
    answer: str, arg: str | None, expected: int
) -> None:
    assert contains(answer, "Paris", arg) == expected


def test_contains_takes_what_has_no_word_as_it_is() -> None:
    assert [contains(answer, "+", None) for answer in ("the sign is +", "+", "plus")] == [1, 1, 0]
    assert [contains(answer, "", None) for answer in ("", " ", "anything")] == [1, 1, 0]


def test_a_pattern_matches_anywhere_unless_it_says_otherwise() -> None:
    assert regex_match("on 2026-11-26.", "", regex.compile(r"\d{4}-\d\d-\d\d")) == 1
    assert regex_match("on 2026-11-26.", "", regex.compile(r"^\d{4}-\d\d-\d\d$")) == 0


def test_a_pattern_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics, "MAX_MATCH_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"takes over 0\.05 seconds") as refusal:
        regex_match("a" * 40 + "!", "", regex.compile("(a|aa)+$"))
    assert "metrics: regex" in refusal.value.where


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance", "right"),
    [
        ("The answer is 1,234.50.", "1234.5", None, 1),
        ("3 times 4 is 12", "12", None, 1),
        ("12 is 3 times 4", "12", None, 0),  # the last number counts
        ("about 101", "100", 0.01, 1),
        ("about 102", "100", 0.01, 0),
        ("-5", "5", None, 0),
        ("1e3", "1000", None, 1),
        (".5", "0.5", None, 1),
        ("0.001", "0", 0.01, 1),
        ("1,2,3", "3", None, 1),
        ("no number", "3", None, 0),
        ("9" * 400, "9", None, 0),  # no finite number
        ("3", "none", None, 0),
        ("10-12", "12", None, 1),  # a range, no negative number
        ("10-12", "-12", None, 0),
        ("from 3.5-4", "4", None, 1),
        ("2026-11-27", "27", None, 1),
        ("step-12", "12", None, 1),
        ("(a)-12", "12", None, 1),
        ("50%-60%", "60", None, 1),
        ("1,000-2,000", "2000", None, 1),
        ("10 - 12", "12", None, 1),
        ("10 -12", "-12", None, 1),
        ("x=-12", "-12", None, 1),
        ("$-12", "-12", None, 1),
        ("(-12)", "-12", None, 1),
        ("\u221212", "-12", None, 1),  # the minus sign of typeset text
        ("+12", "12", None, 1),
        ("1e-3", "0.001", None, 1),
        ("-1.5e3", "-1500", None, 1),
        ("-.5", "-0.5", None, 1),
    ],
)
def test_numbers_are_read_and_compared(
    answer: str, expected: str, tolerance: float | None, right: int
) -> None:
    assert numeric(answer, expected, tolerance) == right


def test_what_the_recipe_gives_reaches_the_metric() -> None:
    for metric, answer, expected in (
        ("numeric: 0.1", "95", "100"),
        ("contains: dear", "Dear Ada", "no matter"),
        (r"regex: ^\w+: \d+$", "age: 36", "no matter"),  # a colon and a space in the pattern
    ):
        assert grade_answer(metric, answer, expected, parse_metric_arg(metric, None)) == 1
    assert math.isclose(parse_metric_arg("numeric: 0.05", None), 0.05)
