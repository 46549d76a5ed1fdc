"""Checks of answers that are labels, and of fields of JSON answers.

Rows are a classification if most answers are short and occur at least MIN_LABEL_ROWS times. Where
one value of a field is so frequent that a constant would score well, training rewards it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.answer_values import ANSWER, LOPSIDED_SHARE, ValueCounts, split_fields
from tunesmith.data.checks.context import (
    MAX_NAMED_ROWS,
    CheckContext,
    Level,
    get_answer,
    list_row_ids,
    make_row_finding,
)
from tunesmith.data.checks.ngrams import hash_words
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import (
    RoleTextStats,
    extract_row_texts,
)
from tunesmith.data.dataset import Dataset
from tunesmith.data.rehearsal import REHEARSAL_ROLE
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


MAX_ROWS = 20_000  # that are read, drawn at random
MIN_OBJECTS = 20  # answers that are JSON objects
MIN_OBJECT_SHARE = 0.5
MAX_FINDINGS = 5  # fields that are named
FIX = (
    "add rows with other values or drop some with this one; read errors by expected value, "
    "not the average alone"
)


def check_lopsided_fields(context: CheckContext) -> Iterator[Finding]:
    """Fields where one value has more than LOPSIDED_SHARE of the rows, and not all."""
    if context.text_stats is None or context.role == REHEARSAL_ROLE:
        return
    rows = np.sort(permute_rows(0, 0, len(context.dataset))[:MAX_ROWS])
    counts = ValueCounts()
    for row in rows.tolist():
        counts.add_answer(get_answer(context.dataset.read_example(row)))
    if counts.num_objects < max(MIN_OBJECTS, MIN_OBJECT_SHARE * counts.num_answers):
        return
    lopsided = _find_lopsided(counts)
    for share, name, value in lopsided[:MAX_FINDINGS]:
        others = [row for row in rows.tolist() if _has_other_value(context, row, name, value)]
        total = counts.count_rows(name)
        message = (
            f"{name} is {value} in {share:.1%} of the rows ({total - len(others):,} of {total:,}): "
            "a constant would score well"
        )
        ids = tuple(context.dataset.get_id(row) for row in others[:MAX_NAMED_ROWS])
        yield Finding("lopsided", "warn", message, len(others), ids, FIX)
    if len(lopsided) > MAX_FINDINGS:
        more = len(lopsided) - MAX_FINDINGS
        fields = "field has" if more == 1 else "fields have"
        message = f"{more} more {fields} one value in over {LOPSIDED_SHARE:.0%} of the rows"
        yield Finding("lopsided", "warn", message, more, (), FIX)


def _find_lopsided(counts: ValueCounts) -> list[tuple[float, str, str]]:
    """Return (share, field, value), the most lopsided first; fields of few rows are left out."""
    lopsided: list[tuple[float, str, str]] = []
    for name, values in counts.counts.items():
        total = counts.count_rows(name)
        if name == ANSWER or total < max(MIN_OBJECTS, MIN_OBJECT_SHARE * counts.num_objects):
            continue
        value = max(values, key=values.__getitem__)
        share = values[value] / total
        if LOPSIDED_SHARE < share < 1:
            lopsided.append((share, name, value))
    return sorted(lopsided, key=lambda entry: (-entry[0], entry[1]))


def _has_other_value(context: CheckContext, row: int, name: str, value: str) -> bool:
    fields = split_fields(get_answer(context.dataset.read_example(row))) or {}
    return name in fields and fields[name] != value


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
