"""How near an answer is to the expected one as a text: equal, contained, matched, the same number,
shared words.

Each is a function (answer, expected, given) -> [0, 1]; `given` is what the recipe gives the metric,
or None. Words are runs of letters and digits, letter case aside. ROUGE-L is Lin's (2004) with F1,
chrF is Popović's (2015) with 6 characters and beta 2, as sacrebleu computes it for one sentence.
Left out: stemming, synonyms, languages without spaces between words, which chrF is for."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import regex

from tunesmith.core.errors import InputError
from tunesmith.data.constraints import MAX_MATCH_SECONDS

DEFAULT_TOLERANCE = 1e-6  # relative, where the recipe gives none
CHRF_ORDER, CHRF_BETA = 6, 2  # chrF: characters of the longest n-gram, weight of recall
NUMBER_PATTERN = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+"
)


def split_words(text: str) -> list[str]:
    """Runs of letters and digits, in one spelling and letter case."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def exact_match(answer: str, expected: str, arg: Any) -> float:
    """The same text, white space at the ends aside."""
    del arg
    return float(answer.strip() == expected.strip())


def normalised_match(answer: str, expected: str, arg: Any) -> float:
    """The same words in the same order: letter case, punctuation and white space aside."""
    del arg
    return float(split_words(answer) == split_words(expected))


def contains(answer: str, expected: str, arg: Any) -> float:
    """The expected answer, or the text that the recipe gives, stands in it, whatever is said around
    it: by its words, in any letter case; what has no word, such as "+", as it is."""
    target = (arg or expected).strip()
    if split_words(target):
        return float(normalise_words(target) in normalise_words(answer))
    return float(target in answer if target else not answer.strip())


def normalise_words(text: str) -> str:
    """Its words with one blank between them, so that "in" does not find a part of a word."""
    return f" {' '.join(split_words(text))} "


def regex_match(answer: str, expected: str, arg: Any) -> float:
    """The recipe's pattern matches the answer, anywhere. Raises InputError when it takes too
    long."""
    del expected
    try:
        return float(arg.search(answer.strip(), timeout=MAX_MATCH_SECONDS) is not None)
    except TimeoutError:
        message = f"the pattern takes over {MAX_MATCH_SECONDS:g} seconds on a text of {len(answer):,} characters"
        fix = "repeat nothing inside a repeat: `(a+)+` tries every way to divide a text, `a+` only one"
        raise InputError(message, where=f"metrics: regex: {arg.pattern:.80}", fix=fix) from None


def numeric(answer: str, expected: str, arg: Any) -> float:
    """The last number of the answer is the last one expected, within a relative tolerance (of 0, an
    absolute one). Commas between thousands and exponents are read; 0 where either has no number."""
    answer_number, expected_number = _find_last_number(answer), _find_last_number(expected)
    if answer_number is None or expected_number is None:
        return 0.0
    tolerance = DEFAULT_TOLERANCE if arg is None else arg
    return float(abs(answer_number - expected_number) <= tolerance * (abs(expected_number) or 1.0))


def token_f1(answer: str, expected: str, arg: Any) -> float:
    """F1 over the words of both, each as often as it stands there (as for SQuAD, with articles)."""
    del arg
    answer_words, expected_words = Counter(split_words(answer)), Counter(split_words(expected))
    return _compute_f1(
        (answer_words & expected_words).total(), answer_words.total(), expected_words.total()
    )


def rouge_l(answer: str, expected: str, arg: Any) -> float:
    """F1 over the longest sequence of words that both have in this order."""
    del arg
    answer_words, expected_words = split_words(answer), split_words(expected)
    return _compute_f1(
        _compute_lcs_length(answer_words, expected_words), len(answer_words), len(expected_words)
    )


def chrf(answer: str, expected: str, arg: Any) -> float:
    """F-score over the runs of 1 to 6 characters of both, white space aside; recall counts
    twice."""
    del arg
    answer_chars, expected_chars = "".join(answer.split()), "".join(expected.split())
    if answer_chars == expected_chars:
        return 1.0
    shares: list[tuple[float, float]] = []
    for n in range(1, CHRF_ORDER + 1):
        answer_ngrams, expected_ngrams = (
            _count_ngrams(answer_chars, n),
            _count_ngrams(expected_chars, n),
        )
        if answer_ngrams and expected_ngrams:
            common = (answer_ngrams & expected_ngrams).total()
            shares.append((common / answer_ngrams.total(), common / expected_ngrams.total()))
    precision, recall = (
        (sum(values) / len(shares) for values in zip(*shares, strict=True))
        if shares
        else (0.0, 0.0)
    )
    denominator = CHRF_BETA**2 * precision + recall
    return (1 + CHRF_BETA**2) * precision * recall / denominator if denominator else 0.0


def _find_last_number(text: str) -> float | None:
    matches = NUMBER_PATTERN.findall(text)
    number = float(matches[-1].replace(",", "")) if matches else None
    return number if number is not None and math.isfinite(number) else None


def _compute_f1(num_common: int, num_answer: int, num_expected: int) -> float:
    """Of nothing wanted and nothing given: 1."""
    return 2 * num_common / (num_answer + num_expected) if num_answer + num_expected else 1.0


def _compute_lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit a word (Hyyrö 2004)."""
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


# ---------------------------------------------------------------- what a recipe gives


def parse_text(text: str) -> str:
    if not text.strip():
        raise ValueError("give a text that is not empty")
    return text


def parse_pattern(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from None


def parse_tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(f"a tolerance is a share of the expected number, from 0 to 1, not {text}")
    return number
