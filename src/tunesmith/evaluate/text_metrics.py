"""Metrics of text answers: equal, contained, matching, the same number, overlapping words.

Each metric is a function (answer, expected, arg) -> [0, 1]; `arg` is the metric's argument in the
recipe, or None. Words are runs of letters and digits, case-folded. ROUGE-L is Lin's (2004) F1; chrF
is Popović's (2015) with 6 characters and beta 2, as sacrebleu computes it per sentence.
Left out: stemming, synonyms, and languages without spaces between words, for which there is chrF.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.data.constraints import MAX_MATCH_SECONDS

DEFAULT_TOLERANCE = 1e-6  # relative
CHRF_ORDER = 6  # characters of the longest n-gram
CHRF_BETA = 2  # weight of recall
# a sign after a word or a number is a dash: the last number of "10-12" is 12
SIGN = r"(?:(?<![\w.,)\]}%])[-+\u2212])?"
NUMBER_PATTERN = re.compile(
    rf"{SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?(?:[eE][-+\u2212]?\d+)?|\.\d+)"
)


def split_words(text: str) -> list[str]:
    """Return the runs of letters and digits, Unicode-normalized and case-folded."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def exact_match(answer: str, expected: str, arg: Any) -> float:
    """Return 1 for the same text, up to white space at the ends."""
    del arg
    return float(answer.strip() == expected.strip())


def normalized_match(answer: str, expected: str, arg: Any) -> float:
    """Return 1 for the same words in the same order, up to case, punctuation and white space."""
    del arg
    return float(split_words(answer) == split_words(expected))


def contains(answer: str, expected: str, arg: Any) -> float:
    """Return 1 if the answer contains the expected answer, or the recipe's text.

    Words are compared case-folded and complete; a text without words, such as "+", literally.
    """
    target = (arg or expected).strip()
    if not target:
        return float(not answer.strip())
    if split_words(target):
        return float(normalize_words(target) in normalize_words(answer))
    return float(target in answer)


def normalize_words(text: str) -> str:
    """Return the words with a space around each, so that `in` matches complete words only."""
    return f" {' '.join(split_words(text))} "


def regex_match(answer: str, expected: str, arg: Any) -> float:
    """Return 1 if the pattern matches anywhere. Raises InputError when it takes too long."""
    del expected
    try:
        return float(arg.search(answer.strip(), timeout=MAX_MATCH_SECONDS) is not None)
    except TimeoutError:
        length = f"{len(answer):,} characters"
        message = f"the pattern takes over {MAX_MATCH_SECONDS:g} seconds on a text of {length}"
        fix = "avoid nested repeats: `(a+)+` backtracks exponentially, `a+` does not"
        raise InputError(message, where=f"metrics: regex: {arg.pattern:.80}", fix=fix) from None
    except MemoryError:
        message = f"the pattern needs too much memory on a text of {len(answer):,} characters"
        fix = "avoid nested repeats: `(a+)+` backtracks exponentially, `a+` does not"
        raise InputError(message, where=f"metrics: regex: {arg.pattern:.80}", fix=fix) from None


def numeric(answer: str, expected: str, arg: Any) -> float:
    """Return 1 if the last numbers agree within a relative tolerance (absolute for an expected 0).

    Thousands separators, exponents and signs are read, a hyphen between numbers is none; 0 where
    either text has no number.
    """
    answer_number = _find_last_number(answer)
    expected_number = _find_last_number(expected)
    if answer_number is None or expected_number is None:
        return 0.0
    tolerance = DEFAULT_TOLERANCE if arg is None else arg
    return float(abs(answer_number - expected_number) <= tolerance * (abs(expected_number) or 1.0))


def token_f1(answer: str, expected: str, arg: Any) -> float:
    """Return F1 over the bags of words (as SQuAD's, articles included)."""
    del arg
    answer_words = Counter(split_words(answer))
    expected_words = Counter(split_words(expected))
    common = answer_words & expected_words
    return _compute_f1(common.total(), answer_words.total(), expected_words.total())


def rouge_l(answer: str, expected: str, arg: Any) -> float:
    """Return F1 over the longest common subsequence of words."""
    del arg
    answer_words = split_words(answer)
    expected_words = split_words(expected)
    length = _compute_lcs_length(answer_words, expected_words)
    return _compute_f1(length, len(answer_words), len(expected_words))


def chrf(answer: str, expected: str, arg: Any) -> float:
    """Return the F-score over n-grams of 1 to 6 characters, white space removed; recall counts
    twice."""
    del arg
    answer_chars = "".join(answer.split())
    expected_chars = "".join(expected.split())
    if answer_chars == expected_chars:
        return 1.0
    precisions: list[float] = []
    recalls: list[float] = []
    for n in range(1, CHRF_ORDER + 1):
        answer_ngrams = _count_ngrams(answer_chars, n)
        expected_ngrams = _count_ngrams(expected_chars, n)
        if answer_ngrams and expected_ngrams:
            common = (answer_ngrams & expected_ngrams).total()
            precisions.append(common / answer_ngrams.total())
            recalls.append(common / expected_ngrams.total())
    precision = sum(precisions) / max(1, len(precisions))
    recall = sum(recalls) / max(1, len(recalls))
    denominator = CHRF_BETA**2 * precision + recall
    return (1 + CHRF_BETA**2) * precision * recall / denominator if denominator else 0.0


def _find_last_number(text: str) -> float | None:
    matches = NUMBER_PATTERN.findall(text)
    number = float(matches[-1].replace(",", "").replace("\u2212", "-")) if matches else None
    return number if number is not None and math.isfinite(number) else None


def _compute_f1(num_common: int, num_answer: int, num_expected: int) -> float:
    """Return F1 from counts; 1 if both texts are empty."""
    total = num_answer + num_expected
    return 2 * num_common / total if total else 1.0


def _compute_lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with a bit per word (Hyyrö 2004)."""
    masks: dict[str, int] = {}
    for index, word in enumerate(first):
        masks[word] = masks.get(word, 0) | 1 << index
    full_mask = (1 << len(first)) - 1
    row = full_mask
    for word in second:
        hit = row & masks.get(word, 0)
        row = ((row + hit) | (row - hit)) & full_mask
    return len(first) - row.bit_count()


def _count_ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


# ---------------------------------------------------------------- arguments


def parse_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def parse_tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(
            f"a tolerance is a fraction of the expected number, from 0 to 1, not {text}"
        )
    return number
