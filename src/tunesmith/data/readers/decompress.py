"""Packed files, unpacked once into a temporary file, so that rows can be read in any order.

    rows.jsonl.gz, rows.parquet -> Spool

Neither kind can be read from the middle: gzip has to be decompressed from the start, and a row of a
Parquet file costs the decoding of its whole row group. A temporary file makes every row one read,
keeps memory flat, needs no cache that could grow stale, and has no name: it is gone when the
process is, however that ends. What unpacks to far more than a text can be packed to is refused on
the way."""

from __future__ import annotations

import gzip
import os
import tempfile
import weakref
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tunesmith.core.atomic import disk_errors, require_disk_space
from tunesmith.core.errors import InputError, MachineError

MAX_GROWTH = 200  # times the size of the packed file; text packs to a tenth or so
UNCHECKED_BYTES = 64 * 2**20  # bytes that any file may unpack to
MIN_FREE_BYTES = 2**30  # bytes of the disk that stay free
DISK_CHECK_BYTES = 64 * 2**20  # bytes between two looks at it
CHUNK_BYTES = 2**20


class TempCopy:
    """An unnamed temporary file: written once, then read from any place and thread."""

    def __init__(self, source: Path, max_bytes: int | None = None) -> None:
        """`source`: what it is made from; it may take `most` bytes, or what a packed file may
        unpack to."""
        self._source, self._next_check_bytes = source, DISK_CHECK_BYTES
        self._max_bytes = (
            max(UNCHECKED_BYTES, MAX_GROWTH * source.stat().st_size)
            if max_bytes is None
            else max_bytes
        )
        self._folder = Path(
            os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else "/tmp")
        )
        with self._disk_errors():
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - it lives as long as the spool
        weakref.finalize(self, self._file.close)

    def write(self, content: bytes) -> None:
        """Raises InputError when the file grows absurdly, MachineError when there is no room for
        it."""
        size = self._file.tell() + len(content)
        if size > self._max_bytes:
            message = f"it unpacks to more than {MAX_GROWTH} times its size: text does not"
            raise InputError(
                message, where=str(self._source), fix="unpack it yourself, and look at it first"
            )
        with self._disk_errors():
            if size > self._next_check_bytes:
                require_disk_space(self._folder, DISK_CHECK_BYTES + MIN_FREE_BYTES)
                self._next_check_bytes = size + DISK_CHECK_BYTES
            self._file.write(content)

    def flush(self) -> None:
        """What was written can be read."""
        with self._disk_errors():
            self._file.flush()

    def open_binary(self) -> BinaryIO:
        """The whole content, from the start."""
        self.flush()
        file = open(self._file.fileno(), "rb", closefd=False)  # noqa: SIM115 - it is the caller's
        file.seek(0)
        return file

    def read(self, start: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, start)

    @contextmanager
    def _disk_errors(self) -> Generator[None]:
        try:
            with disk_errors(self._folder):
                yield
        except MachineError as error:
            fix = "free some room, or set TMPDIR to a folder on another disk"
            raise MachineError(
                f"{error.message}, for a copy of {self._source}", where=error.where, fix=fix
            ) from error


def gunzip(path: Path) -> TempCopy:
    """The content of a gzip file. Raises InputError if it is damaged or a bomb."""
    temp_copy = TempCopy(path)
    try:
        with gzip.open(path, "rb") as packed:
            for chunk in iter(partial(packed.read, CHUNK_BYTES), b""):
                temp_copy.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"not a whole gzip file: {error}"
        raise InputError(message, where=str(path), fix="fetch or write the file again") from None
    return temp_copy
