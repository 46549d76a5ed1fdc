"""Data files as rows, one at a time.

    path -> Source (where each row begins and ends) -> Row (id, data)

`open_source` walks through the bytes and keeps a few numbers a row, so any row can be read later, in any order, while
the file itself is never held. A suffix stands for a container: where its rows are is found in `places.py`, what their
bytes say is decided in `strict.py`. Packed files are unpacked first (`spool.py`, `parquet.py`); a folder of texts reads
like a source too (`folder.py`). Which columns mean what is decided in `formats.py`.
"""

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
from tunesmith.data.readers.decode import Spot, decode_json, decode_record, decode_text, read_header
from tunesmith.data.readers.decompress import gunzip
from tunesmith.data.readers.invalid_row import BadRow
from tunesmith.data.readers.local_file import FileBytes, check_path, stamp
from tunesmith.data.readers.parquet import parquet_lines
from tunesmith.data.readers.row_index import (
    BYTE_ORDER_MARK,
    LONGEST_ROW,
    PIECE,
    Place,
    find_elements,
    find_lines,
    find_records,
    find_whole,
)
from tunesmith.data.readers.text_folder import Folder, open_folder

Decode = Callable[[bytes, Spot], Json]
Contents = tuple[Decode, Iterator[Place]]  # what a row says, and where the rows are
Container = Callable[[BinaryIO, str], Contents]


class Bytes(Protocol):
    """What rows are read from: a file, or a temporary one."""

    def opened(self) -> BinaryIO: ...

    def read(self, start: int, count: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Source:
    """A data file and where its rows are. `row(i)` reads row i, from any thread."""

    path: Path
    name: str  # the first half of a row's id
    content: Bytes
    decode: Decode
    starts: array[int]  # byte offset of each row
    ends: array[int]
    lines: array[int]  # line number of each row, from 1; of a Parquet file its row number
    columns: array[int]  # of each row of a JSON array; empty where every row begins its line
    fingerprint: str  # sha256 over the bytes of the file

    def __len__(self) -> int:
        return len(self.starts)

    def id(self, index: int) -> str:
        """`name:line`; `name[i]` in a JSON array, where several rows can begin on one line."""
        return f"{self.name}[{index}]" if self.columns else f"{self.name}:{self.lines[index]}"

    def spot(self, index: int) -> Spot:
        column = self.columns[index] if self.columns else 1
        return Spot(self.name, self.lines[index], column, self.starts[index])

    def row(self, index: int) -> Row:
        """Read and decode one row. Raises BadRow that names file and line, InputError if the file has changed."""
        count = self.ends[index] - self.starts[index]
        if count > LONGEST_ROW:
            what, fix = f"the row has {count:,} bytes, at most 64 MB are read", "split or drop this row"
            raise BadRow("too long", what, where=str(self.spot(index)), fix=fix)
        return Row(self.id(index), self.decode(self.content.read(self.starts[index], count), self.spot(index)))

    def raw(self, index: int, most: int) -> tuple[bytes, int]:
        """The first bytes of a row as they stand in the file, and how many it has."""
        count = self.ends[index] - self.starts[index]
        return self.content.read(self.starts[index], min(most, count)), count


def open_source(path: str | Path, *, name: str = "") -> Source | Folder:
    """Find the rows of a file, or of a folder of texts, without decoding them.

    `name` goes into the row ids; the file's own name by default. Raises InputError for a missing, empty, special or
    unreadable file, an unknown suffix, and a file whose rows cannot be told apart.
    """
    path = Path(path)
    name = name or path.name
    status = check_path(path)
    if stat.S_ISDIR(status.st_mode):
        return open_folder(path, name)
    content, container = _content(path, FileBytes(path, stamp(status)))
    starts, ends, lines, columns = array("q"), array("q"), array("q"), array("q")
    with content.opened() as file:
        _check_signature(file, path)
        decode, places = container(file, name)
        for place in places:
            starts.append(place.start)
            ends.append(place.end)
            lines.append(place.line)
            if place.column:
                columns.append(place.column)
    if not starts:
        what = "the file is empty" if status.st_size == 0 else "the file holds no row"
        raise InputError(what, where=str(path), fix="write at least one row into it")
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(path, name, content, decode, starts, ends, lines, columns, fingerprint)


def _content(path: Path, file: FileBytes) -> tuple[Bytes, Container]:
    """The bytes that rows are read from, unpacked if they are packed, and how."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    if suffix == ".parquet":
        return parquet_lines(path), json_lines
    if suffix == ".gz" and inner in CONTAINERS:
        return gunzip(path), CONTAINERS[inner]
    if suffix in CONTAINERS:
        return file, CONTAINERS[suffix]
    known = f"{', '.join(CONTAINERS)} (each also as .gz), .parquet, or a folder of .txt and .md files"
    what = f"cannot read {inner + suffix if suffix == '.gz' else suffix or 'files without a suffix'}"
    raise InputError(what, where=str(path), fix=f"use {known}")


def _check_signature(file: BinaryIO, path: Path) -> None:
    """A packed file under the name of a text would only be told as thousands of rows that are not UTF-8."""
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


def json_lines(file: BinaryIO, name: str) -> Contents:  # noqa: ARG001 - every container has this signature
    """One JSON object a line."""
    return decode_json, find_lines(file)


def json_file(file: BinaryIO, name: str) -> Contents:
    """One JSON array of objects; or else one object a line."""
    head = file.read(PIECE).removeprefix(BYTE_ORDER_MARK).lstrip()
    file.seek(0)
    return decode_json, find_elements(file, name) if head.startswith(b"[") else find_lines(file)


def table(file: BinaryIO, name: str, *, delimiter: str) -> Contents:
    """CSV with a header row; a quoted field may hold line ends."""
    places = find_records(file, delimiter)
    if (first := next(places, None)) is None:
        return decode_text, places
    here = file.tell()
    file.seek(first.start)
    header = read_header(file.read(first.end - first.start), Spot(name, first.line, 1, first.start), delimiter)
    file.seek(here)
    return partial(decode_record, header=header, delimiter=delimiter), places


def text(file: BinaryIO, name: str) -> Contents:  # noqa: ARG001
    """The whole file is one text."""
    return decode_text, find_whole(file)


CONTAINERS: dict[str, Container] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": partial(table, delimiter=","),
    ".tsv": partial(table, delimiter="\t"),
    ".txt": text,
    ".md": text,
}
