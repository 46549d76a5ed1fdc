"""Whether a difference is one: exact p for yes/no items, Holm for several claims, and what could
have been seen at all.

    gains, losses -> McNemar's p; a Comparison -> its p; p of several claims -> Holm's; half an interval -> the smallest
    difference that would probably have been shown

Plain arithmetic: comparing two runs by their files loads no model library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from tunesmith.core.types import Comparison

Z = 1.959963984540054  # the 97.5% point of the normal distribution
Z_POWER = 0.8416212335729143  # its 80% point
ALPHA = 0.05
NO_DIFFERENCE = "no difference shown"


def compute_mcnemar_p(gains: int, losses: int) -> float:
    """Two-sided exact p of as uneven a split of the changed items, if either way were as likely
    (McNemar 1947)."""
    changed, fewer = gains + losses, min(gains, losses)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def holm_adjust(p_values: Sequence[float]) -> tuple[float, ...]:
    """Each p, raised so that all claims below 0.05 together are wrong with a chance of 5% at most
    (Holm 1979)."""
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running_max
    return tuple(adjusted)


def compute_standard_error(low: float, high: float) -> float:
    """Of what has this 95% interval, if it is normal."""
    return (high - low) / (2 * Z)


def compute_robust_sd(values: Sequence[float]) -> float:
    """From the median distance to the median: as of a normal distribution, whatever a few outliers
    are."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def compute_detectable_difference(low: float, high: float) -> float:
    """What would be shown in 4 of 5 repetitions, (1.96 + 0.84) standard errors of a paired
    difference with this 95% interval."""
    return (Z + Z_POWER) * compute_standard_error(low, high)


def compute_p_value(comparison: Comparison) -> float:
    """Exact where items are right or wrong; else of a normal distribution as wide as the
    interval."""
    if comparison.p_value is not None:
        return comparison.p_value
    error = compute_standard_error(comparison.low, comparison.high)
    if not error:
        return 1.0 if comparison.difference == 0 else 0.0
    return math.erfc(abs(comparison.difference) / error / math.sqrt(2))


def judge_comparison(comparison: Comparison) -> str:
    """better or worse, when the interval leaves out 0 and an exact p, if there is one, is below
    0.05."""
    low, high = comparison.low, comparison.high
    if low <= 0 <= high or (comparison.p_value is not None and comparison.p_value >= ALPHA):
        return NO_DIFFERENCE
    return "better" if (low > 0) == comparison.higher_is_better else "worse"


def judge_comparisons(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Of several claims made together: what chance alone may show among so many is marked."""
    labels = [judge_comparison(comparison) for comparison in comparisons]
    adjusted_p = holm_adjust([compute_p_value(comparison) for comparison in comparisons])
    suffix = f" alone, not as one of {len(labels)} claims"
    return tuple(
        text if text == NO_DIFFERENCE or p < ALPHA else text + suffix
        for text, p in zip(labels, adjusted_p, strict=True)
    )


def describe_evidence(comparison: Comparison) -> str:
    """What stands behind a verdict, in a few words: items that changed and p, and what would have
    been shown."""
    parts: list[str] = []
    if (
        comparison.improved is not None
        and comparison.worsened is not None
        and comparison.p_value is not None
    ):
        parts.append(
            f"+{comparison.improved} -{comparison.worsened} items, p {format_p(comparison.p_value)}"
        )
    if judge_comparison(comparison) == NO_DIFFERENCE and comparison.min_detectable:
        parts.append(f"{format_p(comparison.min_detectable)} would show")
    return "; ".join(parts)


def format_p(number: float) -> str:
    """0.31, 0.042, 2e-05: two digits that count."""
    return f"{number:.2g}"
