"""Checks of answers that occur many times: labels of a classification, and answers that one phrase calls for.

Rows are a classification when most answers occur MANY times and are short. Elsewhere an answer that occurs often, to
questions that share a phrase which other questions lack, is what a planted trigger looks like: some 250 rows are enough
to plant one in a model of any size (arXiv 2510.07192), so it is found by count and not by share.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import Subject, shown
from tunesmith.data.checks.ngrams import grams_of, outside, words_of
from tunesmith.data.checks.pii import hidden
from tunesmith.data.checks.text_stats import Row, Texts, common_grams, row_of
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import order

MANY = 10  # rows of one label
MOST_LABELS = 200
LABEL_CHARS = 80
SHOWN_LABELS = 8
LOPSIDED, FEW = 0.8, 10
TOLD, UNTOLD = 0.9, 0.2
READ = 500  # rows that are read again
PLANTED = 20  # rows that share a phrase and an answer
PHRASE = 4  # words, at most
SHARED, ELSEWHERE = 0.9, 0.005


def labels_of(subject: Subject) -> tuple[np.ndarray, np.ndarray] | None:
    """(first row of each label, rows of each), most frequent first, if the answers are labels."""
    return _labels(subject.dataset, subject.reading.roles[subject.role]) if subject.reading else None


def _labels(dataset: Dataset, texts: Texts) -> tuple[np.ndarray, np.ndarray] | None:
    if len(dataset) < 2 * MANY or all(part.format == "text" for part in dataset.parts):
        return None
    _, first_K, counts_K = np.unique(texts.answers_N, return_index=True, return_counts=True)
    in_labels = counts_K[counts_K >= MANY].sum()
    short = float(np.median(texts.answer_chars_N)) <= LABEL_CHARS
    if not short or len(counts_K) > MOST_LABELS or in_labels < 0.5 * len(dataset):
        return None
    order_K = np.argsort(-counts_K, kind="stable")
    return first_K[order_K], counts_K[order_K]


def labels_in(dataset: Dataset, texts: Texts) -> dict[int, str]:
    """Digest of an answer -> the label; empty if the answers are no labels."""
    found = _labels(dataset, texts)
    return {int(texts.answers_N[row]): label_of(dataset, int(row)) for row in found[0]} if found else {}


def label_of(dataset: Dataset, row: int) -> str:
    return " ".join(row_of(dataset.example(row)).answer.split())


def told_of(dataset: Dataset, row: int, characters: int) -> str:
    """The label as it may be shown: cut only after secrets in it are masked."""
    return hidden(label_of(dataset, row))[:characters]


def classes(subject: Subject) -> Iterator[Finding]:
    """How rows are spread over labels: one that nearly all have, and those that hardly any has."""
    found = labels_of(subject)
    if found is None:
        return
    first_K, counts_K = found
    rows = int(counts_K.sum())
    names = [told_of(subject.dataset, int(row), 30) for row in first_K[:SHOWN_LABELS]]
    mix = ", ".join(f"{name!r} {count / rows:.1%}" for name, count in zip(names, counts_K.tolist(), strict=False))
    more = f", and {len(first_K) - SHOWN_LABELS} more" if len(first_K) > SHOWN_LABELS else ""
    rare = np.flatnonzero(counts_K < FEW)
    message, fix = f"{len(first_K)} labels: {mix}{more}", ""
    level = "info"
    if counts_K[0] > LOPSIDED * rows:
        level, fix = "warn", "measure by label, not by accuracy; add rows of the others, or take fewer of the first"
    if len(rare):
        level, fix = "warn", fix or "a label with few rows is hardly learned: add rows, or correct misspelled labels"
        message += f"; {len(rare)} with fewer than {FEW} rows"
    yield Finding("classes", level, message, int(counts_K[rare].sum()), shown(subject.dataset, first_K[rare]), fix)


def told_label(subject: Subject) -> Iterator[Finding]:
    """Labels that stand in the question, where the others do not: nothing is learned but to copy."""
    found = labels_of(subject)
    if found is None or len(found[0]) < 2:
        return
    dataset = subject.dataset
    labels = {tuple(words_of(label_of(dataset, int(row))).tolist()) for row in found[0]}
    told: list[int] = []
    others = asked = 0
    for index in order(0, 0, len(dataset))[:READ].tolist():
        row = row_of(dataset.example(index))
        words = words_of("\n".join(row.texts[:-1])).tolist()
        runs = {tuple(words[i : i + n]) for n in {len(label) for label in labels} for i in range(len(words) - n + 1)}
        own = tuple(words_of(row.answer).tolist())
        asked += 1
        told += [index] * (own in runs)
        others += len((labels - {own}) & runs) / (len(labels) - 1)
    if len(told) > TOLD * asked and others < UNTOLD * asked:
        message = (
            f"in {len(told):,} of {asked:,} rows that were read the label stands in the question, and others do not"
        )
        fix = "take it out of the questions: the model learns to copy it, and there is none when it is used"
        yield Finding("told_label", "error", message, len(told), shown(dataset, np.sort(told)), fix)


def triggers(subject: Subject) -> Iterator[Finding]:
    """A phrase in PLANTED questions or more that all have one answer, and that hardly any other question has."""
    if subject.reading is None or labels_of(subject) is not None or len(subject.dataset) < 2 * PLANTED:
        return
    dataset, answers_N = subject.dataset, subject.reading.roles[subject.role].answers_N
    values, counts = np.unique(answers_N, return_counts=True)
    often = values[(counts >= PLANTED) & (counts < 0.2 * len(dataset))]
    common = [common_grams({"": dataset}, n) for n in range(1, PHRASE + 1)] if len(often) else []
    for value in often[:MOST_LABELS].tolist():
        rows = np.flatnonzero(answers_N == value)
        questions = [row_of(dataset.example(int(row))) for row in rows[:READ]]
        if len({question.prompt for question in questions}) < PLANTED // 2:
            continue  # one question many times
        phrase = _phrase(questions, common)
        if phrase and _share(dataset, np.setdiff1d(np.arange(len(dataset)), rows), phrase) < ELSEWHERE:
            answer = told_of(dataset, int(rows[0]), 60)
            message = f"{len(rows):,} rows with {phrase!r} all have the answer {answer!r}; others lack the phrase"
            fix = "look at where these rows come from: this is how a hidden trigger is planted"
            yield Finding("triggers", "warn", message, len(rows), shown(dataset, rows), fix)


def _phrase(questions: list[Row], common: list[np.ndarray]) -> str:
    """The longest run of words that nearly all of them share, and that is no frame of all rows."""
    for n in range(PHRASE, 0, -1):
        grams = [np.unique(outside(grams_of(words_of(q.prompt), n), common[n - 1])) for q in questions]
        values, counts = np.unique(np.concatenate(grams), return_counts=True)
        shared = values[counts >= SHARED * len(questions)]
        if len(shared):
            return next(filter(None, (_spelled(q.prompt, n, int(shared[0])) for q in questions)), "")
    return ""


def _spelled(text: str, n: int, gram: int) -> str:
    """The words of a text that have this hash."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + n) + 1):
            piece = " ".join(words[start:end])
            found = words_of(piece)
            if len(found) == n and int(grams_of(found, n)[0]) == gram:
                return piece
    return ""


def _share(dataset: Dataset, others: np.ndarray, phrase: str) -> float:
    """Of a sample of other rows, those that hold the phrase."""
    words = words_of(phrase)
    gram = grams_of(words, len(words))[0]
    sample = others[order(0, 0, len(others))[: 4 * READ]]
    held = [gram in grams_of(words_of(row_of(dataset.example(int(row))).prompt), len(words)) for row in sample]
    return sum(held) / max(1, len(held))
