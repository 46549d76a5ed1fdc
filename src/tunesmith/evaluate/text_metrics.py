"""How near an answer is to the expected one as a text: equal, contained, matched, the same number, shared words.

Each is a function (answer, expected, given) -> [0, 1]; `given` is what the recipe gives the metric, or None. Words are
runs of letters and digits, letter case aside. ROUGE-L is Lin's (2004) with F1, chrF is Popović's (2015) with 6
characters and beta 2, as sacrebleu computes it for one sentence. Left out: stemming, synonyms, languages without spaces
between words, which chrF is for.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import regex

from tunesmith.core.errors import InputError
from tunesmith.data.constraints import SECONDS

TOLERANCE = 1e-6  # relative, where the recipe gives none
ORDER, BETA = 6, 2  # chrF: characters of the longest n-gram, weight of recall
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in one spelling and letter case."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def exact_match(answer: str, expected: str, given: Any) -> float:
    """The same text, white space at the ends aside."""
    del given
    return float(answer.strip() == expected.strip())


def normalised_match(answer: str, expected: str, given: Any) -> float:
    """The same words in the same order: letter case, punctuation and white space aside."""
    del given
    return float(words(answer) == words(expected))


def contains(answer: str, expected: str, given: Any) -> float:
    """The expected answer, or the text that the recipe gives, stands in it, whatever is said around it: by its words,
    in any letter case; what has no word, such as "+", as it is."""
    wanted = (given or expected).strip()
    if words(wanted):
        return float(evened(wanted) in evened(answer))
    return float(wanted in answer if wanted else not answer.strip())


def evened(text: str) -> str:
    """Its words with one blank between them, so that "in" does not find a part of a word."""
    return f" {' '.join(words(text))} "


def regex_match(answer: str, expected: str, given: Any) -> float:
    """The recipe's pattern matches the answer, anywhere. Raises InputError when it takes too long."""
    del expected
    try:
        return float(given.search(answer.strip(), timeout=SECONDS) is not None)
    except TimeoutError:
        what = f"the pattern takes over {SECONDS:g} seconds on a text of {len(answer):,} characters"
        fix = "repeat nothing inside a repeat: `(a+)+` tries every way to divide a text, `a+` only one"
        raise InputError(what, where=f"metrics: regex: {given.pattern:.80}", fix=fix) from None


def numeric(answer: str, expected: str, given: Any) -> float:
    """The last number of the answer is the last one expected, within a relative tolerance (of 0, an absolute one).
    Commas between thousands and exponents are read; 0 where either has no number."""
    found, wanted = _last_number(answer), _last_number(expected)
    if found is None or wanted is None:
        return 0.0
    tolerance = TOLERANCE if given is None else given
    return float(abs(found - wanted) <= tolerance * (abs(wanted) or 1.0))


def token_f1(answer: str, expected: str, given: Any) -> float:
    """F1 over the words of both, each as often as it stands there (as for SQuAD, with articles)."""
    del given
    found, wanted = Counter(words(answer)), Counter(words(expected))
    return _f1((found & wanted).total(), found.total(), wanted.total())


def rouge_l(answer: str, expected: str, given: Any) -> float:
    """F1 over the longest sequence of words that both have in this order."""
    del given
    found, wanted = words(answer), words(expected)
    return _f1(_common(found, wanted), len(found), len(wanted))


def chrf(answer: str, expected: str, given: Any) -> float:
    """F-score over the runs of 1 to 6 characters of both, white space aside; recall counts twice."""
    del given
    found, wanted = "".join(answer.split()), "".join(expected.split())
    if found == wanted:
        return 1.0
    shares: list[tuple[float, float]] = []
    for n in range(1, ORDER + 1):
        ours, theirs = _runs(found, n), _runs(wanted, n)
        if ours and theirs:
            common = (ours & theirs).total()
            shares.append((common / ours.total(), common / theirs.total()))
    precision, recall = (sum(side) / len(shares) for side in zip(*shares, strict=True)) if shares else (0.0, 0.0)
    below = BETA**2 * precision + recall
    return (1 + BETA**2) * precision * recall / below if below else 0.0


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    number = float(found[-1].replace(",", "")) if found else None
    return number if number is not None and math.isfinite(number) else None


def _f1(common: int, found: int, wanted: int) -> float:
    """Of nothing wanted and nothing given: 1."""
    return 2 * common / (found + wanted) if found + wanted else 1.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit a word (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        hit = row & places.get(word, 0)
        row = ((row + hit) | (row - hit)) & every
    return len(first) - row.bit_count()


def _runs(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


# ---------------------------------------------------------------- what a recipe gives


def as_text(given: str) -> str:
    if not given.strip():
        raise ValueError("give a text that is not empty")
    return given


def as_pattern(given: str) -> regex.Pattern[str]:
    try:
        return regex.compile(given)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from None


def as_tolerance(given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(f"a tolerance is a share of the expected number, from 0 to 1, not {given}")
    return number
