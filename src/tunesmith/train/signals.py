"""SIGINT and SIGTERM as a request to stop where nothing is lost.

    with GracefulStop() as stop:
        with stop.immediate(): ...                            a signal stops this at once
        for event in training: stop.raise_if_requested()      elsewhere the request waits
    stop.is_joint = True                                      from now on it always waits

Either way the run ends with Interrupted. A request that waits is answered by a line of progress. A
second signal has its default effect, unless the process is one of several ranks: a launcher sends
one more than the user did. Outside the main thread no signal is caught: Python allows
handlers there only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

from tunesmith.core.errors import Interrupted
from tunesmith.core.progress_log import logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """Catch signals; `signal_number` is 0 until one arrives.

    `resume_hint` tells the user what to do next, and may change on the way. With `is_patient`,
    further signals have no effect. `is_joint`: other ranks compute with this one, and wait for what
    it has to say, so that nothing is stopped in the middle."""

    def __init__(self, resume_hint: str = "", *, is_patient: bool = False) -> None:
        self.signal_number = 0
        self.is_patient = is_patient
        self.is_joint = False
        self.resume_hint = resume_hint
        self._is_immediate = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            return
        if not self.is_patient:
            self.__exit__()
        self.signal_number = number
        if self._is_immediate and not self.is_joint:
            self.raise_if_requested()
        work = "this step or evaluation" if self.is_joint else "this step"
        second = "" if self.is_patient else "; a second signal stops at once"
        with suppress(RuntimeError):  # the signal arrived while a line was being written
            logger.info("finishing %s before stopping%s", work, second)

    def raise_if_requested(self, *, elsewhere: bool = False) -> None:
        """Raise Interrupted if a signal has arrived; exit code 130 for SIGINT, 143 for SIGTERM.

        A signal that has arrived `elsewhere`, at another rank, counts as SIGTERM."""
        if elsewhere and not self.signal_number:
            self.signal_number = signal.SIGTERM
        if self.signal_number:
            name = signal.Signals(self.signal_number).name
            key = " (Ctrl-C)" if self.signal_number == signal.SIGINT else ""
            error = Interrupted(f"stopped by {name}{key}", fix=self.resume_hint)
            error.exit_code = 128 + self.signal_number
            raise error

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise Interrupted at once if a signal has arrived and, without `is_joint`, as soon as one
        arrives."""
        self._is_immediate = True
        try:
            self.raise_if_requested()
            yield
        finally:
            self._is_immediate = False
