"""Where the rows of a file are, found without holding or decoding them.

    open file -> Place (first byte, end, line, column) of each row

Rows are lines, CSV records, elements of a JSON array, or the whole file. No more than a piece of
the file is held at a time (of CSV a whole line): a row longer than `LONGEST_ROW` is only measured
here, and refused when somebody wants to read it. Where the structure is broken, so that nobody can
say where the next row begins, it is an InputError."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, NoReturn

from tunesmith.core.errors import InputError

MAX_ROW_BYTES = 64 * 2**20  # bytes
MAX_FIELD_CHARS = 4 * 2**20  # characters: what a forgotten quote in a CSV file can swallow
CHUNK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowSpan(NamedTuple):
    start: int
    end: int
    line: int  # from 1
    column: int = 0  # in bytes, of an element of an array; the others begin their line


def find_lines(file: BinaryIO) -> Iterator[RowSpan]:
    """Each line that is not blank."""
    for line in _iter_lines(file, CHUNK_BYTES):
        if line.head and not line.head.isspace():
            yield RowSpan(line.start, line.end, line.number)


def find_single_row(file: BinaryIO) -> Iterator[RowSpan]:
    """The whole file, unless it is blank."""
    start, end, is_blank = 0, 0, True
    for line in _iter_lines(file, CHUNK_BYTES):
        start, end = line.start if line.number == 1 else start, line.end
        is_blank = is_blank and not line.head.strip()
    if not is_blank:
        yield RowSpan(start, end, 1)


class _Line(NamedTuple):
    start: int
    end: int
    number: int
    head: bytes  # as much of the line as is held


def _iter_lines(file: BinaryIO, max_bytes: int) -> Iterator[_Line]:
    """All lines, of each at most `most` bytes; a byte order mark belongs to none."""
    end = number = 0
    while head := file.readline(max_bytes):
        number += 1
        start, end, chunk = end, end + len(head), head
        while not chunk.endswith(b"\n") and (chunk := file.readline(CHUNK_BYTES)):
            end += len(chunk)
        if number == 1 and head.startswith(BYTE_ORDER_MARK):
            start, head = len(BYTE_ORDER_MARK), head[len(BYTE_ORDER_MARK) :]
        yield _Line(start, end, number, head)


# ---------------------------------------------------------------- CSV


class _CsvLines:
    """Lines for csv.reader; remembers which ones it took since the last record."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = _iter_lines(file, MAX_ROW_BYTES + 1)
        self.first_line: _Line | None = None
        self.end = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.first_line, self.end = self.first_line or line, line.end
        if line.end - line.start > MAX_ROW_BYTES:
            raise csv.Error("the line is too long")
        return line.head.decode(
            "latin-1"
        )  # one character a byte; commas, quotes and line ends are those of UTF-8


def find_records(file: BinaryIO, delimiter: str) -> Iterator[RowSpan]:
    """Each CSV record, header included, as Python's csv module divides them; what it refuses is a
    place too."""
    csv.field_size_limit(
        max(csv.field_size_limit(), MAX_FIELD_CHARS)
    )  # for the process: there is no other way
    csv_lines = _CsvLines(file)
    reader = csv.reader(csv_lines, delimiter=delimiter, strict=True)
    while True:
        csv_lines.first_line = None
        try:
            is_blank = not next(reader)
        except StopIteration:
            return
        except csv.Error:
            is_blank = False
        if csv_lines.first_line and not is_blank:
            yield RowSpan(csv_lines.first_line.start, csv_lines.end, csv_lines.first_line.number)


# ---------------------------------------------------------------- JSON arrays


def find_elements(file: BinaryIO, name: str) -> Iterator[RowSpan]:
    """Each element of the one JSON array that the file is. Raises InputError where the array itself
    is broken."""
    scanner = _JsonScanner(file, name)
    separator = scanner.find_next(_VISIBLE)
    if separator != b"[":
        scanner.refuse("it does not begin with [")
    while separator != b"]":
        sign = scanner.find_next(_VISIBLE)
        if separator == b"[" and sign == b"]":
            break
        if sign in (b",", b"]", b"}", b""):
            scanner.refuse(f"a value is missing before {sign.decode() or 'the end of the file'}")
        start, line, column = scanner.offset, scanner.line, scanner.column
        separator = scanner.skip_value(sign)
        if separator == b"}":
            scanner.refuse("this } closes nothing")
        yield RowSpan(start, scanner.offset, line, column)
    if scanner.find_next(_VISIBLE):
        scanner.refuse("there is more behind the end of the array")


_VISIBLE, _VALUE, _DEEP, _STRING = (
    re.compile(signs) for signs in (rb"\S", rb'["\[\]{},]', rb'["\[\]{}]', rb'["\\]')
)


class _JsonScanner:
    """A file, looked through for the signs that structure JSON. `offset`, `line` and `column` are
    of the last one."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._chunk = file.read(CHUNK_BYTES)
        self._chunk_offset = 0  # offset of the piece
        self._position = len(BYTE_ORDER_MARK) if self._chunk.startswith(BYTE_ORDER_MARK) else 0
        self._counted_bytes = 0  # bytes of the piece whose line ends are counted
        self._line_start = self._position
        self.offset, self.line = self._position, 1

    @property
    def column(self) -> int:
        return self.offset - self._line_start + 1

    def find_next(self, pattern: re.Pattern[bytes]) -> bytes:
        """The next sign that matches; empty at the end of the file."""
        while not (match := pattern.search(self._chunk, self._position)):
            self._count_lines(len(self._chunk))
            self._chunk_offset += len(self._chunk)
            self._position = max(0, self._position - len(self._chunk))
            self._chunk, self._counted_bytes = self._file.read(CHUNK_BYTES), 0
            if not self._chunk:
                return b""
        self._position = match.end()
        self.offset = self._chunk_offset + match.start()
        if pattern is _VISIBLE:
            self._count_lines(match.start())
        return match[0]

    def skip_value(self, first_sign: bytes) -> bytes:
        """From the first sign of a value to the comma or bracket behind it, which is returned."""
        start, line, column, depth, sign = self.offset, self.line, self.column, 0, first_sign
        while depth or sign not in (b",", b"]", b"}"):
            if sign == b'"':
                while (sign := self.find_next(_STRING)) == b"\\":
                    self._position += 1  # what is escaped ends no string
            elif sign in (b"[", b"{"):
                depth += 1
            elif sign in (b"]", b"}"):
                depth -= 1
            sign = self.find_next(_DEEP if depth else _VALUE)
            if not sign:
                self.offset, self.line, self._line_start = start, line, start - column + 1
                self.refuse("the value that begins here never ends")
        return sign

    def refuse(self, message: str) -> NoReturn:
        fix = "correct it here; what follows cannot be told apart"
        raise InputError(
            f"not a JSON array: {message}", where=f"{self._name}:{self.line}:{self.column}", fix=fix
        )

    def _count_lines(self, end: int) -> None:
        """Bring `line` up to a byte of the piece."""
        if num_line_ends := self._chunk.count(b"\n", self._counted_bytes, end):
            self.line += num_line_ends
            self._line_start = (
                self._chunk_offset + self._chunk.rfind(b"\n", self._counted_bytes, end) + 1
            )
        self._counted_bytes = max(self._counted_bytes, end)
