"""How many rows each task has in an epoch, where the recipe mixes tasks.

In: the recipe's wish and the report on the training rows. Out: a Choice, rows by task; and the
report of one such epoch, which all other rules go by. Pure. Which rows these are: data/mixture.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tunesmith.core.types import DataReport, PlanValue
from tunesmith.recipe.fields import MixtureConfig

SOURCE = "Raffel 2020 (T5), 3.5.2; FLAN 2021: limit 3,000"


def allocate_rows(mixture: MixtureConfig, rows: Mapping[str, int]) -> dict[str, int]:
    """In proportion to min(rows, limit) ** (1 / temperature), each at least one: 1 is in proportion
    to the rows, a high temperature gives all tasks the same. All together as many as there are rows
    within the limit; what rounding down leaves goes to the largest remainders."""
    capped = {task: min(count, mixture.limit or count) for task, count in rows.items()}
    largest, total_rows = max(capped.values()), sum(capped.values())
    rates = {
        task: math.exp(math.log(count / largest) / mixture.temperature)
        for task, count in capped.items()
    }
    exact = {task: total_rows * rate / sum(rates.values()) for task, rate in rates.items()}
    allocated = {task: max(1, math.floor(share)) for task, share in exact.items()}
    by_remainder = sorted(exact, key=lambda task: allocated[task] - exact[task])
    for task in by_remainder[: max(0, total_rows - sum(allocated.values()))]:
        allocated[task] += 1
    return allocated


def decide_mixture(mixture: MixtureConfig, report: DataReport) -> PlanValue:
    """Rows of an epoch by task."""
    rows = allocate_rows(mixture, report.task_rows)
    tokens, total = (
        _estimate_task_tokens(rows, report),
        max(1, sum(_estimate_task_tokens(rows, report).values())),
    )
    shares = ", ".join(
        f"{task} {count / sum(rows.values()):.0%} of the rows and {tokens[task] / total:.0%} of the tokens"
        for task, count in rows.items()
    )
    limit = "" if mixture.limit is None else f", {mixture.limit:,} at most"
    reason = (
        f"rows of an epoch, as (rows of the task{limit}) ^ (1 / {mixture.temperature:g}): {shares}"
    )
    return PlanValue(rows, "rule", reason, SOURCE)


def scale_report(report: DataReport, mixture: PlanValue | None) -> DataReport:
    """What the report would say of the rows of one epoch."""
    if mixture is None:
        return report
    rows = sum(mixture.value.values())
    tokens = sum(_estimate_task_tokens(mixture.value, report).values())
    return dataclasses.replace(
        report,
        rows=rows,
        documents=round(report.documents * rows / report.rows),
        tokens=round(tokens),
        supervised_tokens=round(report.supervised_tokens * tokens / max(1, report.tokens)),
    )


def _estimate_task_tokens(rows: Mapping[str, int], report: DataReport) -> dict[str, float]:
    """Of so many rows of each task."""
    return {
        task: count * report.task_tokens.get(task, 0) / report.task_rows[task]
        for task, count in rows.items()
    }
