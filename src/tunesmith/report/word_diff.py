"""Two texts word by word: what of one is not in the other.

    marked("a b c", "a c") -> ["a ", "b ", "c"]        every second piece, from the second on, is marked

The pieces together are the text. Long texts are compared by what they begin and end with alike, since difflib takes
quadratic time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

WORDS = re.compile(r"\w+|\s+|[^\w\s]")
LONGEST = 600  # words that are compared one by one


def marked(text: str, other: str) -> list[str]:
    """Pieces of `text`, in turn as in `other` and not as in it."""
    mine, theirs = WORDS.findall(text), WORDS.findall(other)
    if mine == theirs:
        return [text]
    pieces = [""]
    for same, words in _runs(mine, theirs):
        if same != (len(pieces) % 2 == 1):
            pieces.append("")
        pieces[-1] += "".join(words)
    return pieces


def _runs(mine: Sequence[str], theirs: Sequence[str]) -> list[tuple[bool, Sequence[str]]]:
    """(in both, words) in the order of `mine`."""
    start = _alike(mine, theirs)
    end = _alike(mine[start:][::-1], theirs[start:][::-1])
    inner, outer = mine[start : len(mine) - end], theirs[start : len(theirs) - end]
    runs: list[tuple[bool, Sequence[str]]] = [(True, mine[:start])]
    if max(len(inner), len(outer)) > LONGEST:
        runs.append((False, inner))
    else:
        for kind, first, last, _, _ in SequenceMatcher(None, inner, outer, autojunk=False).get_opcodes():
            runs.append((kind == "equal", inner[first:last]))
    runs.append((True, mine[len(mine) - end :]))
    return [(same, words) for same, words in runs if words]


def _alike(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """How many words both begin with."""
    places = zip(mine, theirs, strict=False)
    return next((place for place, (a, b) in enumerate(places) if a != b), min(len(mine), len(theirs)))
