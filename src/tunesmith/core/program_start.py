"""What comes before any other import when tunesmith is the program, not a library.

The working directory leaves Python's path: `python -m tunesmith` puts it first, so that a file
`yaml.py` in a folder of a stranger would run in place of the package. Only modules that Python
loads at its start can come earlier. The `tunesmith` command and `python -P -m tunesmith` never have
it there.

SIGINT and SIGTERM end the process at once: nothing has begun that could be lost, and a traceback of
half an import helps nobody. From its first line on, `cli/app.py` handles them.

A standard stream that the caller has closed becomes /dev/null. Else the first file that is opened
gets its number, and what libraries print ends up in that file.

The garbage collector of the `tunesmith` command starts with its verb: imports leave a hundred
thousand objects that live to the end, and going through them again and again is a tenth of the time
to start."""

from __future__ import annotations

import gc
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_module_run(argv: list[str], program: list[str]) -> bool:
    """Return whether Python is about to run tunesmith with -m; `argv` is then not set yet."""
    if argv[:1] != ["-m"] or "-m" not in program:
        return False
    module = program[program.index("-m") + 1 :][:1]
    return bool(module) and module[0].partition(".")[0] == "tunesmith"


def is_command_run(argv: list[str]) -> bool:
    """Return whether this process is the `tunesmith` command."""
    name = os.path.basename(argv[0]) if argv else ""
    return name in ("tunesmith", "tunesmith.exe")


def drop_working_directory(path: list[str], cwd: str, package_parent: str) -> list[str]:
    """Return a search path without the working directory, unless tunesmith itself is there."""
    if os.path.realpath(cwd) == os.path.realpath(package_parent):
        return path
    return [entry for entry in path if entry and os.path.realpath(entry) != os.path.realpath(cwd)]


def end_at_once(number: int, _frame: object) -> None:
    """End as a shell expects it of a process that a signal ended: 130 or 143."""
    os._exit(128 + number)


def end_at_once_on_signals() -> None:
    """Install `end_at_once`, except for a signal that the caller of the process ignores."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_at_once)


def open_closed_streams() -> None:
    """Open /dev/null as each standard stream that is closed, in the order of their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - open to the end
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


if is_module_run(sys.argv, sys.orig_argv):
    sys.path[:] = drop_working_directory(
        sys.path, os.getcwd(), os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    )
if is_module_run(sys.argv, sys.orig_argv) or is_command_run(sys.argv):
    end_at_once_on_signals()
    open_closed_streams()
# not in the processes that the command starts, which have its arguments, and never reach its main()
if is_command_run(sys.argv) and sys.argv[0] in sys.orig_argv:
    gc.disable()
