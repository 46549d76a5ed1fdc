"""Two texts word by word: what of one is not in the other.

    marked("a b c", "a c") -> ["a ", "b ", "c"]        every second piece, from the second on, is marked

The pieces together are the text. Long texts are compared by what they begin and end with alike,
since difflib takes quadratic time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

WORD_PATTERN = re.compile(r"\w+|\s+|[^\w\s]")
MAX_DIFF_WORDS = 600  # words that are compared one by one


def mark_differences(text: str, other: str) -> list[str]:
    """Pieces of `text`, in turn as in `other` and not as in it."""
    mine, theirs = WORD_PATTERN.findall(text), WORD_PATTERN.findall(other)
    if mine == theirs:
        return [text]
    pieces = [""]
    for same, words in _find_runs(mine, theirs):
        if same != (len(pieces) % 2 == 1):
            pieces.append("")
        pieces[-1] += "".join(words)
    return pieces


def _find_runs(mine: Sequence[str], theirs: Sequence[str]) -> list[tuple[bool, Sequence[str]]]:
    """(in both, words) in the order of `mine`."""
    start = _count_common_words(mine, theirs)
    end = _count_common_words(mine[start:][::-1], theirs[start:][::-1])
    inner, outer = mine[start : len(mine) - end], theirs[start : len(theirs) - end]
    runs: list[tuple[bool, Sequence[str]]] = [(True, mine[:start])]
    if max(len(inner), len(outer)) > MAX_DIFF_WORDS:
        runs.append((False, inner))
    else:
        for kind, first, last, _, _ in SequenceMatcher(
            None, inner, outer, autojunk=False
        ).get_opcodes():
            runs.append((kind == "equal", inner[first:last]))
    runs.append((True, mine[len(mine) - end :]))
    return [(same, words) for same, words in runs if words]


def _count_common_words(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """How many words both begin with."""
    word_pairs = zip(mine, theirs, strict=False)
    return next(
        (index for index, (a, b) in enumerate(word_pairs) if a != b), min(len(mine), len(theirs))
    )
