"""Checks for rows with the same content: within a role, or in held-out and training data.

Exact duplicates are found by the digests of all rows (`hashing.py`), near duplicates and copied
passages from their texts (`minhash.py`, `ngram_overlap.py`). What most rows share, such as an
instruction, makes no two rows duplicates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import (
    WARN_SHARE,
    CheckContext,
    choose_level,
    describe_rows,
    make_row_finding,
)
from tunesmith.data.checks.minhash import MIN_JACCARD, SHINGLE_WORDS
from tunesmith.data.checks.ngrams import MIN_COPY_SHARE, NGRAM_WORDS
from tunesmith.data.checks.text_stats import MAX_NAMED_ROWS
from tunesmith.data.dataset import Dataset

INSTALL_HINT = "pip install '.[audit]' in tunesmith's folder"


def check_duplicates(context: CheckContext) -> Iterator[Finding]:
    """Rows equal to an earlier row of the role, white space aside. Checks all rows."""
    contents_N = context.dataset.contents_N
    order_N = np.argsort(contents_N, kind="stable")
    is_repeat_N = contents_N[order_N[1:]] == contents_N[order_N[:-1]]
    rows = np.sort(order_N[1:][is_repeat_N])
    if len(rows):
        level = "warn" if len(rows) > WARN_SHARE * len(contents_N) else "info"
        message = describe_rows(len(rows), len(contents_N), "repeat an earlier row")
        fix = "keep one of each, unless repeats are intended"
        yield make_row_finding(context, "duplicates", level, message, rows, fix)


def check_conflicts(context: CheckContext) -> Iterator[Finding]:
    """Prompts with several answers, case and closing punctuation aside. Checks all rows; several
    pairs with one prompt are no conflict."""
    dataset = context.dataset
    if context.text_stats is None or dataset.has_pairs or dataset.has_labels:
        return
    _, first_K, prompt_N = np.unique(dataset.prompts_N, return_index=True, return_inverse=True)
    is_different_N = dataset.contents_N != dataset.contents_N[first_K][prompt_N]
    is_disputed_K = np.zeros(len(first_K), dtype=bool)
    is_disputed_K[prompt_N[is_different_N]] = True
    rows = np.flatnonzero(is_disputed_K[prompt_N])
    if len(rows):
        counts = describe_rows(len(rows), len(dataset), "have a prompt with several answers")
        message = f"{counts}; such prompts: {is_disputed_K.sum():,}"
        fix = "keep the right answer; if all are right, the model learns to give any of them"
        rows = rows[np.argsort(prompt_N[rows], kind="stable")]
        level = choose_level(len(rows), len(dataset))
        yield make_row_finding(context, "conflicts", level, message, rows, fix)


def check_leakage(context: CheckContext) -> Iterator[Finding]:
    """Held-out rows that are in an earlier role: a score on them shows memory, not skill. Checks
    all rows."""
    dataset = context.dataset
    for role, other in context.earlier.items():
        is_equal_N = np.isin(dataset.contents_N, other.contents_N)
        is_same_prompt_N = np.isin(dataset.prompts_N, other.prompts_N) & ~is_equal_N
        rows = np.flatnonzero(is_equal_N)
        if len(rows):
            message = describe_rows(len(rows), len(dataset), f"are also in {role}")
            fix = "remove them from one of the two"
            yield make_row_finding(context, "leaks", "error", message, rows, fix)
        rows = np.flatnonzero(is_same_prompt_N)
        if len(rows):
            predicate = f"have a prompt that is also in {role}, with another answer"
            message = describe_rows(len(rows), len(dataset), predicate)
            yield make_row_finding(context, "leaks", "warn", message, rows)


def check_near_duplicates(context: CheckContext) -> Iterator[Finding]:
    """Rows nearly equal to an earlier row of the role."""
    if context.text_stats is None:
        return
    if context.text_stats.near_duplicates is None:
        if not context.earlier:
            message = "near duplicates are not checked: datasketch is not installed"
            yield Finding("near_duplicates", "info", message, fix=INSTALL_HINT)
        return
    dataset = context.dataset
    matches = context.text_stats.near_duplicates.iter_matches(context.role)
    pairs = [(row, first) for row, role, first in matches if role == context.role]
    if pairs:
        counts = describe_rows(len(pairs), len(dataset), "repeat an earlier row almost exactly")
        message = f"{counts} (Jaccard >= {MIN_JACCARD}, {SHINGLE_WORDS}-word shingles)"
        fix = "keep the best of each group; `tunesmith data split` keeps groups together"
        level = choose_level(len(pairs), len(dataset))
        named_pairs = _name_pairs(dataset, dataset, pairs)
        yield Finding("near_duplicates", level, message, len(pairs), named_pairs, fix)


def check_near_leakage(context: CheckContext) -> Iterator[Finding]:
    """Held-out rows nearly equal to a row of an earlier role."""
    if context.text_stats is None or context.text_stats.near_duplicates is None:
        return
    dataset = context.dataset
    matches = list(context.text_stats.near_duplicates.iter_matches(context.role))
    for role, other in context.earlier.items():
        pairs = [(row, first) for row, match_role, first in matches if match_role == role]
        if pairs:
            predicate = f"repeat a row of {role} almost exactly"
            message = describe_rows(len(pairs), len(dataset), predicate)
            fix = f"remove them from {role}; `tunesmith data split` keeps such rows together"
            named_pairs = _name_pairs(dataset, other, pairs)
            yield Finding("near_leaks", "error", message, len(pairs), named_pairs, fix)


def _name_pairs(dataset: Dataset, other: Dataset, pairs: list[tuple[int, int]]) -> tuple[str, ...]:
    shown = pairs[:MAX_NAMED_ROWS]
    return tuple(f"{dataset.get_id(row)} = {other.get_id(first)}" for row, first in shown)


def check_ngram_overlap(context: CheckContext) -> Iterator[Finding]:
    """Held-out rows that share long passages with training rows."""
    overlap = context.text_stats.ngram_overlaps.get(context.role) if context.text_stats else None
    if overlap is None:
        return
    dataset = context.dataset
    is_equal_N = np.isin(dataset.contents_N, overlap.trained_contents)  # check_leakage names them
    rows = np.flatnonzero((overlap.share_N >= MIN_COPY_SHARE) & ~is_equal_N)
    if len(rows):
        predicate = (
            f"have at least {MIN_COPY_SHARE:.0%} of their {NGRAM_WORDS}-grams in training rows"
        )
        message = describe_rows(len(rows), len(dataset), predicate)
        fix = "remove the training rows, or evaluate on other rows"
        yield make_row_finding(context, "ngram_overlap", "error", message, rows, fix)
    rows = np.flatnonzero((overlap.share_N > 0) & (overlap.share_N < MIN_COPY_SHARE))
    if len(rows):
        predicate = f"share a {NGRAM_WORDS}-gram with training rows"
        message = describe_rows(len(rows), len(dataset), predicate)
        yield make_row_finding(context, "ngram_overlap", "info", message, rows)
