"""Make control characters visible in what libraries write to stderr: log records, warnings and
tracebacks, which quote configs, rows and file names.

    escape_library_output()    the first call of every process whose stderr may be a terminal

Left out: what tunesmith itself writes (cli/output.py)."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

from tunesmith.core.formatting import escape_controls


def escape_library_output() -> None:
    """Escape log records, warnings and tracebacks from now on."""
    logging.setLogRecordFactory(_EscapedRecord)
    warnings.formatwarning = _format_warning
    sys.excepthook = _write_traceback
    threading.excepthook = _write_thread_traceback


class _EscapedRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return escape_controls(super().getMessage())

    def __setattr__(self, name: str, value: Any) -> None:
        """Escape the traceback too, which a formatter stores here as text."""
        is_traceback = name == "exc_text" and isinstance(value, str)
        super().__setattr__(name, escape_controls(value) if is_traceback else value)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,  # noqa: ARG001 - the signature of the standard library
) -> str:
    return escape_controls(f"{filename}:{lineno}: {category.__name__}: {message}\n")


def _write_traceback(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    lines = traceback.format_exception(kind, error, trace)
    sys.stderr.write(escape_controls("".join(lines)))


def _write_thread_traceback(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "unknown"
        sys.stderr.write(escape_controls(f"Exception in thread {name}:\n"))
        _write_traceback(args.exc_type, args.exc_value, args.exc_traceback)
