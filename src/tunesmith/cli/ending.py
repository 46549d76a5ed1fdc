"""How a verb ends: what signals do, how errors are printed, and the exit code.

In: an error or a signal. Out: a line on stderr, or one JSON object with --json, and the end of the
process. Left out: which verb runs (app.py)."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn

import typer

from tunesmith import __version__
from tunesmith.cli.output import print_result, write_stderr
from tunesmith.core.errors import InputError, MachineError, TunesmithError

# click's own class, or typer's copy of it
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
CLOSED_PIPE_CODE = 128 + signal.SIGPIPE
INTERRUPTED_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class ErrorOutput:
    """The object under `error` that --json prints when a verb fails."""

    kind: str
    message: str
    where: str
    fix: str
    exit_code: int


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM pass through every `finally`, so that nothing temporary stays.

    Training has handlers of its own (train/signals.py). Python allows them in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _exit_on_sigterm}
    previous = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if previous[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_on_sigterm(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def end_process(code: int) -> None:
    """End the process without the interpreter's own end, which takes 60 ms, longer after torch is
    loaded, and waits for threads."""
    ignore_signals()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a closed pipe
            stream.flush()
    os._exit(code)


def ignore_signals() -> None:
    """Let no signal change how a verb ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_input_error(usage: Any) -> InputError:
    """Convert click's usage error, so that it prints like every other error."""
    verb = usage.ctx.command_path if usage.ctx else "tunesmith"
    return InputError(usage.format_message(), where="command line", fix=f"see `{verb} --help`")


def exit_with_error(error: TunesmithError, *, as_json: bool) -> NoReturn:
    if as_json:
        # The kinds that scripts tell apart: not the narrower ones of MachineError.
        kinds = (kind for kind in type(error).__mro__ if TunesmithError in kind.__bases__)
        output = ErrorOutput(
            next(kinds, TunesmithError).__name__,
            error.message,
            error.where,
            error.fix,
            error.exit_code,
        )
        with suppress(OSError):  # stdout may be what failed
            print_result({"error": output}, as_json=True)
    with suppress(OSError):  # so may stderr, as in `2>&1 | head`
        write_stderr(f"error: {error}\n")
    sys.exit(error.exit_code)


def exit_on_machine_error(error: MemoryError | RuntimeError, *, as_json: bool) -> None:
    """End the verb if it is an error of memory or of a GPU."""
    explained: MachineError | None = None
    if "torch" in sys.modules:  # which few verbs import
        from tunesmith.model.machine_errors import explain_error

        explained = explain_error(error)
    elif isinstance(error, MemoryError):
        fix = "free memory used by other programs, or use fewer rows"
        explained = MachineError("out of memory", fix=fix)
    if explained is not None:
        exit_with_error(explained, as_json=as_json)


def explain_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    write_stderr("".join(traceback.format_exception(kind, error, trace)))
    write_stderr(
        f"this is a bug in tunesmith {__version__}: please report it with the lines above\n"
    )
