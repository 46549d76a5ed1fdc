"""SIGINT and SIGTERM as a wish to stop after the step, not in the middle of it.

    with StopWish() as wish:
        for event in training: ... if wish.signal: save, then raise wish.interruption(...)

The first signal is only noted; a second one acts as it would have without us. Outside the main thread nothing is
caught, since Python allows handlers there only.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from tunesmith.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """`signal` is the number of the signal that came, 0 if none."""

    def __init__(self) -> None:
        self.signal = 0
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

    def interruption(self, resume_with: str) -> Interrupted:
        """The error to end with, once everything is saved: exit code 130 for SIGINT, 143 for SIGTERM."""
        error = Interrupted(f"stopped by {signal.Signals(self.signal).name} after a whole step", fix=resume_with)
        error.exit_code = 128 + self.signal
        return error
