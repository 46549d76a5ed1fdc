"""Regular files: check that a path may be opened, and read bytes at any offset.

    path -> check_path -> FileBytes

Pipes and devices are refused before they are opened, because they could block or never end. URLs
are refused: data is downloaded from the hub alone, which names each file by its hash
(session/hub_data.py)."""

from __future__ import annotations

import difflib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunesmith.core.errors import DiskError, InputError, raise_if_machine_failed, read_errors
from tunesmith.core.hub_names import is_hub_path

_URL = re.compile(r"(?:^|/)([a-z][a-z0-9+]+):/+(.+)")  # pathlib collapses the second slash


@dataclass(frozen=True)
class FileBytes:
    """A file that any thread may read; reading it after it has changed is an error."""

    path: Path
    stamp: tuple[int, int]  # size in bytes, modification time in ns

    def open_binary(self) -> BinaryIO:
        """Open the file for reading from the start."""
        return self.path.open("rb")

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes from offset `start`. Raises InputError if the file has changed."""
        where = str(self.path)
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise_if_machine_failed(error, where)
            message = f"the file can no longer be read: {error.strerror}"
            raise InputError(message, where=where, fix="restore it and rerun the command") from None
        try:
            if get_stamp(os.fstat(handle)) != self.stamp:
                raise InputError(
                    "the file changed while it was in use", where=where, fix="rerun the command"
                )
            with read_errors(where):
                return os.pread(handle, count, start)
        finally:
            os.close(handle)


def get_stamp(status: os.stat_result) -> tuple[int, int]:
    """Return (size in bytes, modification time in ns), by which a change is noticed."""
    return status.st_size, status.st_mtime_ns


def check_path(path: Path) -> os.stat_result:
    """Return the status of a readable file or folder. Raises InputError for anything else, and
    DiskError without permission."""
    where = str(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _build_missing_error(path) from None
    except OSError as error:
        raise_if_machine_failed(error, where)
        message = f"cannot be opened: {error.strerror}"
        raise InputError(message, where=where, fix="check the path") from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise InputError("not a regular file", where=where, fix="copy the data into a file first")
    if not os.access(path, os.R_OK):
        raise DiskError("no permission to read this", where=where, fix=f"chmod u+r {path}")
    return status


def _build_missing_error(path: Path) -> InputError:
    if path.is_symlink():
        message = f"broken link: {os.readlink(path)} does not exist"
        fix = "restore that file, or remove the link"
        return InputError(message, where=str(path), fix=fix)
    if url := _URL.search(str(path)):
        where = f"{url[1]}://{url[2]}"
        if is_hub_path(path):
            message = "data sets of the hub are read as data, eval_data and test_data of a recipe"
            return InputError(message, where=where, fix="name a file here")
        message = "this is a URL: data is downloaded from the hub only (hf://org/name)"
        fix = "download it yourself, check it, and pass the file"
        return InputError(message, where=where, fix=fix)
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    fix = f"did you mean {path.parent / close[0]}?" if close else "check the path"
    return InputError("no such file", where=str(path), fix=fix)
