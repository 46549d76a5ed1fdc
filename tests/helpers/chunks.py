"""Hypothesis within a fixed time of the processor, so that a busy machine tries as much as a quiet
one: a property is tried in small runs, each with its own seed, until that time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, seed, settings

CHUNK = 250


def iter_chunks(cases: int, seconds: float, size: int = CHUNK) -> Iterator[int]:
    """Numbers of runs, `size` cases each: as many as it takes for `cases`, none begins when the
    time is over."""
    until = time.process_time() + seconds
    for number in range(-(-cases // size)):
        if number and time.process_time() > until:
            return
        yield number


def make_settings(size: int = CHUNK, **more: Any) -> settings:
    return settings(
        max_examples=size, deadline=None, database=None, suppress_health_check=list(HealthCheck), **more
    )  # fmt: skip


def explore(given_property: Callable[[], None], cases: int, seconds: float) -> None:
    """`given_property` is decorated with `given` alone. The same cases come every time."""
    tried = make_settings(min(CHUNK, cases))(given_property)
    for number in iter_chunks(cases, seconds, min(CHUNK, cases)):
        seed(number)(tried)()
