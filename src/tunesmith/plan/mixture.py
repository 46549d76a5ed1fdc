"""How many rows of each task an epoch has, when the recipe mixes tasks.

In: `mixture` of the recipe and the report on the training rows. Out: a PlanValue, rows by task; and
the report of one such epoch, which all other rules use. Left out: which rows (data/sampler.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from tunesmith.core.types import DataReport, PlanValue
from tunesmith.recipe.fields import MixtureConfig

SOURCE = "Raffel 2020 (T5), 3.5.2; FLAN 2021: limit 3,000"


def allocate_rows(mixture: MixtureConfig, rows: Mapping[str, int]) -> dict[str, int]:
    """Return the rows of each task, proportional to min(rows, limit) ** (1 / temperature).

    Temperature 1 keeps the proportions of the rows; a high one gives all tasks the same. The total
    is the number of rows within the limit; each task has at least one row, and rows lost to
    rounding go to the largest remainders."""
    capped = {task: min(count, mixture.limit or count) for task, count in rows.items()}
    largest = max(capped.values())
    total_rows = sum(capped.values())
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
    """Return the rows of an epoch by task."""
    rows = allocate_rows(mixture, report.task_rows)
    tokens = _estimate_task_tokens(rows, report)
    total_rows = sum(rows.values())
    total_tokens = max(1, sum(tokens.values()))
    shares: list[str] = []
    for task, count in rows.items():
        token_share = tokens[task] / total_tokens
        shares.append(
            f"{task} {count / total_rows:.0%} of the rows and {token_share:.0%} of the tokens"
        )
    limit = "" if mixture.limit is None else f", at most {mixture.limit:,}"
    formula = f"(rows of the task{limit}) ^ (1 / {mixture.temperature:g})"
    reason = f"rows per epoch, proportional to {formula}: {', '.join(shares)}"
    return PlanValue(rows, "rule", reason, SOURCE)


def scale_report(report: DataReport, mixture: PlanValue | None) -> DataReport:
    """Return the report for the rows of one epoch of the mixture."""
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
    """Return the tokens of so many rows of each task."""
    tokens: dict[str, float] = {}
    for task, count in rows.items():
        tokens[task] = count * report.task_tokens.get(task, 0) / report.task_rows[task]
    return tokens
