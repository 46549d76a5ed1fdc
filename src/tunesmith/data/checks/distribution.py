"""Checks of how answers are spread: lengths, languages, forms, classes, and phrases that call for
one answer.

All of them look at the numbers that the reading kept of every row; where words are needed a few
rows are read again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks import language_id as language_of
from tunesmith.data.checks.context import CheckContext, choose_level, get_answer, list_row_ids
from tunesmith.data.checks.duplicates import INSTALL_HINT
from tunesmith.data.checks.text_stats import (
    BROKEN_JSON,
    GOOD_JSON,
    NO_JSON,
    RoleTextStats,
    extract_opening,
)

MIN_JSON_SHARE = 0.8  # of the answers
MIN_ROWS = 10
MIN_CUT_CHARS = 200
OUTLIER_SDS, MIN_LOG_SD = (
    6,
    0.35,
)  # of the logarithm of a length: deviations, and the least that one is
MIN_SHARE_ROWS = 20  # pairs from which a share says something
MAX_SIDE_SHARE = 0.8
MAX_OPENING_SHARE = 0.5
RARE_LANGUAGE_SHARE = 0.05


def _get_role_stats(context: CheckContext) -> RoleTextStats | None:
    return context.text_stats.roles[context.role] if context.text_stats else None


def check_broken_json(context: CheckContext) -> Iterator[Finding]:
    """Answers that are no JSON where nearly all are. With a schema `answers` says it."""
    stats = _get_role_stats(context)
    if stats is None or context.validator is not None:
        return
    json_kind_N = stats.json_kind_N
    rows = np.flatnonzero(json_kind_N != GOOD_JSON)
    if len(rows) and (json_kind_N == GOOD_JSON).mean() >= MIN_JSON_SHARE:
        broken = int((json_kind_N == BROKEN_JSON).sum())
        message = f"{len(rows):,} of {len(json_kind_N):,} answers are not JSON, {broken:,} of them begin like it; the others are"
        fix = "correct them; a `schema:` in the recipe checks the others too"
        yield Finding(
            "broken_json", "warn", message, len(rows), list_row_ids(context.dataset, rows), fix
        )


def check_cut_answers(context: CheckContext) -> Iterator[Finding]:
    """Many answers of exactly the greatest length: something cut them."""
    stats = _get_role_stats(context)
    if stats is None or not len(stats.answer_chars_N):
        return
    longest = int(stats.answer_chars_N.max())
    rows = np.flatnonzero(stats.answer_chars_N == longest)
    num_unique = len(np.unique(stats.answer_digests_N[rows]))
    if longest >= MIN_CUT_CHARS and num_unique >= max(MIN_ROWS, len(stats.answer_chars_N) // 200):
        message = f"{len(rows):,} different answers have {longest:,} characters, and none has more: they were cut there"
        fix = "make them again with more room"
        yield Finding(
            "cut_off", "warn", message, len(rows), list_row_ids(context.dataset, rows), fix
        )


def check_length_outliers(context: CheckContext) -> Iterator[Finding]:
    """Prompts and answers far longer or shorter than the others."""
    stats = _get_role_stats(context)
    for field, chars_N in (
        (("answer", stats.answer_chars_N), ("prompt", stats.prompt_chars_N)) if stats else ()
    ):
        if len(chars_N) < MIN_ROWS:
            continue
        logs_N = np.log(np.maximum(1, chars_N))
        median = float(np.median(logs_N))
        sd = max(MIN_LOG_SD, 1.4826 * float(np.median(np.abs(logs_N - median))))
        z_scores_N = (logs_N - median) / sd
        for side, rows in (
            ("longer", np.flatnonzero(z_scores_N > OUTLIER_SDS)),
            ("shorter", np.flatnonzero(z_scores_N < -OUTLIER_SDS)),
        ):
            if len(rows):
                extreme = int(chars_N[rows].max() if side == "longer" else chars_N[rows].min())
                message = (
                    f"{len(rows):,} of {len(chars_N):,} rows have a far {side} {field} than the others: "
                    f"{extreme:,} characters where the median is {int(np.median(chars_N)):,}"
                )
                fix = "look at them: pasted files, logs and empty shells are worth dropping"
                yield Finding(
                    "outliers",
                    choose_level(len(rows), len(chars_N)),
                    message,
                    len(rows),
                    list_row_ids(context.dataset, rows),
                    fix,
                )


def check_languages(context: CheckContext) -> Iterator[Finding]:
    """Languages of the answers, and the rows in a rare one."""
    stats = _get_role_stats(context)
    if stats is None:
        return
    if stats.languages_N is None:
        if not context.earlier:
            message = "languages are not told apart: py3langid is not installed"
            yield Finding("languages", "info", message, fix=INSTALL_HINT)
        return
    detected = stats.languages_N[stats.languages_N >= 0]
    counts = Counter(detected.tolist()).most_common()
    if len(counts) < 2:
        return
    names = language_of.list_languages()
    mix = ", ".join(f"{names[number]} {count / len(detected):.1%}" for number, count in counts[:6])
    rare = [number for number, count in counts if count < RARE_LANGUAGE_SHARE * len(detected)]
    rows = np.flatnonzero(np.isin(stats.languages_N, rare))
    sample_note = (
        "" if stats.is_sampled_N.all() else f" of {stats.is_sampled_N.sum():,} rows, a sample,"
    )
    message = f"of {len(detected):,} answers{sample_note} with enough text: {mix}"
    if len(rows):
        message += f"; {len(rows):,} rows are in a rare language"
    fix = "if one language is meant, look at the rows in the others" if len(rows) else ""
    level = "warn" if len(rows) > 0.01 * len(detected) else "info"
    yield Finding("languages", level, message, len(rows), list_row_ids(context.dataset, rows), fix)


def check_openings(context: CheckContext) -> Iterator[Finding]:
    """Answers that mostly begin with the same words; JSON and labels do, and are left out."""
    stats = _get_role_stats(context)
    if stats is None:
        return
    rows = np.flatnonzero((stats.json_kind_N == NO_JSON) & (stats.answer_chars_N > 40))
    if len(rows) < max(MIN_SHARE_ROWS, len(stats.json_kind_N) // 2):
        return
    values, counts = np.unique(stats.opening_digests_N[rows], return_counts=True)
    top = int(counts.argmax())
    if counts[top] >= MAX_OPENING_SHARE * len(rows):
        same_rows = rows[stats.opening_digests_N[rows] == values[top]]
        words = extract_opening(get_answer(context.dataset.read_example(int(same_rows[0]))))
        message = f"{len(same_rows):,} of {len(rows):,} answers begin with {words!r}"
        fix = "if that is no wanted form, reword some: the model will begin so whatever is asked"
        yield Finding(
            "openings",
            "warn",
            message,
            len(same_rows),
            list_row_ids(context.dataset, same_rows),
            fix,
        )


def check_length_bias(context: CheckContext) -> Iterator[Finding]:
    """Pairs in which mostly the longer answer is preferred: length is then what is learned."""
    stats = _get_role_stats(context)
    if stats is None or not context.dataset.has_pairs or len(context.dataset) < MIN_SHARE_ROWS:
        return
    for side, is_win_N in (
        ("longer", stats.answer_chars_N > stats.rejected_chars_N),
        ("shorter", stats.answer_chars_N < stats.rejected_chars_N),
    ):
        if is_win_N.mean() > MAX_SIDE_SHARE:
            counts = f"in {is_win_N.mean():.0%} of {len(is_win_N):,} pairs"
            message = f"{counts} the {side} answer is preferred: length alone tells them apart"
            fix = "add pairs in which it is the other way round"
            yield Finding(
                "longer_side",
                "warn",
                message,
                int(is_win_N.sum()),
                list_row_ids(context.dataset, np.flatnonzero(is_win_N)),
                fix,
            )
