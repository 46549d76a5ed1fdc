"""Run hypothesis within a budget of CPU time, which load on the machine does not reduce.

A property is checked in small runs with different seeds until the budget is used up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, seed, settings

CHUNK = 250


def iter_chunks(cases: int, seconds: float, size: int = CHUNK) -> Iterator[int]:
    """Yield numbers of runs of `size` cases until there are `cases` or the CPU time is over."""
    deadline = time.process_time() + seconds
    for number in range(-(-cases // size)):
        if number and time.process_time() > deadline:
            return
        yield number


def make_settings(size: int = CHUNK, **more: Any) -> settings:
    """Return hypothesis settings for `size` examples, without deadlines and health checks."""
    checks: list[Any] = list(HealthCheck)
    return settings(
        max_examples=size, deadline=None, database=None, suppress_health_check=checks, **more
    )


def explore(test: Callable[[], None], cases: int, seconds: float) -> None:
    """Check a property that is decorated with `given` alone; the cases are the same every time."""
    size = min(CHUNK, cases)
    check_property = make_settings(size)(test)
    for number in iter_chunks(cases, seconds, size):
        seed(number)(check_property)()
