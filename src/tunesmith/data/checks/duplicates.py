"""Checks for rows that say the same: within a role, or in a role that measures and in one that trains.

Equal ones are found by the digests of all rows (digests.py), near ones and copied parts by the reading of their texts
(near.py, parts.py). What most rows have in common, an instruction or a frame, makes no two rows alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import WARN_SHARE, Subject, by_share, shown
from tunesmith.data.checks.minhash import ALIKE, WORDS
from tunesmith.data.checks.ngram_overlap import GRAM, MOSTLY
from tunesmith.data.checks.text_stats import NAMED_ROWS

INSTALL = "pip install 'tunesmith[audit]'"


def duplicates(subject: Subject) -> Iterator[Finding]:
    """Rows that say the same as an earlier row of the role, white space aside. Looks at all rows."""
    contents_N = subject.dataset.contents_N
    order_N = np.argsort(contents_N, kind="stable")
    again_N = contents_N[order_N[1:]] == contents_N[order_N[:-1]]
    copies = np.sort(order_N[1:][again_N])
    if len(copies):
        level = "warn" if len(copies) > WARN_SHARE * len(contents_N) else "info"
        message = f"{len(copies):,} of {len(contents_N):,} rows repeat an earlier row"
        fix = "keep one of each, unless they shall weigh more"
        yield Finding("duplicates", level, message, len(copies), shown(subject.dataset, copies), fix)


def conflicts(subject: Subject) -> Iterator[Finding]:
    """One question with several answers, its case and closing marks aside. Looks at all rows; several pairs on one
    question are no conflict."""
    data = subject.dataset
    if subject.reading is None or data.pairs:
        return
    _, first_K, question_N = np.unique(data.prompts_N, return_index=True, return_inverse=True)
    differs_N = data.contents_N != data.contents_N[first_K][question_N]
    disputed_K = np.zeros(len(first_K), dtype=bool)
    disputed_K[question_N[differs_N]] = True
    rows = np.flatnonzero(disputed_K[question_N])
    if len(rows):
        message = (
            f"{len(rows):,} of {len(data):,} rows ask one of {disputed_K.sum():,} questions that have several answers"
        )
        fix = "keep the right answer; where all are right, know that the model learns to give any of them"
        rows = rows[np.argsort(question_N[rows], kind="stable")]
        yield Finding("conflicts", by_share(len(rows), len(data)), message, len(rows), shown(data, rows), fix)


def leaks(subject: Subject) -> Iterator[Finding]:
    """Held-out rows that an earlier role has too: a score on them shows memory, not skill. Looks at all rows."""
    own = subject.dataset
    for role, other in subject.earlier.items():
        same_N = np.isin(own.contents_N, other.contents_N)
        prompt_N = np.isin(own.prompts_N, other.prompts_N) & ~same_N
        if same_N.any():
            message = f"{same_N.sum():,} of {len(own):,} rows are also in {role}: remove them from one of the two"
            yield Finding("leaks", "error", message, int(same_N.sum()), shown(own, np.flatnonzero(same_N)))
        if prompt_N.any():
            message = f"{prompt_N.sum():,} of {len(own):,} rows ask what a row of {role} asks, with another answer"
            yield Finding("leaks", "warn", message, int(prompt_N.sum()), shown(own, np.flatnonzero(prompt_N)))


def near_duplicates(subject: Subject) -> Iterator[Finding]:
    """Rows that say nearly the same as an earlier row of the role."""
    if subject.reading is None:
        return
    if subject.reading.alike is None:
        if not subject.earlier:
            message = "near duplicates are not looked for: datasketch is not installed"
            yield Finding("near_duplicates", "info", message, fix=INSTALL)
        return
    own = subject.dataset
    near = [(row, first) for row, role, first in subject.reading.alike.of(subject.role) if role == subject.role]
    if near:
        of = f"{len(near):,} of {len(own):,} rows"
        message = f"{of} say nearly what an earlier row says: {ALIKE:.0%} of their runs of {WORDS} words"
        rows = tuple(f"{own.id(row)} = {own.id(first)}" for row, first in near[:NAMED_ROWS])
        fix = "keep the best of each group; `tunesmith data split` keeps a group on one side"
        yield Finding("near_duplicates", by_share(len(near), len(own)), message, len(near), rows, fix)


def near_leaks(subject: Subject) -> Iterator[Finding]:
    """Held-out rows that say nearly what a row of an earlier role says."""
    if subject.reading is None or subject.reading.alike is None:
        return
    own, found = subject.dataset, subject.reading.alike.of(subject.role)
    for role, other in subject.earlier.items():
        near = [(row, first) for row, where, first in found if where == role]
        if near:
            message = f"{len(near):,} of {len(own):,} rows say nearly what a row of {role} says"
            rows = tuple(f"{own.id(row)} = {other.id(first)}" for row, first in near[:NAMED_ROWS])
            fix = f"take them out of {role}, or measure without them: `tunesmith data split` keeps such rows together"
            yield Finding("near_leaks", "error", message, len(near), rows, fix)


def copied_parts(subject: Subject) -> Iterator[Finding]:
    """Held-out rows of which training rows hold long passages word by word."""
    parts = subject.reading.parts.get(subject.role) if subject.reading else None
    if parts is None:
        return
    own = subject.dataset
    copied_N = (parts.share_N >= MOSTLY) & ~np.isin(own.contents_N, parts.trained_contents)  # `leaks` tells equal rows
    rows = np.flatnonzero(copied_N)
    if len(rows):
        of = f"{len(rows):,} of {len(own):,} rows"
        message = f"{of} have at least {MOSTLY:.0%} of their passages of {GRAM} words in rows that are trained"
        fix = "take the training rows out, or measure on other rows"
        yield Finding("copied_parts", "error", message, len(rows), shown(own, rows), fix)
    touched = np.flatnonzero((parts.share_N > 0) & (parts.share_N < MOSTLY))
    if len(touched):
        message = f"{len(touched):,} of {len(own):,} rows share a passage of {GRAM} words with rows that are trained"
        yield Finding("copied_parts", "info", message, len(touched), shown(own, touched))
