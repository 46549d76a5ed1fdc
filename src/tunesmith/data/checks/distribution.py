"""Checks of how answers are spread: lengths, languages, forms, classes, and phrases that call for one answer.

All of them look at the numbers that the reading kept of every row; where words are needed a few rows are read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks import language_id as language_of
from tunesmith.data.checks.context import Subject, answer_of, by_share, shown
from tunesmith.data.checks.duplicates import INSTALL
from tunesmith.data.checks.text_stats import BROKEN_JSON, GOOD_JSON, NO_JSON, Texts, opening_of

MOSTLY_JSON = 0.8  # of the answers
MANY = 10
CUT_CHARS = 200
FAR, LEAST_SPREAD = 6, 0.35  # of the logarithm of a length: deviations, and the least that one is
SHORT_SIDE = 20  # pairs from which a share says something
ONE_SIDED = 0.8
ONE_OPENING = 0.5
RARE_LANGUAGE = 0.05


def _texts(subject: Subject) -> Texts | None:
    return subject.reading.roles[subject.role] if subject.reading else None


def broken_json(subject: Subject) -> Iterator[Finding]:
    """Answers that are no JSON where nearly all are. With a schema `answers` says it."""
    texts = _texts(subject)
    if texts is None or subject.validator is not None:
        return
    json_N = texts.json_N
    rows = np.flatnonzero(json_N != GOOD_JSON)
    if len(rows) and (json_N == GOOD_JSON).mean() >= MOSTLY_JSON:
        broken = int((json_N == BROKEN_JSON).sum())
        message = (
            f"{len(rows):,} of {len(json_N):,} answers are not JSON, {broken:,} of them begin like it; the others are"
        )
        fix = "correct them; a `schema:` in the recipe checks the others too"
        yield Finding("broken_json", "warn", message, len(rows), shown(subject.dataset, rows), fix)


def cut_off(subject: Subject) -> Iterator[Finding]:
    """Many answers of exactly the greatest length: something cut them."""
    texts = _texts(subject)
    if texts is None or not len(texts.answer_chars_N):
        return
    longest = int(texts.answer_chars_N.max())
    rows = np.flatnonzero(texts.answer_chars_N == longest)
    different = len(np.unique(texts.answers_N[rows]))
    if longest >= CUT_CHARS and different >= max(MANY, len(texts.answer_chars_N) // 200):
        message = f"{len(rows):,} different answers have {longest:,} characters, and none has more: they were cut there"
        fix = "make them again with more room"
        yield Finding("cut_off", "warn", message, len(rows), shown(subject.dataset, rows), fix)


def outliers(subject: Subject) -> Iterator[Finding]:
    """Prompts and answers far longer or shorter than the others."""
    texts = _texts(subject)
    for what, chars_N in (("answer", texts.answer_chars_N), ("prompt", texts.prompt_chars_N)) if texts else ():
        if len(chars_N) < MANY:
            continue
        logs_N = np.log(np.maximum(1, chars_N))
        middle = float(np.median(logs_N))
        spread = max(LEAST_SPREAD, 1.4826 * float(np.median(np.abs(logs_N - middle))))
        far_N = (logs_N - middle) / spread
        for side, rows in (("longer", np.flatnonzero(far_N > FAR)), ("shorter", np.flatnonzero(far_N < -FAR))):
            if len(rows):
                most = int(chars_N[rows].max() if side == "longer" else chars_N[rows].min())
                message = (
                    f"{len(rows):,} of {len(chars_N):,} rows have a far {side} {what} than the others: "
                    f"{most:,} characters where the median is {int(np.median(chars_N)):,}"
                )
                fix = "look at them: pasted files, logs and empty shells are worth dropping"
                yield Finding(
                    "outliers", by_share(len(rows), len(chars_N)), message, len(rows), shown(subject.dataset, rows), fix
                )


def languages(subject: Subject) -> Iterator[Finding]:
    """Languages of the answers, and the rows in a rare one."""
    texts = _texts(subject)
    if texts is None:
        return
    if texts.languages_N is None:
        if not subject.earlier:
            message = "languages are not told apart: py3langid is not installed"
            yield Finding("languages", "info", message, fix=INSTALL)
        return
    known = texts.languages_N[texts.languages_N >= 0]
    counts = Counter(known.tolist()).most_common()
    if len(counts) < 2:
        return
    names = language_of.names()
    mix = ", ".join(f"{names[number]} {count / len(known):.1%}" for number, count in counts[:6])
    rare = [number for number, count in counts if count < RARE_LANGUAGE * len(known)]
    rows = np.flatnonzero(np.isin(texts.languages_N, rare))
    asked = "" if texts.told_N.all() else f" of {texts.told_N.sum():,} rows, a sample,"
    message = f"of {len(known):,} answers{asked} with enough text: {mix}"
    if len(rows):
        message += f"; {len(rows):,} rows are in a rare language"
    fix = "if one language is meant, look at the rows in the others" if len(rows) else ""
    level = "warn" if len(rows) > 0.01 * len(known) else "info"
    yield Finding("languages", level, message, len(rows), shown(subject.dataset, rows), fix)


def openings(subject: Subject) -> Iterator[Finding]:
    """Answers that mostly begin with the same words; JSON and labels do, and are left out."""
    texts = _texts(subject)
    if texts is None:
        return
    rows = np.flatnonzero((texts.json_N == NO_JSON) & (texts.answer_chars_N > 40))
    if len(rows) < max(SHORT_SIDE, len(texts.json_N) // 2):
        return
    values, counts = np.unique(texts.openings_N[rows], return_counts=True)
    most = int(counts.argmax())
    if counts[most] >= ONE_OPENING * len(rows):
        same = rows[texts.openings_N[rows] == values[most]]
        words = opening_of(answer_of(subject.dataset.example(int(same[0]))))
        message = f"{len(same):,} of {len(rows):,} answers begin with {words!r}"
        fix = "if that is no wanted form, reword some: the model will begin so whatever is asked"
        yield Finding("openings", "warn", message, len(same), shown(subject.dataset, same), fix)


def longer_side(subject: Subject) -> Iterator[Finding]:
    """Pairs in which mostly the longer answer is preferred: length is then what is learned."""
    texts = _texts(subject)
    if texts is None or not subject.dataset.pairs or len(subject.dataset) < SHORT_SIDE:
        return
    for side, wins in (
        ("longer", texts.answer_chars_N > texts.other_chars_N),
        ("shorter", texts.answer_chars_N < texts.other_chars_N),
    ):
        if wins.mean() > ONE_SIDED:
            of = f"in {wins.mean():.0%} of {len(wins):,} pairs"
            message = f"{of} the {side} answer is preferred: length alone tells them apart"
            fix = "add pairs in which it is the other way round"
            yield Finding(
                "longer_side", "warn", message, int(wins.sum()), shown(subject.dataset, np.flatnonzero(wins)), fix
            )
