"""How far something long has come, for whoever wants to know: a line of Python's own logging, now
and then.

    for answer in watched(answers, 80, "answers"): ...        logs "answers 12 of 80" at level INFO, on `LOG`

Nothing is shown unless someone listens, as the command line does (progress.py). Left out: the steps
of a training, which are events."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger("tunesmith.core.progress_log")
LOG_INTERVAL_SECONDS = 5.0  # seconds between two lines: what is shorter is not told
T = TypeVar("T")


def log_progress(items: Iterable[T], total: int, label: str, *, num_done: int = 0) -> Iterator[T]:
    """The same items, told as they come; `done` of `total` are there already."""
    last_logged = time.monotonic()
    for count, item in enumerate(items, start=num_done + 1):
        yield item
        if (now := time.monotonic()) - last_logged >= LOG_INTERVAL_SECONDS:
            last_logged = now
            logger.info("%s: %d of %d", label, count, total)
