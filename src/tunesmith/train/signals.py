"""SIGINT and SIGTERM as a wish to stop where nothing is lost, not in the middle of a step.

    with StopWish() as wish:
        with wish.at_once(): ...                a signal ends this right away: nothing of it is worth waiting for
        for event in training: wish.obey()      elsewhere it is only noted, and obeyed where that is safe

Both ways it ends with Interrupted. A second signal acts as it would have without us. Outside the
main thread nothing is caught, since Python allows handlers there only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from tunesmith.core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """`signal` is the number of the signal that came, 0 if none. `resume_with`: what the message
    tells to do; it may change on the way."""

    def __init__(self, resume_hint: str = "") -> None:
        self.signal_number, self.resume_hint = 0, resume_hint
        self._is_immediate = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in SIGNALS
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        self.__exit__()
        self.signal_number = number
        if self._is_immediate:
            self.raise_if_requested()

    def raise_if_requested(self) -> None:
        """Raises Interrupted if a signal has come: exit code 130 for SIGINT, 143 for SIGTERM."""
        if self.signal_number:
            error = Interrupted(
                f"stopped by {signal.Signals(self.signal_number).name}", fix=self.resume_hint
            )
            error.exit_code = 128 + self.signal_number
            raise error

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside, and on entering, a signal raises Interrupted from whatever line it finds."""
        self._is_immediate = True
        try:
            self.raise_if_requested()
            yield
        finally:
            self._is_immediate = False
