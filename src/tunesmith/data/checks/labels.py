"""Checks of answers that are labels (data/labels.py), and of fields of JSON answers.

Where one value of a field is so frequent that a constant would score well, training rewards it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.answer_values import ANSWER, LOPSIDED_SHARE, ValueCounts, split_fields
from tunesmith.data.checks.context import (
    MAX_NAMED_ROWS,
    CheckContext,
    choose_level,
    describe_rows,
    get_answer,
    make_row_finding,
)
from tunesmith.data.checks.ngrams import hash_words
from tunesmith.data.checks.pii import mask_secrets
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.labels import MIN_LABEL_ROWS, iter_answers
from tunesmith.data.rehearsal import REHEARSAL_ROLE
from tunesmith.data.sampler import permute_rows

SHOWN_LABELS = 10
SHOWN_CHARS = 30
SAME_SHARE = 0.01
MAX_MAJORITY_SHARE = 0.8
MIN_CLASS_ROWS = 10
# A label is copied if it is in this share of prompts, and other labels are in fewer than that.
MIN_COPIED_SHARE = 0.9
MAX_OTHER_SHARE = 0.2
SAMPLE_ROWS = 500  # read again


def check_classes(context: CheckContext) -> Iterator[Finding]:
    """Labels and their rows: a majority, few rows, spelling, and what training rows do not have."""
    if not context.labels or context.role == REHEARSAL_ROLE:
        return
    is_trained = context.role == "data"
    rows = [(row, answer.strip()) for row, answer in iter_answers(context.dataset)]
    counts = Counter(label for _, label in rows)
    num_trained = sum(context.labels.values())
    message = f"{len(counts)} labels: {_list_labels(counts, total=len(rows))}"
    if not is_trained and counts.keys() == context.labels.keys():
        shares = [(n / len(rows), context.labels[k] / num_trained) for k, n in counts.items()]
        if max(abs(share - trained) for share, trained in shares) <= SAME_SHARE:
            message = f"{len(counts)} labels with the shares of data"
    fixes: list[str] = []
    if is_trained and max(counts.values()) > MAX_MAJORITY_SHARE * len(rows):
        fixes.append("read macro_f1 and the recall of each label, not accuracy alone")
    if is_trained:
        odd = {label: n for label, n in counts.items() if n < MIN_CLASS_ROWS}
        words = (f"fewer than {MIN_CLASS_ROWS} rows", "add rows for rare labels")
    else:
        odd = {label: n for label, n in counts.items() if label not in context.labels}
        words = ("in no training row", "correct these labels, or add training rows with them")
    if odd:
        message += f"; {words[0]}: {_list_labels(odd)}"
        fixes.append(words[1])
    if variants := _find_variants({**context.labels, **counts}):
        message += f"; the same up to case and space, but graded as different: {variants}"
        fixes.append("write each label in one way")
    odd_rows = np.array(sorted(row for row, label in rows if label in odd), dtype=np.int64)
    yield make_row_finding(
        context, "classes", "warn" if fixes else "info", message, odd_rows, "; ".join(fixes)
    )


def _list_labels(counts: Mapping[str, int], total: int = 0) -> str:
    """Return labels with their rows, and shares of a total; most frequent first, and cut."""
    shown: list[str] = []
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for label, count in ordered[:SHOWN_LABELS]:
        share = f" ({count / total:.0%})" if total else ""
        shown.append(f"{_mask(label)!r} {count:,}{share}")
    more = [f"and {len(counts) - SHOWN_LABELS} more"] * (len(counts) > SHOWN_LABELS)
    return ", ".join([*shown, *more])


def _mask(label: str) -> str:
    """Return a label as it may be shown, cut after masking so that no part of a secret is left."""
    return mask_secrets(label)[:SHOWN_CHARS]


def _find_variants(labels: Iterable[str]) -> str:
    """Return the labels that differ only by case or white space, such as `'Net' = 'net'`."""
    spellings: dict[str, list[str]] = {}
    for label in labels:
        group = spellings.setdefault("".join(label.casefold().split()), [])
        group.append(repr(_mask(label)))
    return ", ".join(" = ".join(group) for group in spellings.values() if len(group) > 1)


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
    if context.text_stats is None or context.role == REHEARSAL_ROLE or not context.labels:
        return
    dataset = context.dataset
    frequent = [label for label, count in context.labels.items() if count >= MIN_LABEL_ROWS]
    labels = {tuple(hash_words(label).tolist()) for label in frequent}
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
        other_share += len((labels - {answer_label}) & ngrams) / max(1, len(labels) - 1)
    is_copied = len(copied_rows) > MIN_COPIED_SHARE * len(sample)
    if is_copied and other_share < MAX_OTHER_SHARE * len(sample):
        message = (
            f"the prompt contains the label, and no other, in {len(copied_rows):,} of"
            f" {len(sample):,} sampled rows"
        )
        fix = "remove it from the prompts: the model learns to copy a label that it will not get"
        rows = np.sort(copied_rows)
        yield make_row_finding(context, "label_in_prompt", "error", message, rows, fix)
    elif marked := _find_marked(context, frequent):
        predicate = "have a prompt that gives the label away, in brackets, quotes or after a colon"
        message = describe_rows(len(marked), len(dataset), predicate)
        level = choose_level(len(marked), len(dataset))
        fix = "remove it from these prompts"
        yield make_row_finding(context, "label_in_prompt", level, message, np.array(marked), fix)


def _find_marked(context: CheckContext, labels: Sequence[str]) -> list[int]:
    """Return the rows whose prompt has their label, and no other one, in brackets or quotes or at
    the end of a line that introduces it."""
    names = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    pattern = re.compile(rf"[:=(\[{{<\"']\s*({names})\s*(?:[)\]}}>\"']|$)", re.MULTILINE)
    marked: list[int] = []
    for row in np.sort(permute_rows(0, 0, len(context.dataset))[:MAX_ROWS]).tolist():
        texts = extract_row_texts(context.dataset.read_example(row)).texts
        if set(pattern.findall("\n".join(texts[:-1]))) == {texts[-1].strip()}:
            marked.append(row)
    return marked
