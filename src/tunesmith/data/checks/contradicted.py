"""Rows that the other rows contradict: a wrong label, a prompt and an answer that are swapped, an
answer that ends within a word, or without the mark at the end of the others.

A classifier of words judges each text without having seen its fold (data/word_rules.py). It is
believed where it is sure: at the lowest probability from which on most of its predictions agree
with the rows, mistakes and all. What words do not tell is not found."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks.context import (
    MAX_NAMED_ROWS,
    CheckContext,
    choose_level,
    describe_rows,
    make_row_finding,
)
from tunesmith.data.checks.duplicates import INSTALL_HINT
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.rehearsal import REHEARSAL_ROLE
from tunesmith.data.sampler import permute_rows
from tunesmith.data.word_rules import predict_out_of_fold

NUM_FOLDS = 10
MIN_ROWS = 100
MAX_ROWS = 5_000  # drawn at random
MIN_RIGHT_LABELS = 0.85
MIN_RIGHT_SIDES = 0.95
MIN_SURE = 20  # predictions
MIN_CLOSED_SHARE = 0.95  # of the answers
MIN_ODDS = 5  # of the predicted label to the one of the row
NO_SKLEARN = "scikit-learn is not installed"
MIN_REST_CHARS = 2  # of the word that was cut
SMALL_SHARE = 0.5  # of the rows: the check says so if it can judge fewer


def check_mislabelled(context: CheckContext) -> Iterator[Finding]:
    """Rows whose label is not the one that the words of their prompt have elsewhere."""
    if not _is_read(context) or not context.labels:
        return
    rows, prompts, labels = _read_labelled(context)
    if len(rows) < MIN_ROWS or len(set(labels)) < 2:
        return
    if find_spec("sklearn") is None:
        yield _say_unchecked("mislabelled", NO_SKLEARN)
        return
    names_K, classes_N = np.unique(labels, return_inverse=True)
    folds_N = np.empty(len(rows), dtype=np.int64)
    folds_N[np.argsort(classes_N, kind="stable")] = np.arange(len(rows)) % NUM_FOLDS
    chances_NK = predict_out_of_fold(prompts, classes_N, folds_N)
    is_sure_N = _find_sure(chances_NK, classes_N, MIN_RIGHT_LABELS)
    if not is_sure_N.any():
        share = (chances_NK.argmax(axis=1) == classes_N).mean()
        yield _say_unchecked("mislabelled", f"words tell only {share:.0%} of the labels")
        return
    label_chances_N = chances_NK[np.arange(len(rows)), classes_N]
    indexes = np.flatnonzero(is_sure_N & (chances_NK.max(axis=1) > MIN_ODDS * label_chances_N))
    if not len(indexes) and is_sure_N.mean() >= SMALL_SHARE:
        return
    indexes = indexes[np.argsort(rows[indexes])]
    likely = names_K[chances_NK[indexes].argmax(axis=1)].tolist()
    ids = tuple(
        f"{context.dataset.get_id(row)} {labels[i]!r}, not {label!r}?"
        for row, i, label in zip(rows[indexes].tolist(), indexes.tolist(), likely, strict=True)
    )
    counts = _describe(context, len(indexes), len(rows), "have a label that their words contradict")
    message = f"{counts}; words tell enough to judge {is_sure_N.mean():.0%} of the rows"
    level = choose_level(len(indexes), len(rows))
    fix = "correct the labels that are wrong" if len(indexes) else ""
    yield Finding("mislabelled", level, message, len(indexes), ids[:MAX_NAMED_ROWS], fix)


def check_swapped(context: CheckContext) -> Iterator[Finding]:
    """Rows whose prompt reads like the answers of the others, and whose answer like prompts."""
    if not _is_read(context) or context.labels:
        return
    rows_N, prompts, answers = _read_sides(context)
    if len(rows_N) < MIN_ROWS:
        return
    if find_spec("sklearn") is None:
        yield _say_unchecked("swapped", NO_SKLEARN)
        return
    sides_T = np.repeat([0, 1], len(rows_N))
    folds_T = np.tile(np.arange(len(rows_N)) % NUM_FOLDS, 2)  # both sides of a row in one
    chances_TK = predict_out_of_fold([*prompts, *answers], sides_T, folds_T)
    is_sure_T = _find_sure(chances_TK, sides_T, MIN_RIGHT_SIDES)
    is_other_T = chances_TK.argmax(axis=1) != sides_T
    if not is_sure_T.any():
        share = 1 - is_other_T.mean()
        reason = f"words tell only {share:.0%} of the prompts and answers apart"
        yield _say_unchecked("swapped", reason)
        return
    swapped_rows = np.sort(rows_N[(is_sure_T & is_other_T).reshape(2, -1).all(axis=0)])
    if len(swapped_rows):
        predicate = "have a prompt that reads like an answer, and an answer like a prompt"
        message = _describe(context, len(swapped_rows), len(rows_N), predicate)
        level = choose_level(len(swapped_rows), len(rows_N))
        yield make_row_finding(context, "swapped", level, message, swapped_rows, "swap them back")


def check_cut_words(context: CheckContext) -> Iterator[Finding]:
    """Answers whose last word is the beginning of another one, and stands nowhere else; answers
    without a closing mark where nearly all have one."""
    if not _is_read(context) or context.labels:
        return
    rows_N, prompts, answers = _read_sides(context)
    words = [(_split_words(a), _split_words(b)) for a, b in zip(prompts, answers, strict=True)]
    counts = Counter(word for prompt, answer in words for word in {*prompt, *answer})
    vocabulary = sorted(counts)
    is_open_N = np.array([answer.rstrip()[-1].isalnum() for answer in answers], dtype=bool)
    should_close = len(rows_N) >= MIN_ROWS and is_open_N.mean() <= 1 - MIN_CLOSED_SHARE
    cut_rows: list[int] = []
    for row, (prompt, answer), is_open in zip(rows_N.tolist(), words, is_open_N, strict=True):
        if is_open and len(answer) > 1:
            is_new = counts[answer[-1]] == 1 and answer[-1] not in {*prompt, *answer[:-1]}
            if should_close or (is_new and _is_beginning(answer[-1], vocabulary)):
                cut_rows.append(row)
    if cut_rows:
        predicate = "have an answer that ends within a word, or not with a mark as the others do"
        message = _describe(context, len(cut_rows), len(rows_N), predicate)
        level = choose_level(len(cut_rows), len(rows_N))
        fix = "complete the answers, or drop the rows"
        yield make_row_finding(context, "cut_words", level, message, np.sort(cut_rows), fix)


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _is_beginning(word: str, vocabulary: list[str]) -> bool:
    """Return whether a longer word than the plural begins with this one; numbers do not count."""
    longer = vocabulary[
        bisect_right(vocabulary, word) : bisect_left(vocabulary, f"{word}\U0010ffff")
    ]
    return not word.isdigit() and any(len(each) >= len(word) + MIN_REST_CHARS for each in longer)


def _is_read(context: CheckContext) -> bool:
    return context.text_stats is not None and context.role != REHEARSAL_ROLE


def _describe(context: CheckContext, count: int, total: int, predicate: str) -> str:
    noun = "rows" if len(context.dataset) <= MAX_ROWS else "sampled rows"
    return describe_rows(count, total, predicate, noun=noun)


def _say_unchecked(check: str, reason: str) -> Finding:
    fix = INSTALL_HINT if reason == NO_SKLEARN else ""
    return Finding(check, "info", f"{check} rows are not checked: {reason}", fix=fix)


def _read_labelled(context: CheckContext) -> tuple[np.ndarray, list[str], list[str]]:
    """Return rows, their prompts and labels; without labels of fewer rows than folds."""
    rows_N = permute_rows(0, 0, len(context.dataset))[:MAX_ROWS]
    texts = [extract_row_texts(context.dataset.read_example(row)) for row in rows_N.tolist()]
    labels = [row.answer.strip() for row in texts]
    counts = Counter(labels)
    indexes = [i for i, label in enumerate(labels) if counts[label] >= NUM_FOLDS]
    prompts = ["\n".join(texts[i].texts[:-1]) for i in indexes]
    return rows_N[indexes], prompts, [labels[i] for i in indexes]


def _read_sides(context: CheckContext) -> tuple[np.ndarray, list[str], list[str]]:
    """Return rows that have both, their prompts without what many share, and their answers."""
    assert context.text_stats is not None
    stats = context.text_stats.roles[context.role]
    rows_N = permute_rows(0, 0, len(context.dataset))[:MAX_ROWS]
    examples = map(context.dataset.read_example, rows_N.tolist())
    sides = [stats.extract_parts(extract_row_texts(example)) for example in examples]
    indexes = [i for i, (prompt, answer) in enumerate(sides) if prompt.strip() and answer.strip()]
    return rows_N[indexes], [sides[i][0] for i in indexes], [sides[i][1] for i in indexes]


def _find_sure(chances_NK: np.ndarray, classes_N: np.ndarray, min_right: float) -> np.ndarray:
    """Return which of the predictions are as sure as those of which `min_right` agree."""
    top_N = chances_NK.max(axis=1)
    order_N = np.argsort(-top_N, kind="stable")
    is_right_N = chances_NK.argmax(axis=1)[order_N] == classes_N[order_N]
    shares_N = np.cumsum(is_right_N) / np.arange(1, len(top_N) + 1)
    enough = np.flatnonzero(shares_N >= min_right)
    if not len(enough) or enough[-1] + 1 < MIN_SURE:
        return np.zeros(len(top_N), dtype=bool)
    return top_N >= top_N[order_N[enough[-1]]]
