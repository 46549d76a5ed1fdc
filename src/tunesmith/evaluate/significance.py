"""Whether a difference is one: exact p for yes/no items, Holm for several claims, and what could have been seen at all.

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
NOT_SHOWN = "no difference shown"


def mcnemar(gains: int, losses: int) -> float:
    """Two-sided exact p of as uneven a split of the changed items, if either way were as likely (McNemar 1947)."""
    changed, fewer = gains + losses, min(gains, losses)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def holm(ps: Sequence[float]) -> tuple[float, ...]:
    """Each p, raised so that all claims below 0.05 together are wrong with a chance of 5% at most (Holm 1979)."""
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = least
    return tuple(adjusted)


def standard_error(low: float, high: float) -> float:
    """Of what has this 95% interval, if it is normal."""
    return (high - low) / (2 * Z)


def robust_sd(values: Sequence[float]) -> float:
    """From the median distance to the median: as of a normal distribution, whatever a few outliers are."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def smallest_difference(low: float, high: float) -> float:
    """What would be shown in 4 of 5 repetitions, (1.96 + 0.84) standard errors of a paired difference with this 95%
    interval."""
    return (Z + Z_POWER) * standard_error(low, high)


def p_of(comparison: Comparison) -> float:
    """Exact where items are right or wrong; else of a normal distribution as wide as the interval."""
    if comparison.p is not None:
        return comparison.p
    error = standard_error(comparison.low, comparison.high)
    if not error:
        return 1.0 if comparison.difference == 0 else 0.0
    return math.erfc(abs(comparison.difference) / error / math.sqrt(2))


def verdict(comparison: Comparison) -> str:
    """better or worse, when the interval leaves out 0 and an exact p, if there is one, is below 0.05."""
    low, high = comparison.low, comparison.high
    if low <= 0 <= high or (comparison.p is not None and comparison.p >= ALPHA):
        return NOT_SHOWN
    return "better" if (low > 0) == comparison.higher_is_better else "worse"


def verdicts(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Of several claims made together: what chance alone may show among so many is marked."""
    found = [verdict(one) for one in comparisons]
    together = holm([p_of(one) for one in comparisons])
    doubtful = f" alone, not as one of {len(found)} claims"
    return tuple(
        text if text == NOT_SHOWN or p < ALPHA else text + doubtful for text, p in zip(found, together, strict=True)
    )


def evidence(comparison: Comparison) -> str:
    """What stands behind a verdict, in a few words: items that changed and p, and what would have been shown."""
    said: list[str] = []
    if comparison.gains is not None and comparison.losses is not None and comparison.p is not None:
        said.append(f"+{comparison.gains} -{comparison.losses} items, p {short(comparison.p)}")
    if verdict(comparison) == NOT_SHOWN and comparison.smallest:
        said.append(f"{short(comparison.smallest)} would show")
    return "; ".join(said)


def short(number: float) -> str:
    """0.31, 0.042, 2e-05: two digits that count."""
    return f"{number:.2g}"
