"""How much processor time something takes, for a test that a quadratic algorithm must fail.

    check_seconds(lambda: split(text), limit=0.5)

Only this thread is timed, without the collector of garbage: after thousands of tests it has
millions of objects to look at, which takes a second, and falls into any of them. The fastest of a
few rounds counts, as a shared core is slow at times; what is fast enough at once runs once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROUNDS = 3


def check_seconds(work: Callable[[], object], *, limit: float) -> None:
    """Run `work` until a round takes less than `limit`; raise AssertionError if none does."""
    rounds: list[float] = []
    while len(rounds) < ROUNDS:
        with _pausing_collector():
            started = time.thread_time()
            work()
            rounds.append(time.thread_time() - started)
        if rounds[-1] < limit:
            return
    raise AssertionError(f"no round takes less than {limit:g} s of the processor: {rounds}")


@contextmanager
def _pausing_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
