"""What a data check sees, and how it words its findings.

A check is one function over a `CheckContext` that yields findings, and one line in DATASET_CHECKS
(`run.py`). Levels: `info` for what is good to know, `warn` for what to look at, `error` for what
should stop a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jsonschema.protocols import Validator

from tunesmith.core.types import Example, Finding
from tunesmith.data.checks.text_stats import MAX_NAMED_ROWS, TextStats
from tunesmith.data.dataset import Dataset
from tunesmith.data.length_stats import DatasetScan

# A share of rows above these is a warning, or an error.
WARN_SHARE = 0.01
ERROR_SHARE = 0.20

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, eq=False)
class CheckContext:
    """One role and the roles named before it."""

    role: str
    dataset: Dataset
    scan: DatasetScan
    earlier: Mapping[str, Dataset]
    validator: Validator | None  # for the recipe's response_schema
    # of all rows of all roles; None before a run, which checks only the scan
    text_stats: TextStats | None = None
    # label -> training rows; empty if their answers are no labels
    labels: dict[str, int] = field(default_factory=dict[str, int])


def choose_level(count: int, total: int) -> Level:
    """Return the level for a share of rows."""
    share = count / max(1, total)
    if share > ERROR_SHARE:
        return "error"
    return "warn" if share > WARN_SHARE else "info"


def describe_rows(count: int, total: int, predicate: str, *, noun: str = "rows") -> str:
    """Return "3 of 9 rows have ...", or "1 of 9 rows has ...": the first word of `predicate` is a
    verb in the plural. With ": ..." as predicate, there is no verb."""
    if predicate.startswith(":"):
        return f"{count:,} of {total:,} {noun}{predicate}"
    if count == 1:
        verb, _, rest = predicate.partition(" ")
        singular = {"have": "has", "are": "is"}.get(verb, f"{verb}s")
        predicate = f"{singular} {rest}"
    return f"{count:,} of {total:,} {noun} {predicate}"


def make_finding(
    context: CheckContext,
    check: str,
    ids: Sequence[str],
    predicate: str,
    level: Level | None = None,
) -> Finding:
    """Return a finding about some of the scanned rows: "3 of 9 rows " + predicate. Without a
    `level`, their share decides."""
    total = len(context.scan.rows_R)
    noun = "rows" if total == len(context.dataset) else "scanned rows"
    return Finding(
        check,
        level or choose_level(len(ids), total),
        describe_rows(len(ids), total, predicate, noun=noun),
        len(ids),
        tuple(ids[:MAX_NAMED_ROWS]),
    )


def make_row_finding(
    context: CheckContext,
    check: str,
    level: Level,
    message: str,
    rows: np.ndarray,
    fix: str = "",
) -> Finding:
    """Return a finding about some of all rows, scanned or not."""
    return Finding(check, level, message, len(rows), list_row_ids(context.dataset, rows), fix)


def list_row_ids(dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    """Return the ids of these rows, at most MAX_NAMED_ROWS."""
    return tuple(dataset.get_id(row) for row in rows[:MAX_NAMED_ROWS].tolist())


def get_answer(example: Example) -> str:
    """Return the last answer of a conversation or completion; empty for plain text, and for a turn
    that only calls tools."""
    if example.messages:
        return example.messages[-1]["content"]
    return example.text or "" if example.prompt is not None else ""
