"""Named checkers for constraints: `never: [apology]`.

    text -> violating spans, as (start, end) of characters

A checker is a pattern, or a function where a pattern is not enough; a new one is a line in
CHECKERS. Each is broad on purpose: a row where the match is correct says `"negative": false`. Left
out: what happens to a match (data/constraints.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Positions where JSON is tried: a million nested brackets would take hours.
MAX_JSON_STARTS = 1000
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Checker:
    """`instruction` is the constraint in words that follow "Never" in a prompt."""

    instruction: str
    matcher: str | Callable[[str], Spans]


def find_text_outside_json(text: str) -> Spans:
    """Return the text before and after the longest JSON object or array; all text if there is none.

    A text that is JSON in full, also a number or a string, has nothing outside."""
    if _is_json(text):
        return []
    start, end = _find_longest_json(text)
    spans = (_trim_span(text, 0, start), _trim_span(text, end, len(text)))
    return [span for span in spans if span is not None]


def _is_json(text: str) -> bool:
    try:
        _JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _find_longest_json(text: str) -> tuple[int, int]:
    """Return (start, end) of the longest object or array; (0, 0) if there is none."""
    longest = (0, 0)
    position = 0
    for _ in range(MAX_JSON_STARTS):
        match = _OPENING.search(text, position)
        if match is None:
            break
        start = match.start()
        try:
            position = _JSON.raw_decode(text, start)[1]
        except (ValueError, RecursionError):
            position = start + 1
        else:
            longest = max(longest, (start, position), key=lambda span: span[1] - span[0])
    return longest


def _trim_span(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Return the span without white space at its ends; None if nothing else is in it."""
    piece = text[start:end]
    if not piece.strip():
        return None
    leading = len(piece) - len(piece.lstrip())
    return start + leading, start + len(piece.rstrip())


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)  # Python would also read NaN
_OPENING = re.compile(r"[{\[]")

CHECKERS: dict[str, Checker] = {
    "apology": Checker(
        "apologise or say sorry", r"(?i)\b(sorry|apolog(y|ies)|apologi[sz](e[sd]?|ing))\b"
    ),
    "ai-self-mention": Checker(
        "speak of yourself as an AI, a language model or an assistant program",
        r"(?i)\b(as|being|(i am|i['’]m)((?: (?-i:[A-Z])[\w.-]*){1,3},)?) "
        r"(just |only |merely |simply )?(an?|your) "
        r"((?!(who|that|with|of|in|on|to|for|from|at|by|about|using) )[\w-]+,? ){0,4}?"
        r"(ai|artificial intelligence|language model|chatbot|virtual assistant|computer program)\b"
        r"|\b(ai|language models?|chatbots?)( \w+)? (like|such as) (me|myself)\b"
        r"|\bi was (programmed to|trained on (a|an|large|vast|lots|data|texts?)|"
        r"(trained|developed|created|built) by "
        r"(openai|anthropic|google|meta|microsoft|alibaba|mistral|hugging ?face)"
        r")\b|\bmy (training data|knowledge cut-?off|programming)\b",
    ),
    "text-outside-json": Checker("write anything before or after the JSON", find_text_outside_json),
}
