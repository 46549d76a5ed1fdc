"""Cases in place of a product: every two values of two parameters meet in at least one case."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

Case = tuple[Any, ...]
Pair = tuple[int, Any, int, Any]


def list_pairs(*parameters: Sequence[Any], tries: int = 30) -> list[Case]:
    """Return the cases, the same ones each time: each is the best of `tries` seeded draws around a
    pair that is still missing."""
    rng = random.Random(0)
    missing = {
        (i, a, j, b)
        for i, j in combinations(range(len(parameters)), 2)
        for a in range(len(parameters[i]))
        for b in range(len(parameters[j]))
    }
    cases: list[Case] = []
    while missing:
        i, a, j, b = min(missing)
        draws = [[rng.randrange(len(values)) for values in parameters] for _ in range(tries)]
        for draw in draws:
            draw[i], draw[j] = a, b
        best = max(draws, key=lambda draw: len(missing & _iter_pairs(draw)))
        missing -= _iter_pairs(best)
        cases.append(tuple(values[k] for values, k in zip(parameters, best, strict=True)))
    return cases


def _iter_pairs(draw: list[int]) -> set[Pair]:
    return {(i, draw[i], j, draw[j]) for i, j in combinations(range(len(draw)), 2)}
