"""Log the progress of long loops, for whoever listens.

    for answer in log_progress(answers, 80, "answers"): ...     logs "answers: 12 of 80" at INFO

The command line shows these lines (cli/progress.py); without a handler nothing is shown. Left out:
training steps, which are events.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger("tunesmith.core.progress_log")
LOG_INTERVAL_SECONDS = 5.0  # between two lines; shorter loops are not logged
T = TypeVar("T")


def log_progress(items: Iterable[T], total: int, label: str, *, num_done: int = 0) -> Iterator[T]:
    """Yield the items and log how many there were; `num_done` of `total` are done already."""
    last_logged = time.monotonic()
    for count, item in enumerate(items, start=num_done + 1):
        yield item
        if (now := time.monotonic()) - last_logged >= LOG_INTERVAL_SECONDS:
            last_logged = now
            logger.info("%s: %d of %d", label, count, total)
