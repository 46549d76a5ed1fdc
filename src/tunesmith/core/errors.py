"""The errors of tunesmith and their exit codes.

    TunesmithError
    |- InputError      2   the user's input: recipe, data, model folder
    |- MachineError    3   the machine: memory, disk, permissions, network
    |- GateError       4   a gate failed: preflight, guard, repeated NaN, parity
    `- Interrupted   130   stopped by a signal; the run can be resumed (143 for SIGTERM)

An error says what is wrong, where (file:line, row id or recipe key) and what to do about it.
"""

from __future__ import annotations

import re
from errno import EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, ENXIO, EROFS, ESTALE, ETIMEDOUT

from tunesmith.core.formatting import escape_controls

# errno of a failing disk or mount, or of a machine without memory: not the fault of the input
MACHINE_ERRNOS = (EIO, ENXIO, ESTALE, ETIMEDOUT, ENOMEM, ENOSPC, EDQUOT, EROFS, EMFILE, ENFILE)
LINE_BREAK = re.compile(r"\n(?!  )")  # in a quoted name: the lines of a list are indented
DISK_FIX = "check the disk and its connection, then run the command again or resume the run"


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


class GateError(TunesmithError):
    exit_code = 4


class Interrupted(TunesmithError):
    exit_code = 130
