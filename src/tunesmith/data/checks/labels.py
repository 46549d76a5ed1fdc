"""Checks of answers that occur many times: labels of a classification, and answers that one phrase
calls for.

Rows are a classification when most answers occur MANY times and are short. Elsewhere an answer that
occurs often, to questions that share a phrase which other questions lack, is what a planted trigger
looks like: some 250 rows are enough to plant one in a model of any size (arXiv 2510.07192), so it
is found by count and not by share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import CheckContext, list_row_ids
from tunesmith.data.checks.ngrams import exclude_values, hash_ngrams, hash_words
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import (
    RoleTextStats,
    RowTexts,
    extract_row_texts,
    find_common_ngrams,
)
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permutation

MIN_LABEL_ROWS = 10  # rows of one label
MAX_LABELS = 200
MAX_LABEL_CHARS = 80
SHOWN_LABELS = 8
MAX_MAJORITY_SHARE, MIN_CLASS_ROWS = 0.8, 10
MIN_COPIED_SHARE, MAX_OTHER_SHARE = 0.9, 0.2
SAMPLE_ROWS = 500  # rows that are read again
MIN_TRIGGER_ROWS = 20  # rows that share a phrase and an answer
MAX_PHRASE_WORDS = 4  # words, at most
MIN_PHRASE_SHARE, MAX_OUTSIDE_SHARE = 0.9, 0.005


def find_labels(context: CheckContext) -> tuple[np.ndarray, np.ndarray] | None:
    """(first row of each label, rows of each), most frequent first, if the answers are labels."""
    return (
        _find_labels(context.dataset, context.text_stats.roles[context.role])
        if context.text_stats
        else None
    )


def _find_labels(dataset: Dataset, stats: RoleTextStats) -> tuple[np.ndarray, np.ndarray] | None:
    if len(dataset) < 2 * MIN_LABEL_ROWS or all(part.format == "text" for part in dataset.parts):
        return None
    _, first_K, counts_K = np.unique(stats.answer_digests_N, return_index=True, return_counts=True)
    labelled_rows = counts_K[counts_K >= MIN_LABEL_ROWS].sum()
    is_short = float(np.median(stats.answer_chars_N)) <= MAX_LABEL_CHARS
    if not is_short or len(counts_K) > MAX_LABELS or labelled_rows < 0.5 * len(dataset):
        return None
    order_K = np.argsort(-counts_K, kind="stable")
    return first_K[order_K], counts_K[order_K]


def build_label_map(dataset: Dataset, stats: RoleTextStats) -> dict[int, str]:
    """Digest of an answer -> the label; empty if the answers are no labels."""
    labels = _find_labels(dataset, stats)
    return (
        {int(stats.answer_digests_N[row]): read_label(dataset, int(row)) for row in labels[0]}
        if labels
        else {}
    )


def read_label(dataset: Dataset, row: int) -> str:
    return " ".join(extract_row_texts(dataset.read_example(row)).answer.split())


def read_masked_label(dataset: Dataset, row: int, max_chars: int) -> str:
    """The label as it may be shown: cut only after secrets in it are masked."""
    return mask_secrets(read_label(dataset, row))[:max_chars]


def check_classes(context: CheckContext) -> Iterator[Finding]:
    """How rows are spread over labels: one that nearly all have, and those that hardly any has."""
    labels = find_labels(context)
    if labels is None:
        return
    first_K, counts_K = labels
    rows = int(counts_K.sum())
    names = [read_masked_label(context.dataset, int(row), 30) for row in first_K[:SHOWN_LABELS]]
    mix = ", ".join(
        f"{name!r} {count / rows:.1%}"
        for name, count in zip(names, counts_K.tolist(), strict=False)
    )
    more = f", and {len(first_K) - SHOWN_LABELS} more" if len(first_K) > SHOWN_LABELS else ""
    rare = np.flatnonzero(counts_K < MIN_CLASS_ROWS)
    message, fix = f"{len(first_K)} labels: {mix}{more}", ""
    level = "info"
    if counts_K[0] > MAX_MAJORITY_SHARE * rows:
        level, fix = (
            "warn",
            "measure by label, not by accuracy; add rows of the others, or take fewer of the first",
        )
    if len(rare):
        level, fix = (
            "warn",
            fix
            or "a label with few rows is hardly learned: add rows, or correct misspelled labels",
        )
        message += f"; {len(rare)} with fewer than {MIN_CLASS_ROWS} rows"
    yield Finding(
        "classes",
        level,
        message,
        int(counts_K[rare].sum()),
        list_row_ids(context.dataset, first_K[rare]),
        fix,
    )


def check_label_in_prompt(context: CheckContext) -> Iterator[Finding]:
    """Labels that stand in the question, where the others do not: nothing is learned but to
    copy."""
    label_groups = find_labels(context)
    if label_groups is None or len(label_groups[0]) < 2:
        return
    dataset = context.dataset
    labels = {tuple(hash_words(read_label(dataset, int(row))).tolist()) for row in label_groups[0]}
    copied_rows: list[int] = []
    other_share = num_rows = 0
    for index in permutation(0, 0, len(dataset))[:SAMPLE_ROWS].tolist():
        row = extract_row_texts(dataset.read_example(index))
        words = hash_words("\n".join(row.texts[:-1])).tolist()
        runs = {
            tuple(words[i : i + n])
            for n in {len(label) for label in labels}
            for i in range(len(words) - n + 1)
        }
        answer_label = tuple(hash_words(row.answer).tolist())
        num_rows += 1
        copied_rows += [index] * (answer_label in runs)
        other_share += len((labels - {answer_label}) & runs) / (len(labels) - 1)
    if len(copied_rows) > MIN_COPIED_SHARE * num_rows and other_share < MAX_OTHER_SHARE * num_rows:
        message = f"in {len(copied_rows):,} of {num_rows:,} rows that were read the label stands in the question, and others do not"
        fix = "take it out of the questions: the model learns to copy it, and there is none when it is used"
        yield Finding(
            "told_label",
            "error",
            message,
            len(copied_rows),
            list_row_ids(dataset, np.sort(copied_rows)),
            fix,
        )


def check_trigger_phrases(context: CheckContext) -> Iterator[Finding]:
    """A phrase in PLANTED questions or more that all have one answer, and that hardly any other
    question has."""
    if (
        context.text_stats is None
        or find_labels(context) is not None
        or len(context.dataset) < 2 * MIN_TRIGGER_ROWS
    ):
        return
    dataset, answers_N = context.dataset, context.text_stats.roles[context.role].answer_digests_N
    values, counts = np.unique(answers_N, return_counts=True)
    frequent = values[(counts >= MIN_TRIGGER_ROWS) & (counts < 0.2 * len(dataset))]
    common = (
        [find_common_ngrams({"": dataset}, n) for n in range(1, MAX_PHRASE_WORDS + 1)]
        if len(frequent)
        else []
    )
    for value in frequent[:MAX_LABELS].tolist():
        rows = np.flatnonzero(answers_N == value)
        questions = [
            extract_row_texts(dataset.read_example(int(row))) for row in rows[:SAMPLE_ROWS]
        ]
        if len({question.prompt for question in questions}) < MIN_TRIGGER_ROWS // 2:
            continue  # one question many times
        phrase = _find_phrase(questions, common)
        if (
            phrase
            and _measure_phrase_share(dataset, np.setdiff1d(np.arange(len(dataset)), rows), phrase)
            < MAX_OUTSIDE_SHARE
        ):
            answer = read_masked_label(dataset, int(rows[0]), 60)
            message = f"{len(rows):,} rows with {phrase!r} all have the answer {answer!r}; others lack the phrase"
            fix = "look at where these rows come from: this is how a hidden trigger is planted"
            yield Finding("triggers", "warn", message, len(rows), list_row_ids(dataset, rows), fix)


def _find_phrase(questions: list[RowTexts], common: list[np.ndarray]) -> str:
    """The longest run of words that nearly all of them share, and that is no frame of all rows."""
    for n in range(MAX_PHRASE_WORDS, 0, -1):
        grams = [
            np.unique(exclude_values(hash_ngrams(hash_words(question.prompt), n), common[n - 1]))
            for question in questions
        ]
        values, counts = np.unique(np.concatenate(grams), return_counts=True)
        shared = values[counts >= MIN_PHRASE_SHARE * len(questions)]
        if len(shared):
            return next(
                filter(
                    None,
                    (_find_spelling(question.prompt, n, int(shared[0])) for question in questions),
                ),
                "",
            )
    return ""


def _find_spelling(text: str, n: int, gram: int) -> str:
    """The words of a text that have this hash."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + n) + 1):
            piece = " ".join(words[start:end])
            piece_words = hash_words(piece)
            if len(piece_words) == n and int(hash_ngrams(piece_words, n)[0]) == gram:
                return piece
    return ""


def _measure_phrase_share(dataset: Dataset, others: np.ndarray, phrase: str) -> float:
    """Of a sample of other rows, those that hold the phrase."""
    words = hash_words(phrase)
    gram = hash_ngrams(words, len(words))[0]
    sample = others[permutation(0, 0, len(others))[: 4 * SAMPLE_ROWS]]
    hits = [
        gram
        in hash_ngrams(
            hash_words(extract_row_texts(dataset.read_example(int(row))).prompt), len(words)
        )
        for row in sample
    ]
    return sum(hits) / max(1, len(hits))
