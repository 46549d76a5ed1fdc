"""Checks of how answers are distributed: lengths, languages, JSON, preferred side.

They use the numbers of each row in `text_stats.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.checks import language_id
from tunesmith.data.checks.context import (
    CheckContext,
    choose_level,
    describe_rows,
    make_row_finding,
)
from tunesmith.data.checks.duplicates import INSTALL_HINT
from tunesmith.data.checks.text_stats import (
    BROKEN_JSON,
    GOOD_JSON,
    RoleTextStats,
    extract_row_texts,
)

MIN_JSON_SHARE = 0.8  # of the answers
MIN_ROWS = 10
MIN_CUT_CHARS = 200
# Outliers are this many standard deviations of the log length from the median; the deviation is
# estimated from the MAD, and taken as MIN_LOG_SD at least.
OUTLIER_SDS = 6
MIN_LOG_SD = 0.35
MAD_TO_SD = 1.4826  # for a normal distribution
MIN_SHARE_ROWS = 20  # shares of fewer rows mean little
MAX_LABEL_RATIO = 4 / 3  # of desirable to undesirable (Ethayarajh 2024, equation 9)
MAX_SIDE_SHARE = 0.8
MIN_COMMON_SHARE = 0.1  # of the texts, of a language that is expected
MAX_FOREIGN_SHARE = 0.01  # of the rows
MAX_OTHER_SHARE = 0.2  # of the texts
SHOWN_LANGUAGES = 6


def _get_role_stats(context: CheckContext) -> RoleTextStats | None:
    return context.text_stats.roles[context.role] if context.text_stats else None


def check_broken_json(context: CheckContext) -> Iterator[Finding]:
    """Answers that are not JSON, where nearly all are. With a schema, check_schema covers it."""
    stats = _get_role_stats(context)
    if stats is None or context.validator is not None:
        return
    json_kind_N = stats.json_kind_N
    rows = np.flatnonzero(json_kind_N != GOOD_JSON)
    if len(rows) and (json_kind_N == GOOD_JSON).mean() >= MIN_JSON_SHARE:
        num_broken = int((json_kind_N == BROKEN_JSON).sum())
        counts = describe_rows(len(rows), len(json_kind_N), "are not JSON", noun="answers")
        message = f"{counts} ({num_broken:,} malformed); the others are"
        fix = "correct them; a `response_schema` in the recipe checks the others too"
        yield make_row_finding(context, "broken_json", "warn", message, rows, fix)


def check_cut_answers(context: CheckContext) -> Iterator[Finding]:
    """Many different answers of exactly the maximum length: something cut them."""
    stats = _get_role_stats(context)
    if stats is None or not len(stats.answer_chars_N):
        return
    longest = int(stats.answer_chars_N.max())
    rows = np.flatnonzero(stats.answer_chars_N == longest)
    num_unique = len(np.unique(stats.answer_digests_N[rows]))
    min_unique = max(MIN_ROWS, len(stats.answer_chars_N) // 200)
    if longest >= MIN_CUT_CHARS and num_unique >= min_unique:
        message = (
            f"{len(rows):,} different answers have exactly {longest:,} characters, the maximum:"
            " they were cut there"
        )
        fix = "generate them again with a higher limit"
        yield make_row_finding(context, "cut_off", "warn", message, rows, fix)


def check_length_outliers(context: CheckContext) -> Iterator[Finding]:
    """Prompts and answers far longer or shorter than the others."""
    stats = _get_role_stats(context)
    if stats is None:
        return
    for field, chars_N in (("answer", stats.answer_chars_N), ("prompt", stats.prompt_chars_N)):
        if len(chars_N) < MIN_ROWS:
            continue
        logs_N = np.log(np.maximum(1, chars_N))
        median = float(np.median(logs_N))
        sd = max(MIN_LOG_SD, MAD_TO_SD * float(np.median(np.abs(logs_N - median))))
        z_scores_N = (logs_N - median) / sd
        for side, is_outlier_N in (
            ("longer", z_scores_N > OUTLIER_SDS),
            ("shorter", z_scores_N < -OUTLIER_SDS),
        ):
            rows = np.flatnonzero(is_outlier_N)
            if not len(rows):
                continue
            extreme = int(chars_N[rows].max() if side == "longer" else chars_N[rows].min())
            predicate = f"have a {field} much {side} than the others"
            counts = describe_rows(len(rows), len(chars_N), predicate)
            typical = int(np.median(chars_N))
            message = f"{counts}: {extreme:,} characters, the median is {typical:,}"
            level = choose_level(len(rows), len(chars_N))
            fix = "check them: pasted files, logs and empty shells are worth dropping"
            yield make_row_finding(context, "outliers", level, message, rows, fix)


def check_languages(context: CheckContext) -> Iterator[Finding]:
    """Languages of the answers, and rows with a prompt or an answer in another language."""
    stats = _get_role_stats(context)
    if stats is None:
        return
    if stats.languages_PN is None:
        if not context.earlier:
            message = "languages are not checked: py3langid is not installed"
            yield Finding("languages", "info", message, fix=INSTALL_HINT)
        return
    rows = _find_foreign_rows(context, stats)
    detected = stats.languages_PN[-1][stats.is_clear_PN[-1]]
    counts = Counter(detected.tolist()).most_common(SHOWN_LANGUAGES)
    if len(counts) < 2 and not len(rows):
        return
    names = language_id.list_languages()
    shares = [f"{names[number]} {count / len(detected):.1%}" for number, count in counts]
    sampled = ""
    if not stats.is_sampled_N.all():
        sampled = f" in a sample of {stats.is_sampled_N.sum():,} rows"
    parts = [f"languages of {len(detected):,} answers{sampled}: {', '.join(shares)}"] * bool(shares)
    fix = ""
    if len(rows):
        parts.append(f"rows with a prompt or answer in another language: {len(rows):,}")
        fix = "if one language is intended, check these rows"
    message = "; ".join(parts)
    level = "warn" if len(rows) > MAX_FOREIGN_SHARE * len(context.dataset) else "info"
    yield make_row_finding(context, "languages", level, message, rows, fix)


def _find_foreign_rows(context: CheckContext, stats: RoleTextStats) -> np.ndarray:
    """Return the rows whose prompt or answer is in a language that few have. Where many rows have
    one, the data set has many languages, and none is foreign; labels have none."""
    assert stats.languages_PN is not None
    foreign: list[int] = []
    for part, languages_N in enumerate(stats.languages_PN):
        is_answer = part == len(stats.languages_PN) - 1
        common = _list_common(languages_N, stats.is_clear_PN[part])
        if not common or (is_answer and context.labels):
            continue
        candidates = np.flatnonzero((languages_N >= 0) & ~np.isin(languages_N, common)).tolist()
        examples = map(context.dataset.read_example, candidates)
        texts = [stats.extract_parts(extract_row_texts(example))[part] for example in examples]
        rows = [
            row
            for row, text in zip(candidates, texts, strict=True)
            if language_id.is_foreign(text, common)
        ]
        if len(rows) <= MAX_OTHER_SHARE * np.count_nonzero(languages_N >= 0):
            foreign += rows
    return np.unique(np.array(foreign, dtype=np.int64))


def _list_common(languages_N: np.ndarray, is_clear_N: np.ndarray) -> list[int]:
    """Return the languages that many texts have: of clear ones, if there are enough. Empty if most
    texts are in none of them, as names and codes are."""
    is_counted_N = is_clear_N if is_clear_N.sum() >= MIN_SHARE_ROWS else languages_N >= 0
    values, counts = np.unique(languages_N[is_counted_N], return_counts=True)
    is_common = counts >= MIN_COMMON_SHARE * counts.sum()
    return values[is_common].tolist() if 2 * counts[is_common].sum() > counts.sum() else []


def check_label_balance(context: CheckContext) -> Iterator[Finding]:
    """Labels of which one kind weighs more than KTO's paper advises, at equal weights."""
    dataset = context.dataset
    rows = context.scan.rows_R.tolist()
    if not dataset.has_labels or len(rows) < MIN_SHARE_ROWS:
        return
    labels = [dataset.read_example(row) for row in rows]
    num_desirable = sum(example.label is True for example in labels)
    num_undesirable = sum(
        example.label is False or example.rejected is not None for example in labels
    )
    ratio = num_desirable / max(1, num_undesirable)
    if 1 <= ratio <= MAX_LABEL_RATIO:
        return
    if ratio < 1:
        advice = f"desirable_weight: {min(1000.0, 1 / max(ratio, 1e-3)):.3g}"
    else:
        advice = f"undesirable_weight: {ratio / MAX_LABEL_RATIO:.3g}"
    message = f"{num_desirable:,} desirable and {num_undesirable:,} undesirable answers"
    fix = f"set loss: {{name: kto, {advice}}}, so that both kinds weigh about the same"
    yield Finding("label_balance", "info", message, len(rows), fix=fix)


def check_length_bias(context: CheckContext) -> Iterator[Finding]:
    """Pairs in which mostly the longer answer is preferred, so that length is what is learned."""
    stats = _get_role_stats(context)
    if stats is None or not context.dataset.has_pairs or len(context.dataset) < MIN_SHARE_ROWS:
        return
    for side, is_win_N in (
        ("longer", stats.answer_chars_N > stats.rejected_chars_N),
        ("shorter", stats.answer_chars_N < stats.rejected_chars_N),
    ):
        if is_win_N.mean() > MAX_SIDE_SHARE:
            message = (
                f"the {side} answer is preferred in {is_win_N.mean():.0%} of {len(is_win_N):,}"
                " pairs: length alone predicts the preference"
            )
            fix = "add pairs in which it is the other way round"
            rows = np.flatnonzero(is_win_N)
            yield make_row_finding(context, "length_bias", "warn", message, rows, fix)
