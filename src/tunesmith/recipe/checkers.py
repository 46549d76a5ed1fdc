"""What an answer may be checked for by name: `never: [apology]`.

    text -> where it is bad, as (start, end) of its characters

A checker is a pattern, or a function where no pattern will do; a new one is a line in CHECKERS.
Each is broad on purpose: a row where the match is right says `"negative": false`. Left out: what
becomes of a match (data/never.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# brackets of a text at which JSON may begin: a million of them, nested, would take hours
MAX_JSON_STARTS = 1000
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Checker:
    """`told`: the constraint in words, as a prompt would have it after "Never"."""

    instruction: str
    matcher: str | Callable[[str], Spans]


def find_text_outside_json(text: str) -> Spans:
    """What stands before and after the longest JSON object or array; all of a text without one. A
    text that is JSON as a whole, a number or a string too, has nothing outside."""
    start, end = _find_longest_json(text)
    sides = ((0, start), (end, len(text)))
    return (
        []
        if _is_json(text)
        else [
            trimmed
            for side_start, side_end in sides
            if (trimmed := _trim_span(text, side_start, side_end))
        ]
    )


def _is_json(text: str) -> bool:
    try:
        _JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _find_longest_json(text: str) -> tuple[int, int]:
    """(start, end) of the longest object or array; both 0 without one."""
    longest, position = (0, 0), 0
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
    """The span without the white space at its ends; None if nothing else is there."""
    piece = text[start:end]
    leading = len(piece) - len(piece.lstrip())
    return (start + leading, start + len(piece.rstrip())) if piece.strip() else None


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)  # Python also reads NaN, which is none
_OPENING = re.compile(r"[{\[]")

CHECKERS: dict[str, Checker] = {
    "apology": Checker(
        "apologise or say sorry", r"(?i)\b(sorry|apolog(y|ies)|apologi[sz](e[sd]?|ing))\b"
    ),
    "ai-self-mention": Checker(
        "speak of yourself as an AI, a language model or an assistant program",
        r"(?i)\b(as|being|(i am|i['’]m)((?: (?-i:[A-Z])[\w.-]*){1,3},)?) (just |only |merely |simply )?(an?|your) "
        r"((?!(who|that|with|of|in|on|to|for|from|at|by|about|using) )[\w-]+,? ){0,4}?"
        r"(ai|artificial intelligence|language model|chatbot|virtual assistant|computer program)\b"
        r"|\b(ai|language models?|chatbots?)( \w+)? (like|such as) (me|myself)\b"
        r"|\bi was (programmed to|trained on (a|an|large|vast|lots|data|texts?)|"
        r"(trained|developed|created|built) by (openai|anthropic|google|meta|microsoft|alibaba|mistral|hugging ?face)"
        r")\b|\bmy (training data|knowledge cut-?off|programming)\b",
    ),
    "text-outside-json": Checker("write anything before or after the JSON", find_text_outside_json),
}
