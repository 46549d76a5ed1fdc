"""What is wrong with an answer, seen from the answer alone: loops, sameness, foreign letters, broken form.

In: the tokens or the text of answers. Out: a number an answer. Pure; no model, no judge. Left out: how much is too much
(train/guard.py), whether the answer is right (evaluate/tasks.py).
"""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

LOOP = 4  # tokens: seq-rep-4
LEAST_BYTES = 40  # of a shorter text the compressor's own header is most of what comes out


def repetition(tokens: Sequence[int], n: int = LOOP) -> float:
    """seq-rep-n (Welleck 2019): the share of an answer's n-grams that stood in it before. 0 for a shorter answer."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> tuple[list[int], list[int]]:
    """Of each answer: n-grams that no answer before it has, and all of its n-grams. Their sums' quotient is distinct-n
    (Li 2016)."""
    seen: set[tuple[int, ...]] = set()
    new: list[int] = []
    every: list[int] = []
    for answer in answers:
        grams = ngrams(answer, n)
        new.append(len(set(grams) - seen))
        every.append(len(grams))
        seen.update(grams)
    return new, every


def same(answers: Sequence[str]) -> list[float]:
    """1 for an answer that is the most common one and not the only one of its kind."""
    common, count = Counter(answer.strip() for answer in answers).most_common(1)[0]
    return [float(count > 1 and answer.strip() == common) for answer in answers]


def compressed(text: str) -> float:
    """zlib's bytes for each byte of the text; below 0.25 it is a loop (rules.md 6.1). 1 for a text too short to say."""
    raw = text.encode()
    return min(1.0, len(zlib.compress(raw, 9)) / len(raw)) if len(raw) >= LEAST_BYTES else 1.0


def scripts(texts: Iterable[str]) -> set[str]:
    """The scripts of the letters: LATIN, CYRILLIC, CJK, ..."""
    letters = {letter for text in texts for letter in text if letter.isalpha()}
    return {unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters}


def foreign(text: str, known: set[str]) -> float:
    """The share of letters of other scripts, and of signs that stand for bytes which are no text, among both."""
    letters = [sign for sign in text if sign.isalpha() or sign == "\ufffd"]
    alien = sum(sign == "\ufffd" or unicodedata.name(sign, "UNKNOWN").split()[0] not in known for sign in letters)
    return alien / len(letters) if letters else 0.0


def is_json(text: str, *, cut: bool) -> bool:
    """`cut`: the answer had no room to end, and it is enough that it begins like JSON."""
    said = text.strip()
    try:
        json.loads(said)
    except json.JSONDecodeError as error:
        return cut and bool(said) and (error.pos >= len(said) - 1 or error.msg.startswith("Unterminated"))
    except RecursionError:
        return False
    return True
