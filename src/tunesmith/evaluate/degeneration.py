"""Detect degenerate answers without a model: repetition, sameness, wrong script, broken JSON.

In: tokens or texts of answers. Out: a number per answer.
Left out: thresholds (train/guard/detectors.py), correctness (generate_until.py).
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence


def compute_repetition(tokens: Sequence[int]) -> float:
    """Return seq-rep-4 (Welleck 2019): the share of 4-grams that repeat an earlier one; 0 for an
    answer of fewer than four tokens."""
    grams = extract_ngrams(tokens, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def extract_ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def count_distinct_bigrams(answers: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return each answer's number of bigrams that no earlier answer has, and of all its bigrams.

    distinct-2 (Li 2016) is the ratio of their sums.
    """
    previous: set[tuple[int, ...]] = set()
    new: list[int] = []
    totals: list[int] = []
    for answer in answers:
        grams = extract_ngrams(answer, 2)
        new.append(len(set(grams) - previous))
        totals.append(len(grams))
        previous.update(grams)
    return new, totals


def flag_identical_answers(answers: Sequence[str]) -> list[float]:
    """Return 1 for the most frequent answer if it occurs more than once, else 0."""
    common, count = Counter(answer.strip() for answer in answers).most_common(1)[0]
    return [float(count > 1 and answer.strip() == common) for answer in answers]


def find_scripts(texts: Iterable[str]) -> set[str]:
    """Return the Unicode scripts of the letters: LATIN, CYRILLIC, CJK, ..."""
    letters = {letter for text in texts for letter in text if letter.isalpha()}
    return {_get_script(letter) for letter in letters}


def _get_script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def compute_foreign_share(text: str, allowed_scripts: set[str]) -> float:
    """Return the share of letters in other scripts and of replacement characters (invalid
    bytes)."""
    characters = [character for character in text if character.isalpha() or character == "\ufffd"]
    if not characters:
        return 0.0
    foreign = 0
    for character in characters:
        if character == "\ufffd" or _get_script(character) not in allowed_scripts:
            foreign += 1
    return foreign / len(characters)


def is_json(text: str, *, is_truncated: bool) -> bool:
    """Return whether a text is JSON; a truncated answer need only start like JSON."""
    stripped = text.strip()
    try:
        json.loads(stripped)
    except json.JSONDecodeError as error:
        is_at_end = error.pos >= len(stripped) - 1 or error.msg.startswith("Unterminated")
        return is_truncated and bool(stripped) and is_at_end
    except (ValueError, RecursionError):  # of more digits or levels than Python reads
        return False
    return True
