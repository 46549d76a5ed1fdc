"""Checks of answers that occur many times: classification labels, and planted trigger phrases.

Rows are a classification if most answers are short and occur at least MIN_LABEL_ROWS times.
Elsewhere, a frequent answer to questions that share a phrase which other questions lack looks like
a planted trigger. Some 250 rows plant one in a model of any size (arXiv 2510.07192), so triggers
are found by count and not by share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import (
    CheckContext,
    Level,
    list_row_ids,
    make_row_finding,
)
from tunesmith.data.checks.ngrams import exclude_values, hash_ngrams, hash_words
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import (
    RoleTextStats,
    RowTexts,
    extract_row_texts,
    find_common_ngrams,
)
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import permute_rows

MIN_LABEL_ROWS = 10  # per label
MAX_LABELS = 200
MAX_LABEL_CHARS = 80  # median
SHOWN_LABELS = 8
MAX_MAJORITY_SHARE = 0.8
MIN_CLASS_ROWS = 10
# A label is copied if it is in this share of prompts, and other labels are in fewer than that.
MIN_COPIED_SHARE = 0.9
MAX_OTHER_SHARE = 0.2
SAMPLE_ROWS = 500  # read again
MIN_TRIGGER_ROWS = 20  # that share a phrase and an answer
MAX_TRIGGER_SHARE = 0.2  # more frequent answers are no trigger
MAX_PHRASE_WORDS = 4
MIN_PHRASE_SHARE = 0.9  # of the questions with the answer
MAX_OUTSIDE_SHARE = 0.005  # of the other questions


def find_labels(context: CheckContext) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (first row of each label, rows of each label), most frequent first, or None if the
    answers are not labels."""
    if context.text_stats is None:
        return None
    return _find_labels(context.dataset, context.text_stats.roles[context.role])


def _find_labels(dataset: Dataset, stats: RoleTextStats) -> tuple[np.ndarray, np.ndarray] | None:
    if len(dataset) < 2 * MIN_LABEL_ROWS or all(part.format == "text" for part in dataset.parts):
        return None
    _, first_K, counts_K = np.unique(stats.answer_digests_N, return_index=True, return_counts=True)
    num_labelled = counts_K[counts_K >= MIN_LABEL_ROWS].sum()
    is_short = float(np.median(stats.answer_chars_N)) <= MAX_LABEL_CHARS
    if not is_short or len(counts_K) > MAX_LABELS or num_labelled < 0.5 * len(dataset):
        return None
    order_K = np.argsort(-counts_K, kind="stable")
    return first_K[order_K], counts_K[order_K]


def build_label_map(dataset: Dataset, stats: RoleTextStats) -> dict[int, str]:
    """Map the digest of each answer to its label; empty if the answers are not labels."""
    labels = _find_labels(dataset, stats)
    if labels is None:
        return {}
    return {int(stats.answer_digests_N[row]): read_label(dataset, int(row)) for row in labels[0]}


def read_label(dataset: Dataset, row: int) -> str:
    return " ".join(extract_row_texts(dataset.read_example(row)).answer.split())


def read_masked_label(dataset: Dataset, row: int, max_chars: int) -> str:
    """Return the label as it may be shown. It is cut after masking, so that no part of a secret is
    left."""
    return mask_secrets(read_label(dataset, row))[:max_chars]


def check_classes(context: CheckContext) -> Iterator[Finding]:
    """Class balance: a majority label, and labels with few rows."""
    labels = find_labels(context)
    if labels is None:
        return
    first_K, counts_K = labels
    num_rows = int(counts_K.sum())
    shares: list[str] = []
    for row, count in zip(first_K[:SHOWN_LABELS].tolist(), counts_K.tolist(), strict=False):
        shares.append(f"{read_masked_label(context.dataset, row, 30)!r} {count / num_rows:.1%}")
    more = f", and {len(first_K) - SHOWN_LABELS} more" if len(first_K) > SHOWN_LABELS else ""
    message = f"{len(first_K)} labels: {', '.join(shares)}{more}"
    rare = np.flatnonzero(counts_K < MIN_CLASS_ROWS)
    level: Level = "info"
    fix = ""
    if len(rare):
        level = "warn"
        message += f"; {len(rare)} with fewer than {MIN_CLASS_ROWS} rows"
        fix = "add rows for rare labels, or correct misspelled ones"
    if counts_K[0] > MAX_MAJORITY_SHARE * num_rows:
        level = "warn"
        fix = "evaluate per label, not by accuracy; add rows for the others, or drop some"
    rare_ids = list_row_ids(context.dataset, first_K[rare])
    yield Finding("classes", level, message, int(counts_K[rare].sum()), rare_ids, fix)


def check_label_in_prompt(context: CheckContext) -> Iterator[Finding]:
    """Prompts that contain their label but no other, so that only copying is learned."""
    label_groups = find_labels(context)
    if label_groups is None or len(label_groups[0]) < 2:
        return
    dataset = context.dataset
    labels = {tuple(hash_words(read_label(dataset, int(row))).tolist()) for row in label_groups[0]}
    label_lengths = {len(label) for label in labels}
    copied_rows: list[int] = []
    other_share = 0.0
    sample = permute_rows(0, 0, len(dataset))[:SAMPLE_ROWS].tolist()
    for index in sample:
        row = extract_row_texts(dataset.read_example(index))
        words = hash_words("\n".join(row.texts[:-1])).tolist()
        ngrams: set[tuple[int, ...]] = set()
        for n in label_lengths:
            ngrams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        answer_label = tuple(hash_words(row.answer).tolist())
        if answer_label in ngrams:
            copied_rows.append(index)
        other_share += len((labels - {answer_label}) & ngrams) / (len(labels) - 1)
    is_copied = len(copied_rows) > MIN_COPIED_SHARE * len(sample)
    if is_copied and other_share < MAX_OTHER_SHARE * len(sample):
        message = (
            f"the prompt contains the label, and no other, in {len(copied_rows):,} of"
            f" {len(sample):,} sampled rows"
        )
        fix = "remove it from the prompts: the model learns to copy a label that it will not get"
        rows = np.sort(copied_rows)
        yield make_row_finding(context, "label_in_prompt", "error", message, rows, fix)


def check_trigger_phrases(context: CheckContext) -> Iterator[Finding]:
    """A phrase in at least MIN_TRIGGER_ROWS questions that all have one answer, and in hardly any
    other question."""
    dataset = context.dataset
    if context.text_stats is None or len(dataset) < 2 * MIN_TRIGGER_ROWS:
        return
    if find_labels(context) is not None:
        return
    answers_N = context.text_stats.roles[context.role].answer_digests_N
    values, counts = np.unique(answers_N, return_counts=True)
    is_frequent = (counts >= MIN_TRIGGER_ROWS) & (counts < MAX_TRIGGER_SHARE * len(dataset))
    frequent = values[is_frequent]
    if not len(frequent):
        return
    # common_ngrams[n - 1]: the n-grams of most rows
    common_ngrams = [find_common_ngrams({"": dataset}, n) for n in range(1, MAX_PHRASE_WORDS + 1)]
    for value in frequent[:MAX_LABELS].tolist():
        rows = np.flatnonzero(answers_N == value)
        sample = rows[:SAMPLE_ROWS].tolist()
        questions = [extract_row_texts(dataset.read_example(row)) for row in sample]
        if len({question.prompt for question in questions}) < MIN_TRIGGER_ROWS // 2:
            continue  # one question many times
        phrase = _find_phrase(questions, common_ngrams)
        if not phrase:
            continue
        other_rows = np.setdiff1d(np.arange(len(dataset)), rows)
        if _measure_phrase_share(dataset, other_rows, phrase) < MAX_OUTSIDE_SHARE:
            answer = read_masked_label(dataset, int(rows[0]), 60)
            message = f"{len(rows):,} rows with {phrase!r} all have the answer {answer!r}"
            fix = "check where these rows come from: this is how a hidden trigger is planted"
            yield make_row_finding(context, "trigger_phrases", "warn", message, rows, fix)


def _find_phrase(questions: list[RowTexts], common_ngrams: list[np.ndarray]) -> str:
    """Return the longest n-gram that nearly all questions share and most rows do not, or ""."""
    for n in range(MAX_PHRASE_WORDS, 0, -1):
        question_grams: list[np.ndarray] = []
        for question in questions:
            grams = hash_ngrams(hash_words(question.prompt), n)
            question_grams.append(np.unique(exclude_values(grams, common_ngrams[n - 1])))
        values, counts = np.unique(np.concatenate(question_grams), return_counts=True)
        shared = values[counts >= MIN_PHRASE_SHARE * len(questions)]
        if len(shared):
            for question in questions:
                if spelling := _find_spelling(question.prompt, n, int(shared[0])):
                    return spelling
            return ""
    return ""


def _find_spelling(text: str, n: int, gram: int) -> str:
    """Return the words of a text that have this n-gram hash, or ""."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + n) + 1):
            piece = " ".join(words[start:end])
            piece_words = hash_words(piece)
            if len(piece_words) == n and int(hash_ngrams(piece_words, n)[0]) == gram:
                return piece
    return ""


def _measure_phrase_share(dataset: Dataset, rows: np.ndarray, phrase: str) -> float:
    """Return the share of rows with the phrase in the question, in a sample."""
    words = hash_words(phrase)
    gram = hash_ngrams(words, len(words))[0]
    sample = rows[permute_rows(0, 0, len(rows))[: 4 * SAMPLE_ROWS]]
    num_hits = 0
    for row in sample.tolist():
        prompt = extract_row_texts(dataset.read_example(row)).prompt
        num_hits += int(gram in hash_ngrams(hash_words(prompt), len(words)))
    return num_hits / max(1, len(sample))
