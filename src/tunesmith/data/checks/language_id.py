"""Guess the language of a text with py3langid, and tell texts that are in other languages.

Code, paths and names with dots are left out. A short text alone says little: `is_foreign` asks only
whether it can be in one of the languages that most rows have."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np

MIN_LETTERS = 6
MIN_LOWER_WORDS = 2  # in Latin script: names have no language
MAX_CHARS = 200  # that are classified
MIN_CLEAR_LETTERS = 40
MIN_CLEAR_PROBABILITY = 0.8
MAX_PROBABILITY = 0.05  # of the expected languages together, of a foreign text
CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|[!-~]*[_\\/{}<>;=()\d|][!-~]*|[!-~]+\.[!-~]+|(?<!\S)-[!-~]+",
    re.DOTALL,
)


@cache
def _load_identifier() -> Any:
    """Return the identifier of all languages, or None without py3langid."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def is_installed() -> bool:
    return _load_identifier() is not None


def list_languages() -> list[str]:
    return _load_identifier().labels


def guess_language(text: str) -> tuple[int, bool]:
    """Return the most probable language as index into `list_languages()`, or -1 without letters,
    and whether the text is long and clear enough to count for the whole data set."""
    text = _strip_code(text)
    num_letters = sum(map(str.isalpha, text))
    if not num_letters:
        return -1, False
    name, probability = _load_identifier().classify(text)
    is_clear = num_letters >= MIN_CLEAR_LETTERS and probability >= MIN_CLEAR_PROBABILITY
    return _index_languages()[name], bool(is_clear)


def detect_language(text: str) -> int:
    """Return the index of the language in `list_languages()`, or -1 if it is not clear."""
    number, is_clear = guess_language(text)
    return number if is_clear else -1


@cache
def _index_languages() -> dict[str, int]:
    return {name: number for number, name in enumerate(list_languages())}


def is_foreign(text: str, expected: Collection[int]) -> bool:
    """Return whether the text has words, and they are hardly in one of these languages."""
    text = _strip_code(text)
    letters = [character for character in text if character.isalpha()]
    is_latin = 2 * sum(map(str.isascii, letters)) >= len(letters)
    num_lower_words = sum(word[0].islower() for word in text.split())
    if is_latin and (len(letters) < MIN_LETTERS or num_lower_words < MIN_LOWER_WORDS):
        return False
    probabilities = dict(_load_identifier().rank(text))
    names = list_languages()
    return float(np.sum([probabilities[names[number]] for number in expected])) < MAX_PROBABILITY


def _strip_code(text: str) -> str:
    return " ".join(CODE.sub(" ", text[: 4 * MAX_CHARS]).split())[:MAX_CHARS]
