"""Data files as rows, one at a time.

    path -> Source (where each row begins and ends) -> Row (id, data)

`open_source` walks through the bytes and keeps a few numbers a row, so any row can be read later,
in any order, while the file itself is never held. A suffix stands for a container: where its rows
are is found in `places.py`, what their bytes say is decided in `strict.py`. Packed files are
unpacked first (`spool.py`, `parquet.py`); a folder of texts reads like a source too (`folder.py`).
Which columns mean what is decided in `formats.py`."""

from __future__ import annotations

import hashlib
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, Row
from tunesmith.data.readers.decode import (
    SourceLocation,
    decode_json,
    decode_record,
    decode_text,
    read_header,
)
from tunesmith.data.readers.decompress import gunzip
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.data.readers.local_file import FileBytes, check_path, get_stamp
from tunesmith.data.readers.parquet import unpack_parquet
from tunesmith.data.readers.row_index import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    MAX_ROW_BYTES,
    RowSpan,
    find_elements,
    find_lines,
    find_records,
    find_single_row,
)
from tunesmith.data.readers.text_folder import TextFolder, open_folder

Decoder = Callable[[bytes, SourceLocation], Json]
RowIndex = tuple[Decoder, Iterator[RowSpan]]  # what a row says, and where the rows are
ContainerReader = Callable[[BinaryIO, str], RowIndex]


class ByteSource(Protocol):
    """What rows are read from: a file, or a temporary one."""

    def open_binary(self) -> BinaryIO: ...

    def read(self, start: int, count: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Source:
    """A data file and where its rows are. `row(i)` reads row i, from any thread."""

    path: Path
    name: str  # the first half of a row's id
    content: ByteSource
    decode: Decoder
    starts: array[int]  # byte offset of each row
    ends: array[int]
    lines: array[int]  # line number of each row, from 1; of a Parquet file its row number
    columns: array[int]  # of each row of a JSON array; empty where every row begins its line
    fingerprint: str  # sha256 over the bytes of the file

    def __len__(self) -> int:
        return len(self.starts)

    def get_id(self, index: int) -> str:
        """`name:line`; `name[i]` in a JSON array, where several rows can begin on one line."""
        return f"{self.name}[{index}]" if self.columns else f"{self.name}:{self.lines[index]}"

    def get_location(self, index: int) -> SourceLocation:
        column = self.columns[index] if self.columns else 1
        return SourceLocation(self.name, self.lines[index], column, self.starts[index])

    def read_row(self, index: int) -> Row:
        """Read and decode one row. Raises BadRow that names file and line, InputError if the file
        has changed."""
        num_bytes = self.ends[index] - self.starts[index]
        if num_bytes > MAX_ROW_BYTES:
            message, fix = (
                f"the row has {num_bytes:,} bytes, at most 64 MB are read",
                "split or drop this row",
            )
            raise InvalidRow("too long", message, where=str(self.get_location(index)), fix=fix)
        return Row(
            self.get_id(index),
            self.decode(self.content.read(self.starts[index], num_bytes), self.get_location(index)),
        )

    def read_raw(self, index: int, max_bytes: int) -> tuple[bytes, int]:
        """The first bytes of a row as they stand in the file, and how many it has."""
        num_bytes = self.ends[index] - self.starts[index]
        return self.content.read(self.starts[index], min(max_bytes, num_bytes)), num_bytes


def open_source(path: str | Path, *, name: str = "") -> Source | TextFolder:
    """Find the rows of a file, or of a folder of texts, without decoding them.

    `name` goes into the row ids; the file's own name by default. Raises InputError for a missing,
    empty, special or unreadable file, an unknown suffix, and a file whose rows cannot be told
    apart."""
    path = Path(path)
    name = name or path.name
    status = check_path(path)
    if stat.S_ISDIR(status.st_mode):
        return open_folder(path, name)
    content, container = _open_content(path, FileBytes(path, get_stamp(status)))
    starts, ends, lines, columns = array("q"), array("q"), array("q"), array("q")
    with content.open_binary() as file:
        _check_signature(file, path)
        decode, row_spans = container(file, name)
        for row_span in row_spans:
            starts.append(row_span.start)
            ends.append(row_span.end)
            lines.append(row_span.line)
            if row_span.column:
                columns.append(row_span.column)
    if not starts:
        message = "the file is empty" if status.st_size == 0 else "the file holds no row"
        raise InputError(message, where=str(path), fix="write at least one row into it")
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(path, name, content, decode, starts, ends, lines, columns, fingerprint)


def _open_content(path: Path, file: FileBytes) -> tuple[ByteSource, ContainerReader]:
    """The bytes that rows are read from, unpacked if they are packed, and how."""
    suffix, inner_suffix = path.suffix.lower(), Path(path.stem).suffix.lower()
    if suffix == ".parquet":
        return unpack_parquet(path), read_json_lines
    if suffix == ".gz" and inner_suffix in CONTAINERS:
        return gunzip(path), CONTAINERS[inner_suffix]
    if suffix in CONTAINERS:
        return file, CONTAINERS[suffix]
    supported = (
        f"{', '.join(CONTAINERS)} (each also as .gz), .parquet, or a folder of .txt and .md files"
    )
    message = f"cannot read {inner_suffix + suffix if suffix == '.gz' else suffix or 'files without a suffix'}"
    raise InputError(message, where=str(path), fix=f"use {supported}")


def _check_signature(file: BinaryIO, path: Path) -> None:
    """A packed file under the name of a text would only be told as thousands of rows that are not
    UTF-8."""
    head = file.read(4)
    file.seek(0)
    for signature, kind in (
        (b"\x1f\x8b", "gzip"),
        (b"PAR1", "Parquet"),
        (b"PK\x03\x04", "zip, as .xlsx and .docx are"),
    ):
        if head.startswith(signature):
            fix = "give it the suffix of what it is, or unpack it"
            raise InputError(f"the content is {kind}, not text", where=str(path), fix=fix)


# ---------------------------------------------------------------- containers


def read_json_lines(file: BinaryIO, name: str) -> RowIndex:  # noqa: ARG001 - every container has this signature
    """One JSON object a line."""
    return decode_json, find_lines(file)


def read_json_file(file: BinaryIO, name: str) -> RowIndex:
    """One JSON array of objects; or else one object a line."""
    head = file.read(CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    file.seek(0)
    return decode_json, find_elements(file, name) if head.startswith(b"[") else find_lines(file)


def read_table(file: BinaryIO, name: str, *, delimiter: str) -> RowIndex:
    """CSV with a header row; a quoted field may hold line ends."""
    row_spans = find_records(file, delimiter)
    if (first_span := next(row_spans, None)) is None:
        return decode_text, row_spans
    position = file.tell()
    file.seek(first_span.start)
    header = read_header(
        file.read(first_span.end - first_span.start),
        SourceLocation(name, first_span.line, 1, first_span.start),
        delimiter,
    )
    file.seek(position)
    return partial(decode_record, header=header, delimiter=delimiter), row_spans


def read_text_file(file: BinaryIO, name: str) -> RowIndex:  # noqa: ARG001
    """The whole file is one text."""
    return decode_text, find_single_row(file)


CONTAINERS: dict[str, ContainerReader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_file,
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t"),
    ".txt": read_text_file,
    ".md": read_text_file,
}
