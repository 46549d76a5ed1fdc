"""Take the working directory off Python's path under `python -m tunesmith`.

`-m` puts it first, so that a file `yaml.py` in a folder of a stranger would run in place of the
package. The package imports this module before any other; only modules that Python loads at its
start can come earlier. The `tunesmith` command and `python -P -m tunesmith` never have it there."""

from __future__ import annotations

import os
import sys


def is_module_run(argv: list[str], program: list[str]) -> bool:
    """Return whether Python is about to run tunesmith with -m; `argv` is then not set yet."""
    if argv[:1] != ["-m"] or "-m" not in program:
        return False
    module = program[program.index("-m") + 1 :][:1]
    return bool(module) and module[0].partition(".")[0] == "tunesmith"


def drop_working_directory(path: list[str], cwd: str, package_parent: str) -> list[str]:
    """Return a search path without the working directory, unless tunesmith itself is there."""
    if os.path.realpath(cwd) == os.path.realpath(package_parent):
        return path
    return [entry for entry in path if entry and os.path.realpath(entry) != os.path.realpath(cwd)]


if is_module_run(sys.argv, sys.orig_argv):
    sys.path[:] = drop_working_directory(
        sys.path, os.getcwd(), os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    )
