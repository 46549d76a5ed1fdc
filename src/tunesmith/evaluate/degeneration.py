"""What is wrong with an answer, seen from the answer alone: loops, sameness, foreign letters,
broken form.

In: the tokens or the text of answers. Out: a number an answer. Pure; no model, no judge. Left out:
how much is too much (train/guard.py), whether the answer is right (evaluate/tasks.py)."""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

LOOP_NGRAM = 4  # tokens: seq-rep-4
MIN_BYTES = 40  # of a shorter text the compressor's own header is most of what comes out


def compute_repetition(tokens: Sequence[int], n: int = LOOP_NGRAM) -> float:
    """seq-rep-n (Welleck 2019): the share of an answer's n-grams that stood in it before. 0 for a
    shorter answer."""
    grams = extract_ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def extract_ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def count_distinct_ngrams(
    answers: Sequence[Sequence[int]], n: int = 2
) -> tuple[list[int], list[int]]:
    """Of each answer: n-grams that no answer before it has, and all of its n-grams. Their sums'
    quotient is distinct-n (Li 2016)."""
    previous: set[tuple[int, ...]] = set()
    new: list[int] = []
    totals: list[int] = []
    for answer in answers:
        grams = extract_ngrams(answer, n)
        new.append(len(set(grams) - previous))
        totals.append(len(grams))
        previous.update(grams)
    return new, totals


def flag_identical_answers(answers: Sequence[str]) -> list[float]:
    """1 for an answer that is the most common one and not the only one of its kind."""
    common, count = Counter(answer.strip() for answer in answers).most_common(1)[0]
    return [float(count > 1 and answer.strip() == common) for answer in answers]


def compute_compression_ratio(text: str) -> float:
    """zlib's bytes for each byte of the text; below 0.25 it is a loop (rules.md 6.1). 1 for a text
    too short to say."""
    raw = text.encode()
    return min(1.0, len(zlib.compress(raw, 9)) / len(raw)) if len(raw) >= MIN_BYTES else 1.0


def find_scripts(texts: Iterable[str]) -> set[str]:
    """The scripts of the letters: LATIN, CYRILLIC, CJK, ..."""
    letters = {letter for text in texts for letter in text if letter.isalpha()}
    return {unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters}


def compute_foreign_share(text: str, allowed_scripts: set[str]) -> float:
    """The share of letters of other scripts, and of signs that stand for bytes which are no text,
    among both."""
    characters = [character for character in text if character.isalpha() or character == "\ufffd"]
    alien = sum(
        character == "\ufffd"
        or unicodedata.name(character, "UNKNOWN").split()[0] not in allowed_scripts
        for character in characters
    )
    return alien / len(characters) if characters else 0.0


def is_json(text: str, *, is_truncated: bool) -> bool:
    """`cut`: the answer had no room to end, and it is enough that it begins like JSON."""
    stripped = text.strip()
    try:
        json.loads(stripped)
    except json.JSONDecodeError as error:
        return (
            is_truncated
            and bool(stripped)
            and (error.pos >= len(stripped) - 1 or error.msg.startswith("Unterminated"))
        )
    except RecursionError:
        return False
    return True
