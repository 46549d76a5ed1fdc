"""The language of a text, by py3langid; a short text, or one that it is not sure of, has none."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

LETTERS = 40  # fewer say nothing
READ = 200  # characters
SURE = 0.8
CODE = re.compile(r"```.*?(?:```|\Z)|https?://\S+|[{}<>;=_\\]", re.DOTALL)


@cache
def _identifier() -> Any:
    """None without py3langid."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def installed() -> bool:
    return _identifier() is not None


def names() -> list[str]:
    return _identifier().labels


@cache
def _numbers() -> dict[str, int]:
    return {name: number for number, name in enumerate(names())}


def language(text: str) -> int:
    """Into `names()`, or -1."""
    text = CODE.sub(" ", text[: 2 * READ])[:READ]
    if sum(map(str.isalpha, text)) < LETTERS:
        return -1
    name, sure = _identifier().classify(text)
    return _numbers()[name] if sure >= SURE else -1
