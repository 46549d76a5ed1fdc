"""Data files as rows, read one at a time.

    path -> open_source -> Source (byte range of each row) -> Row (id, data)

`open_source` scans the bytes once and stores a few numbers per row, so any row can be read later in
any order without holding the file in memory. The suffix names the container: `row_index.py` locates
its rows and `decode.py` decodes their bytes. Compressed files are unpacked first (`local_file.py`);
a folder of texts reads like a file (`text_folder.py`). Left out: the meaning of the columns
(formats/parse.py)."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from tunesmith.core.errors import InputError, read_errors
from tunesmith.core.types import Json, Row
from tunesmith.data.readers.decode import (
    SourceLocation,
    decode_json,
    decode_record,
    decode_text,
    read_header,
)
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.data.readers.local_file import (
    FileBytes,
    check_path,
    get_stamp,
    gunzip,
    unpack_parquet,
)
from tunesmith.data.readers.row_index import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    MAX_ROW_BYTES,
    MAX_TEXT_BYTES,
    RowSpan,
    find_elements,
    find_full_text,
    find_lines,
    find_records,
)
from tunesmith.data.readers.text_folder import TextFolder, open_folder

Decoder = Callable[[bytes, SourceLocation], Json]
RowIndex = tuple[Decoder, Iterator[RowSpan]]
ContainerReader = Callable[[BinaryIO, str], RowIndex]

# Without this check, a compressed file with a text suffix would give thousands of "not UTF-8" rows.
RENAME_FIX = "rename it to the suffix of its type, or unpack it"
UNPACK_FIX = "unpack it"
SIGNATURES = {
    b"\x1f\x8b": ("gzip", RENAME_FIX),
    b"PAR1": ("Parquet", RENAME_FIX),
    b"PK\x03\x04": ("zip (as .xlsx and .docx are)", UNPACK_FIX),
    b"\x28\xb5\x2f\xfd": ("zstd", UNPACK_FIX),
    b"\xfd7zXZ": ("xz", UNPACK_FIX),
    b"BZh91AY&SY": ("bzip2", UNPACK_FIX),
    b"ARROW1\0\0": ("Arrow", "convert it to Parquet or JSON Lines"),
    b"SQLite format 3\0": ("SQLite", "export its table as CSV"),
    b"version https://git-lfs.github.com/spec/": (
        "a pointer of Git LFS",
        "download the file itself: git lfs pull",
    ),
}
MAX_SIGNATURE_BYTES = max(map(len, SIGNATURES))


class ByteSource(Protocol):
    """Bytes that rows are read from: FileBytes or TempCopy."""

    def open_binary(self) -> BinaryIO: ...

    def read(self, start: int, count: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Source:
    """A data file and the byte range of each row; rows can be read from any thread."""

    path: Path
    name: str  # first part of the row ids
    content: ByteSource
    decode: Decoder
    starts: array[int]  # byte offset of each row
    ends: array[int]
    lines: array[int]  # line of each row, from 1; for Parquet the row number
    columns: array[int]  # column of each element of a JSON array; empty for other containers
    fingerprint: str  # sha256 of the file

    def __len__(self) -> int:
        return len(self.starts)

    def get_id(self, index: int) -> str:
        """Return `name:line`, or `name[i]` in a JSON array, where rows can share a line."""
        return f"{self.name}[{index}]" if self.columns else f"{self.name}:{self.lines[index]}"

    def get_location(self, index: int) -> SourceLocation:
        """Return where a row starts."""
        column = self.columns[index] if self.columns else 1
        return SourceLocation(self.name, self.lines[index], column, self.starts[index])

    def read_row(self, index: int) -> Row:
        """Read and decode one row. Raises InvalidRow, or InputError if the file has changed."""
        location = self.get_location(index)
        num_bytes = self.ends[index] - self.starts[index]
        max_bytes = MAX_TEXT_BYTES if self.decode is decode_text else MAX_ROW_BYTES
        if num_bytes > max_bytes:
            message = f"the row has {num_bytes:,} bytes; at most {max_bytes >> 20} MiB are read"
            fix = "split or remove this row"
            raise InvalidRow("too long", message, where=str(location), fix=fix)
        raw = self.content.read(self.starts[index], num_bytes)
        return Row(self.get_id(index), self.decode(raw, location))

    def get_num_bytes(self, index: int) -> int:
        """Return the length of a row in bytes."""
        return self.ends[index] - self.starts[index]

    def read_raw(self, index: int, max_bytes: int) -> tuple[bytes, int]:
        """Return (at most `max_bytes` bytes of a row, the length of the row in bytes)."""
        num_bytes = self.get_num_bytes(index)
        return self.content.read(self.starts[index], min(max_bytes, num_bytes)), num_bytes


def open_source(path: str | Path, *, name: str = "") -> Source | TextFolder:
    """Locate the rows of a file, or of a folder of texts, without decoding them.

    `name` becomes part of the row ids (default: the file name). Raises InputError for a missing,
    empty, special or unreadable file, an unknown suffix, and a file without separable rows."""
    path = Path(path)
    name = name or path.name
    status = check_path(path)
    with read_errors(path):
        if stat.S_ISDIR(status.st_mode):
            return open_folder(path, name)
        return _open_file(path, name, status)


def _open_file(path: Path, name: str, status: os.stat_result) -> Source:
    content, read_container = _open_content(path, FileBytes(path, get_stamp(status)))
    starts = array("q")
    ends = array("q")
    lines = array("q")
    columns = array("q")
    with content.open_binary() as file:
        _check_signature(file, path)
        decode, row_spans = read_container(file, name)
        for row_span in row_spans:
            starts.append(row_span.start)
            ends.append(row_span.end)
            lines.append(row_span.line)
            if row_span.column:
                columns.append(row_span.column)
    if not starts:
        message = "the file is empty" if status.st_size == 0 else "the file has no rows"
        raise InputError(message, where=str(path), fix="add at least one row")
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(path, name, content, decode, starts, ends, lines, columns, fingerprint)


def _open_content(path: Path, file: FileBytes) -> tuple[ByteSource, ContainerReader]:
    """Return the (unpacked) bytes of a file, and the reader for its container."""
    suffix = path.suffix.lower()
    inner_suffix = Path(path.stem).suffix.lower()
    if suffix == ".parquet":
        return unpack_parquet(path), read_json_lines
    if suffix == ".gz" and inner_suffix in CONTAINERS:
        return gunzip(path), CONTAINERS[inner_suffix]
    if suffix in CONTAINERS:
        return file, CONTAINERS[suffix]
    shown_suffix = inner_suffix + suffix if suffix == ".gz" else suffix
    supported = ", ".join(CONTAINERS)
    raise InputError(
        f"cannot read {shown_suffix or 'files without a suffix'}",
        where=str(path),
        fix=f"use {supported} (or any of them as .gz), .parquet, or a folder of .txt and .md files",
    )


def _check_signature(file: BinaryIO, path: Path) -> None:
    head = file.read(MAX_SIGNATURE_BYTES)
    file.seek(0)
    for signature, (kind, fix) in SIGNATURES.items():
        if head.startswith(signature):
            raise InputError(f"the content is {kind}, not text", where=str(path), fix=fix)


# ---------------------------------------------------------------- containers


def read_json_lines(file: BinaryIO, name: str) -> RowIndex:
    """Read JSON Lines: one object per line."""
    return decode_json, find_lines(file, name)


def read_json_file(file: BinaryIO, name: str) -> RowIndex:
    """Read one JSON array of objects, or else JSON Lines."""
    head = file.read(CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    file.seek(0)
    if head.startswith(b"["):
        return decode_json, find_elements(file, name)
    return decode_json, find_lines(file, name)


def read_table(file: BinaryIO, name: str, *, delimiter: str) -> RowIndex:
    """Read CSV with a header row; a quoted field may contain line breaks."""
    row_spans = find_records(file, delimiter, name)
    header_span = next(row_spans, None)
    if header_span is None:
        return decode_text, row_spans
    position = file.tell()
    file.seek(header_span.start)
    raw = file.read(header_span.end - header_span.start)
    location = SourceLocation(name, header_span.line, 1, header_span.start)
    header = read_header(raw, location, delimiter)
    file.seek(position)
    return partial(decode_record, header=header, delimiter=delimiter), row_spans


def read_text_file(file: BinaryIO, name: str) -> RowIndex:  # noqa: ARG001 - shared signature
    """Read the full file as one text."""
    return decode_text, find_full_text(file)


CONTAINERS: dict[str, ContainerReader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_file,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
    ".txt": read_text_file,
    ".md": read_text_file,
}
