"""Compressed files, decompressed once into a temporary file so that rows can be read in any order.

    rows.jsonl.gz, rows.parquet -> TempCopy

Neither format allows random access: gzip has to be decompressed from the start, and one row of a
Parquet file costs the decoding of its row group. A temporary file makes every row one read, keeps
memory flat and needs no cache that could become stale. It has no name, so it disappears with the
process, however that ends. A file that decompresses to far more than text can is refused."""

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
from tunesmith.core.errors import DiskError, InputError

MAX_GROWTH = 200  # decompressed over compressed size; text reaches about 10
UNCHECKED_BYTES = 64 * 2**20  # any file may decompress to this size
MIN_FREE_BYTES = 2**30  # disk space that stays free
DISK_CHECK_BYTES = 64 * 2**20  # bytes written between two checks of the disk space
CHUNK_BYTES = 2**20


class TempCopy:
    """An unnamed temporary file: written once, then read at any offset from any thread."""

    def __init__(self, source: Path, max_bytes: int | None = None) -> None:
        """Create the copy of `source`. Default for `max_bytes`: 64 MiB or 200 times its size."""
        if max_bytes is None:
            max_bytes = max(UNCHECKED_BYTES, MAX_GROWTH * source.stat().st_size)
        default_folder = "/var/tmp" if os.path.isdir("/var/tmp") else "/tmp"
        self._source = source
        self._max_bytes = max_bytes
        self._next_check_bytes = DISK_CHECK_BYTES
        self._folder = Path(os.environ.get("TMPDIR") or default_folder)
        with self._disk_errors():
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)

    def write(self, content: bytes) -> None:
        """Append bytes. Raises InputError over the size limit, DiskError if the disk is full."""
        size = self._file.tell() + len(content)
        if size > self._max_bytes:
            raise InputError(
                f"decompresses to more than {MAX_GROWTH} times its size: this is not text",
                where=str(self._source),
                fix="decompress it yourself and check the content first",
            )
        with self._disk_errors():
            if size > self._next_check_bytes:
                require_disk_space(self._folder, DISK_CHECK_BYTES + MIN_FREE_BYTES)
                self._next_check_bytes = size + DISK_CHECK_BYTES
            self._file.write(content)

    def flush(self) -> None:
        """Make all written bytes readable."""
        with self._disk_errors():
            self._file.flush()

    def open_binary(self) -> BinaryIO:
        """Open the copy for reading from the start."""
        self.flush()
        file = open(self._file.fileno(), "rb", closefd=False)  # noqa: SIM115 - the caller's
        file.seek(0)
        return file

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes from offset `start`."""
        return os.pread(self._file.fileno(), count, start)

    @contextmanager
    def _disk_errors(self) -> Generator[None]:
        try:
            with disk_errors(self._folder):
                yield
        except DiskError as error:
            message = f"{error.message}, for a temporary copy of {self._source}"
            fix = "free disk space, or set TMPDIR to a folder on another disk"
            raise DiskError(message, where=error.where, fix=fix) from error


def gunzip(path: Path) -> TempCopy:
    """Decompress a gzip file. Raises InputError if it is damaged or a decompression bomb."""
    temp_copy = TempCopy(path)
    try:
        with gzip.open(path, "rb") as packed:
            for chunk in iter(partial(packed.read, CHUNK_BYTES), b""):
                temp_copy.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"damaged gzip file: {error}"
        raise InputError(message, where=str(path), fix="download or write it again") from None
    return temp_copy
