"""Files: check that a path may be opened, read bytes at any offset, unpack compressed ones.

    path -> check_path -> FileBytes
    rows.jsonl.gz, rows.parquet -> TempCopy

Pipes and devices are refused before they are opened, because they could block or never end. URLs
are refused: data is downloaded from the hub alone, which names each file by its hash
(session/hub_data.py).

Neither gzip nor Parquet allows random access, so such a file is decompressed once into a temporary
file: every row is one read, memory stays flat, and no cache can become stale. It has no name, so it
disappears with the process, however that ends. A file that decompresses to far more than text can
is refused."""

from __future__ import annotations

import difflib
import gzip
import json
import math
import os
import re
import stat
import tempfile
import weakref
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.core.atomic import disk_errors, require_disk_space
from tunesmith.core.errors import DiskError, InputError, raise_if_machine_failed, read_errors
from tunesmith.core.hub_names import is_hub_path
from tunesmith.core.types import Json

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


# ---------------------------------------------------------------- files as they are

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


# ---------------------------------------------------------------- Parquet

# Row groups are decoded in order, a few hundred rows at a time. Binary columns (images, audio) are
# dropped: only text is trained. Inside a struct Parquet cannot tell a missing key from null, so a
# null there is a missing key. Numbers that are not finite (how pandas writes a missing value)
# become null; dates and decimals become strings.

BATCH_ROWS = 256  # decoded at a time


def unpack_parquet(path: Path) -> TempCopy:
    """Write the rows of a Parquet file as JSON Lines into a temporary file.

    Raises InputError if pyarrow is missing, or the file is damaged or has no text column."""
    where = str(path)
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        fix = "pip install '.[parquet]' in tunesmith's folder, or convert the file to .jsonl"
        raise InputError("reading Parquet files needs pyarrow", where=where, fix=fix) from None
    temp_copy = TempCopy(path)
    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            for row in _iter_rows(file, where):
                temp_copy.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except (pyarrow.ArrowException, OSError) as error:
        raise_if_machine_failed(error, where)
        message = f"damaged Parquet file: {' '.join(str(error).split()):.200}"
        raise InputError(message, where=where, fix="download or write it again") from None
    except UnicodeDecodeError as error:
        message = f"a text is not UTF-8: {error}"
        raise InputError(message, where=where, fix="write the file again") from None
    return temp_copy


def _iter_rows(file: Any, where: str) -> Iterator[Json]:
    names = [field.name for field in file.schema_arrow if not _has_binary(field.type)]
    if not names:
        fix = "write the texts as string columns"
        raise InputError("no column has text", where=where, fix=fix)
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        message = f"two columns have the name {duplicate!r}"
        raise InputError(message, where=where, fix="rename one of them")
    names_by_column = _read_class_names(file.schema_arrow.metadata)
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
        for row in batch.to_pylist():
            for name, class_names in names_by_column.items():
                row[name] = _name_class(row.get(name), class_names)
            yield {name: _to_json_value(value) for name, value in row.items()}


def _read_class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return column -> names of its classes, as `datasets` writes them into a schema; {} if the
    metadata are not valid."""
    names: dict[str, list[str]] = {}
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        for column, feature in features.items():
            if feature["_type"] == "ClassLabel":
                names[column] = list(map(str, feature["names"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return names


def _name_class(value: Any, class_names: Sequence[str]) -> Any:
    """Return the name of a class; None for -1, by which the hub marks a row without a label."""
    if not isinstance(value, int) or value >= len(class_names):
        return value
    return class_names[value] if value >= 0 else None


def _has_binary(kind: Any) -> bool:
    """Tell whether an Arrow type is binary, or nests a binary type."""
    import pyarrow.types as kinds

    if (
        kinds.is_binary(kind)
        or kinds.is_large_binary(kind)
        or kinds.is_fixed_size_binary(kind)
        or kinds.is_binary_view(kind)
    ):
        return True
    return any(_has_binary(kind.field(i).type) for i in range(kind.num_fields))


def _to_json_value(value: Any) -> Any:
    """Convert an Arrow value to a JSON value."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _to_json_value(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(inner) for inner in value]
    return str(value)
