"""Checks for rows that say the same: within a role, or in a role that measures and in one that
trains.

Equal ones are found by the digests of all rows (digests.py), near ones and copied parts by the
reading of their texts (near.py, parts.py). What most rows have in common, an instruction or a
frame, makes no two rows alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import WARN_SHARE, CheckContext, choose_level, list_row_ids
from tunesmith.data.checks.minhash import MIN_JACCARD, SHINGLE_WORDS
from tunesmith.data.checks.ngram_overlap import MIN_COPY_SHARE, NGRAM_WORDS
from tunesmith.data.checks.text_stats import MAX_NAMED_ROWS

INSTALL_HINT = "pip install 'tunesmith[audit]'"


def check_duplicates(context: CheckContext) -> Iterator[Finding]:
    """Rows that say the same as an earlier row of the role, white space aside. Looks at all
    rows."""
    contents_N = context.dataset.contents_N
    order_N = np.argsort(contents_N, kind="stable")
    is_repeat_N = contents_N[order_N[1:]] == contents_N[order_N[:-1]]
    repeated_rows = np.sort(order_N[1:][is_repeat_N])
    if len(repeated_rows):
        level = "warn" if len(repeated_rows) > WARN_SHARE * len(contents_N) else "info"
        message = f"{len(repeated_rows):,} of {len(contents_N):,} rows repeat an earlier row"
        fix = "keep one of each, unless they shall weigh more"
        yield Finding(
            "duplicates",
            level,
            message,
            len(repeated_rows),
            list_row_ids(context.dataset, repeated_rows),
            fix,
        )


def check_conflicts(context: CheckContext) -> Iterator[Finding]:
    """One question with several answers, its case and closing marks aside. Looks at all rows;
    several pairs on one question are no conflict."""
    dataset = context.dataset
    if context.text_stats is None or dataset.has_pairs:
        return
    _, first_K, question_N = np.unique(dataset.prompts_N, return_index=True, return_inverse=True)
    is_different_N = dataset.contents_N != dataset.contents_N[first_K][question_N]
    is_disputed_K = np.zeros(len(first_K), dtype=bool)
    is_disputed_K[question_N[is_different_N]] = True
    rows = np.flatnonzero(is_disputed_K[question_N])
    if len(rows):
        message = f"{len(rows):,} of {len(dataset):,} rows ask one of {is_disputed_K.sum():,} questions that have several answers"
        fix = "keep the right answer; where all are right, know that the model learns to give any of them"
        rows = rows[np.argsort(question_N[rows], kind="stable")]
        yield Finding(
            "conflicts",
            choose_level(len(rows), len(dataset)),
            message,
            len(rows),
            list_row_ids(dataset, rows),
            fix,
        )


def check_leakage(context: CheckContext) -> Iterator[Finding]:
    """Held-out rows that an earlier role has too: a score on them shows memory, not skill. Looks at
    all rows."""
    dataset = context.dataset
    for role, other in context.earlier.items():
        is_equal_N = np.isin(dataset.contents_N, other.contents_N)
        is_same_prompt_N = np.isin(dataset.prompts_N, other.prompts_N) & ~is_equal_N
        if is_equal_N.any():
            message = f"{is_equal_N.sum():,} of {len(dataset):,} rows are also in {role}: remove them from one of the two"
            yield Finding(
                "leaks",
                "error",
                message,
                int(is_equal_N.sum()),
                list_row_ids(dataset, np.flatnonzero(is_equal_N)),
            )
        if is_same_prompt_N.any():
            message = f"{is_same_prompt_N.sum():,} of {len(dataset):,} rows ask what a row of {role} asks, with another answer"
            yield Finding(
                "leaks",
                "warn",
                message,
                int(is_same_prompt_N.sum()),
                list_row_ids(dataset, np.flatnonzero(is_same_prompt_N)),
            )


def check_near_duplicates(context: CheckContext) -> Iterator[Finding]:
    """Rows that say nearly the same as an earlier row of the role."""
    if context.text_stats is None:
        return
    if context.text_stats.near_duplicates is None:
        if not context.earlier:
            message = "near duplicates are not looked for: datasketch is not installed"
            yield Finding("near_duplicates", "info", message, fix=INSTALL_HINT)
        return
    dataset = context.dataset
    pairs = [
        (row, first)
        for row, role, first in context.text_stats.near_duplicates.iter_matches(context.role)
        if role == context.role
    ]
    if pairs:
        counts = f"{len(pairs):,} of {len(dataset):,} rows"
        message = f"{counts} say nearly what an earlier row says: {MIN_JACCARD:.0%} of their runs of {SHINGLE_WORDS} words"
        rows = tuple(
            f"{dataset.get_id(row)} = {dataset.get_id(first)}"
            for row, first in pairs[:MAX_NAMED_ROWS]
        )
        fix = "keep the best of each group; `tunesmith data split` keeps a group on one side"
        yield Finding(
            "near_duplicates",
            choose_level(len(pairs), len(dataset)),
            message,
            len(pairs),
            rows,
            fix,
        )


def check_near_leakage(context: CheckContext) -> Iterator[Finding]:
    """Held-out rows that say nearly what a row of an earlier role says."""
    if context.text_stats is None or context.text_stats.near_duplicates is None:
        return
    dataset, matches = (
        context.dataset,
        context.text_stats.near_duplicates.iter_matches(context.role),
    )
    for role, other in context.earlier.items():
        pairs = [(row, first) for row, match_role, first in matches if match_role == role]
        if pairs:
            message = (
                f"{len(pairs):,} of {len(dataset):,} rows say nearly what a row of {role} says"
            )
            rows = tuple(
                f"{dataset.get_id(row)} = {other.get_id(first)}"
                for row, first in pairs[:MAX_NAMED_ROWS]
            )
            fix = f"take them out of {role}, or measure without them: `tunesmith data split` keeps such rows together"
            yield Finding("near_leaks", "error", message, len(pairs), rows, fix)


def check_ngram_overlap(context: CheckContext) -> Iterator[Finding]:
    """Held-out rows of which training rows hold long passages word by word."""
    overlap = context.text_stats.ngram_overlaps.get(context.role) if context.text_stats else None
    if overlap is None:
        return
    dataset = context.dataset
    is_copied_N = (overlap.share_N >= MIN_COPY_SHARE) & ~np.isin(
        dataset.contents_N, overlap.trained_contents
    )  # `leaks` tells equal rows
    rows = np.flatnonzero(is_copied_N)
    if len(rows):
        counts = f"{len(rows):,} of {len(dataset):,} rows"
        message = f"{counts} have at least {MIN_COPY_SHARE:.0%} of their passages of {NGRAM_WORDS} words in rows that are trained"
        fix = "take the training rows out, or measure on other rows"
        yield Finding("copied_parts", "error", message, len(rows), list_row_ids(dataset, rows), fix)
    overlapping_rows = np.flatnonzero((overlap.share_N > 0) & (overlap.share_N < MIN_COPY_SHARE))
    if len(overlapping_rows):
        message = f"{len(overlapping_rows):,} of {len(dataset):,} rows share a passage of {NGRAM_WORDS} words with rows that are trained"
        yield Finding(
            "copied_parts",
            "info",
            message,
            len(overlapping_rows),
            list_row_ids(dataset, overlapping_rows),
        )
