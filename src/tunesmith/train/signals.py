"""SIGINT and SIGTERM as a wish to stop where nothing is lost, not in the middle of a step.

    with StopWish() as wish:
        with wish.at_once(): ...                a signal ends this right away: nothing of it is worth waiting for
        for event in training: wish.obey()      elsewhere it is only noted, and obeyed where that is safe

Both ways it ends with Interrupted. A second signal acts as it would have without us. Outside the main thread nothing is
caught, since Python allows handlers there only.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from tunesmith.core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """`signal` is the number of the signal that came, 0 if none. `resume_with`: what the message tells to do; it may
    change on the way."""

    def __init__(self, resume_with: str = "") -> None:
        self.signal, self.resume_with = 0, resume_with
        self._at_once = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.__exit__()
        self.signal = number
        if self._at_once:
            self.obey()

    def obey(self) -> None:
        """Raises Interrupted if a signal has come: exit code 130 for SIGINT, 143 for SIGTERM."""
        if self.signal:
            error = Interrupted(f"stopped by {signal.Signals(self.signal).name}", fix=self.resume_with)
            error.exit_code = 128 + self.signal
            raise error

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, and on entering, a signal raises Interrupted from whatever line it finds."""
        self._at_once = True
        try:
            self.obey()
            yield
        finally:
            self._at_once = False
