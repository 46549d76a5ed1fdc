"""Check of fields of JSON answers whose values are so lopsided that a constant would score well.

A model that answers the most frequent value in every row is right in that share of the rows, and
training rewards it for that. In: the answers of at most MAX_ROWS rows of a role. Out: findings with
field, share and rows. Left out: labels, which are the answer itself (labels.py)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunesmith.core.types import Finding
from tunesmith.data.answer_values import ANSWER, LOPSIDED_SHARE, ValueCounts, split_fields
from tunesmith.data.checks.context import MAX_NAMED_ROWS, CheckContext, get_answer
from tunesmith.data.rehearsal import REHEARSAL_ROLE
from tunesmith.data.sampler import permute_rows

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
