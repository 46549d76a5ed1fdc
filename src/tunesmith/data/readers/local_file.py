"""Ordinary files: what may be opened at all, and bytes of it from any place.

    path -> check_path -> FileBytes

Pipes and devices are refused before they are opened, since they could block or never end. A URL is
refused: nothing is ever fetched from where data comes from."""

from __future__ import annotations

import difflib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunesmith.core.errors import InputError

_URL = re.compile(r"(?:^|/)([a-z][a-z0-9+]+):/+(.+)")  # a path has lost the second slash


@dataclass(frozen=True)
class FileBytes:
    """A file that may be read, from any thread; a change while it is in use is an error."""

    path: Path
    stamp: tuple[int, int]  # size and time of change

    def open_binary(self) -> BinaryIO:
        return self.path.open("rb")

    def read(self, start: int, count: int) -> bytes:
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            message = f"the file was readable before: {error.strerror}"
            raise InputError(
                message, where=str(self.path), fix="put it back and start again"
            ) from None
        try:
            if get_stamp(os.fstat(handle)) != self.stamp:
                raise InputError(
                    "the file changed while it was in use", where=str(self.path), fix="start again"
                )
            return os.pread(handle, count, start)
        finally:
            os.close(handle)


def get_stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def check_path(path: Path) -> os.stat_result:
    """The status of a file or folder that may be read. Raises InputError for anything else."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _build_missing_error(path) from None
    except OSError as error:
        raise InputError(
            f"cannot be opened: {error.strerror}", where=str(path), fix="check the path"
        ) from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise InputError(
            "is not an ordinary file", where=str(path), fix="copy the data into a file first"
        )
    if not os.access(path, os.R_OK):
        raise InputError("may not be read", where=str(path), fix=f"chmod u+r {path}")
    return status


def _build_missing_error(path: Path) -> InputError:
    if path.is_symlink():
        message = f"is a link to {os.readlink(path)}, which is not there"
        return InputError(message, where=str(path), fix="put that file back, or remove the link")
    if url := _URL.search(str(path)):
        address = f"{url[1]}://{url[2]}"
        fix = "download it yourself, look at it, and name the file"
        return InputError("this is a URL, and nothing is fetched from data", where=address, fix=fix)
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    fix = f"did you mean {path.parent / close[0]}?" if close else "check the path"
    return InputError("there is no such file", where=str(path), fix=fix)
