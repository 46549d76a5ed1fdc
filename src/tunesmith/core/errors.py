"""The errors of tunesmith and their exit codes.

    TunesmithError
    |- InputError      2   the user's input: recipe, data, model folder
    |- MachineError    3   the machine: memory, network
    |  `- SharedMachineError  3   what every other run here would meet, too: too many open files
    |     `- DiskError        3   its disk and the permissions there
    |- GateError       4   a gate failed: preflight, guard, repeated NaN, parity
    `- Interrupted   130   stopped by a signal; the run can be resumed (143 for SIGTERM)

An error says what is wrong, where (file:line, row id or recipe key) and what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from errno import (
    EACCES,
    EDQUOT,
    EIO,
    EISDIR,
    ELOOP,
    EMFILE,
    ENAMETOOLONG,
    ENFILE,
    ENOENT,
    ENOMEM,
    ENOSPC,
    ENOTDIR,
    ENXIO,
    EPERM,
    EROFS,
    ESTALE,
    ETIMEDOUT,
)

from tunesmith.core.formatting import escape_controls

DENIED_ERRNOS = (EACCES, EPERM, EROFS)  # another folder helps
# errno of a failing disk or mount, a machine without memory, or missing rights: not the fault of
# the input
MACHINE_ERRNOS = (
    *(EIO, ENXIO, ESTALE, ETIMEDOUT, ENOMEM, ENOSPC, EDQUOT, EMFILE, ENFILE),
    *DENIED_ERRNOS,
)
# errno of a file that is missing, or is something else, where a verb reads one
PATH_ERRNOS = (ENOENT, ENOTDIR, EISDIR, ELOOP, ENAMETOOLONG)
LINE_BREAK = re.compile(r"\n(?!  )")  # in a quoted name: the lines of a list are indented
DISK_FIX = "check the disk and its connection, then run the command again or resume the run"
OTHER_FIXES = {
    ENOSPC: "free some disk space",
    EDQUOT: "free some disk space: the quota is used up",
    EROFS: "mount the disk writable, or choose another folder",
    EMFILE: "raise the limit of open files (ulimit -n)",
    ENFILE: "close other programs: too many files of this machine are open",
    ENOMEM: "close other programs: the memory is full",
    EACCES: "give this user the permission (chmod, chown), or use a copy that it may read",
    EPERM: "give this user the permission (chmod, chown), or use a copy that it may read",
}


class TunesmithError(Exception):
    """Base class of the errors that tunesmith raises on purpose. `fix` is what to try next.

    As text, control characters and line breaks of the quoted input are visible; the attributes hold
    it as it is. Lines of a message that lists things begin with two spaces."""

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        prefix = f"{escape_controls(self.where, keep='')}: " if self.where else ""
        suffix = f"\n  fix: {self.fix}" if self.fix else ""
        line_break = escape_controls("\n", keep="")
        text = LINE_BREAK.sub(lambda _: line_break, f"{self.message}{suffix}")
        return prefix + escape_controls(text)


class InputError(TunesmithError):
    exit_code = 2


class MachineError(TunesmithError):
    exit_code = 3


class SharedMachineError(MachineError):
    """Any other run here would fail in the same way, as with too many open files: sweeps stop."""


class DiskError(SharedMachineError):
    """The disk, or the permissions there."""


class GateError(TunesmithError):
    exit_code = 4


class Interrupted(TunesmithError):
    exit_code = 130


# errno of what is no matter of the disk
OTHER_KINDS: dict[int, type[MachineError]] = {
    ENOMEM: MachineError,  # a smaller run may fit
    EMFILE: SharedMachineError,
    ENFILE: SharedMachineError,
}


def to_machine_error(error: OSError, message: str, where: object = "") -> MachineError:
    """Convert an error of a disk, a mount or the memory, with what helps against it."""
    fix = OTHER_FIXES.get(error.errno or 0, DISK_FIX)
    text = f"{message}: {error.strerror or error}"
    kind = OTHER_KINDS.get(error.errno or 0, DiskError)
    return kind(text, where=str(where or error.filename or ""), fix=fix)


def to_path_error(error: OSError) -> InputError:
    """Convert an error about a file that is missing or no file."""
    where = str(error.filename or "")
    fix = "restore the file, or check the path"
    return InputError(f"cannot be read: {error.strerror}", where=where, fix=fix)


def raise_if_machine_failed(error: Exception, where: object) -> None:
    """Raise MachineError if a file could not be read for a reason that is not in the file."""
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        raise to_machine_error(error, "cannot be read", where) from error


@contextmanager
def read_errors(where: object) -> Generator[None]:
    """Name the file in an error of the disk: the system names none if an open file fails."""
    try:
        yield
    except OSError as error:
        raise_if_machine_failed(error, where)
        raise
