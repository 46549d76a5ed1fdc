"""Detect the language of a text with py3langid; short and ambiguous texts have none."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

MIN_LETTERS = 40
MAX_CHARS = 200  # that are classified
MIN_CONFIDENCE = 0.8
CODE = re.compile(r"```.*?(?:```|\Z)|https?://\S+|[{}<>;=_\\]", re.DOTALL)


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


@cache
def _index_languages() -> dict[str, int]:
    return {name: number for number, name in enumerate(list_languages())}


def detect_language(text: str) -> int:
    """Return the index of the language in `list_languages()`, or -1."""
    text = CODE.sub(" ", text[: 2 * MAX_CHARS])[:MAX_CHARS]
    if sum(map(str.isalpha, text)) < MIN_LETTERS:
        return -1
    name, confidence = _load_identifier().classify(text)
    return _index_languages()[name] if confidence >= MIN_CONFIDENCE else -1
