"""May this be released? A gate for each comparison: not worse than before, and no more forgotten than was allowed.

    Comparisons, a margin -> Gates

General text: the worst end of the interval must lie within the margin that the plan fixed before the training (the
lower bound of a non-inferiority test). Everything else: the interval must not lie on the worse side. How far a model
has moved from its base is no gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL
from tunesmith.core.types import Comparison
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.significance import verdict


@dataclass(frozen=True)
class Gate:
    """`bound` is the worst end of the interval of the difference; it may be `margin` at most, where there is one."""

    name: str
    passed: bool
    bound: float
    margin: float | None
    said: str


def gates(comparisons: Sequence[Comparison], margin: float | None) -> tuple[Gate, ...]:
    """Raises InputError without anything to judge."""
    judged = [one for one in comparisons if one.task != GENERAL or one.metric == BITS_PER_BYTE]
    found = [_forgetting(one, margin) if one.task == GENERAL else _not_worse(one) for one in judged]
    if not found:
        raise InputError("there is nothing to judge", where="--gate", fix="give the recipe test_data or retention_data")
    return tuple(found)


def _forgetting(one: Comparison, margin: float | None) -> Gate:
    if margin is None:
        return _not_worse(one)
    within = one.high <= margin
    said = f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}] bits per byte, at most {margin:+g}"
    return Gate(f"{one.task} {one.metric}", within, one.high, margin, said)


def _not_worse(one: Comparison) -> Gate:
    bound = one.low if one.higher_is_better else one.high
    said = f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}], n = {one.after.n}: {verdict(one)}"
    return Gate(f"{one.task} {one.metric}", verdict(one) != "worse", bound, None, said)
