"""What a check looks at, and how it says what it found.

Each check is one function over a `Subject` that yields findings, and one line in `CHECKS`
(check.py). Levels: info is worth knowing, warn is worth a look, error should stop a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jsonschema.protocols import Validator

from tunesmith.core.types import Example, Finding
from tunesmith.data.checks.text_stats import MAX_NAMED_ROWS, TextStats
from tunesmith.data.dataset import Dataset
from tunesmith.data.length_stats import DatasetScan

WARN_SHARE, ERROR_SHARE = 0.01, 0.20  # of the rows

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, eq=False)
class CheckContext:
    """One role, with the roles before it."""

    role: str
    dataset: Dataset
    scan: DatasetScan
    earlier: Mapping[str, Dataset]  # the roles named before it
    validator: Validator | None  # of the recipe's answer schema
    # what all rows of all roles say; None before a run, where only the scan is looked at
    text_stats: TextStats | None = None


def choose_level(count: int, rows: int) -> Level:
    share = count / max(1, rows)
    return "error" if share > ERROR_SHARE else "warn" if share > WARN_SHARE else "info"


def make_finding(
    context: CheckContext,
    check: str,
    ids: Sequence[str],
    text: str,
    level: Level | None = None,
    *,
    fix: str = "",
) -> Finding:
    """A finding about some of the scanned rows, "3 of 9 rows" + says; without a level, their share
    decides."""
    total = len(context.scan.rows_R)
    scanned = "" if total == len(context.dataset) else " scanned"
    message = f"{len(ids):,} of {total:,}{scanned} rows{text}"
    return Finding(
        check,
        level or choose_level(len(ids), total),
        message,
        len(ids),
        tuple(ids[:MAX_NAMED_ROWS]),
        fix,
    )


def list_row_ids(dataset: Dataset, rows: np.ndarray) -> tuple[str, ...]:
    """The ids of these rows, of many the first."""
    return tuple(dataset.get_id(row) for row in rows[:MAX_NAMED_ROWS].tolist())


def get_answer(example: Example) -> str:
    """The last answer of a conversation or completion; empty for plain text, and for a turn that
    only calls tools."""
    if example.messages:
        return example.messages[-1]["content"]
    return example.text or "" if example.prompt is not None else ""
