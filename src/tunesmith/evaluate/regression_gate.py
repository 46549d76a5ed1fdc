"""May this be released? A gate for each comparison: not worse than before, and no more forgotten
than was allowed.

    Comparisons, a margin -> Gates

General text: the worst end of the interval must lie within the margin that the plan fixed before
the training (the lower bound of a non-inferiority test). Everything else: the interval must not lie
on the worse side. How far a model has moved from its base is no gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.types import Comparison
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.statistics import judge_comparison


@dataclass(frozen=True)
class Gate:
    """`bound` is the worst end of the interval of the difference; it may be `margin` at most, where
    there is one."""

    name: str
    passed: bool
    bound: float
    margin: float | None
    message: str


def build_gates(comparisons: Sequence[Comparison], margin: float | None) -> tuple[Gate, ...]:
    """Raises InputError without anything to judge."""
    gated = [
        comparison
        for comparison in comparisons
        if comparison.task != GENERAL_TASK or comparison.metric == BITS_PER_BYTE
    ]
    results = [
        _check_forgetting(comparison, margin)
        if comparison.task == GENERAL_TASK
        else _check_not_worse(comparison)
        for comparison in gated
    ]
    if not results:
        raise InputError(
            "there is nothing to judge",
            where="--gate",
            fix="give the recipe test_data or retention_data",
        )
    return tuple(results)


def _check_forgetting(comparison: Comparison, margin: float | None) -> Gate:
    if margin is None:
        return _check_not_worse(comparison)
    is_within = comparison.high <= margin
    message = f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}] bits per byte, at most {margin:+g}"
    return Gate(
        f"{comparison.task} {comparison.metric}", is_within, comparison.high, margin, message
    )


def _check_not_worse(comparison: Comparison) -> Gate:
    bound = comparison.low if comparison.higher_is_better else comparison.high
    message = f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}], n = {comparison.after.n}: {judge_comparison(comparison)}"
    return Gate(
        f"{comparison.task} {comparison.metric}",
        judge_comparison(comparison) != "worse",
        bound,
        None,
        message,
    )
