"""Check of answers that are classification labels.

Rows are a classification if most answers are short and occur at least MIN_LABEL_ROWS times."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import (
    CheckContext,
    Level,
    list_row_ids,
)
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import (
    RoleTextStats,
    extract_row_texts,
)
from tunesmith.data.dataset import Dataset

MIN_LABEL_ROWS = 10  # per label
MAX_LABELS = 200
MAX_LABEL_CHARS = 80  # median
SHOWN_LABELS = 8
MAX_MAJORITY_SHARE = 0.8
MIN_CLASS_ROWS = 10


def _find_labels(dataset: Dataset, stats: RoleTextStats) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (first row of each label, rows of each label), most frequent first, or None if the
    answers are not labels."""
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
    if context.text_stats is None:
        return
    labels = _find_labels(context.dataset, context.text_stats.roles[context.role])
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
