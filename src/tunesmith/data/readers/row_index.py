"""Where the rows of a file are, found without holding or decoding them.

    open file -> Place (first byte, end, line, column) of each row

Rows are lines, CSV records, elements of a JSON array, or the whole file. No more than a piece of the file is held at a
time (of CSV a whole line): a row longer than `LONGEST_ROW` is only measured here, and refused when somebody wants to
read it. Where the structure is broken, so that nobody can say where the next row begins, it is an InputError.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, NoReturn

from tunesmith.core.errors import InputError

LONGEST_ROW = 64 * 2**20  # bytes
LONGEST_FIELD = 4 * 2**20  # characters: what a forgotten quote in a CSV file can swallow
PIECE = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Place(NamedTuple):
    start: int
    end: int
    line: int  # from 1
    column: int = 0  # in bytes, of an element of an array; the others begin their line


def find_lines(file: BinaryIO) -> Iterator[Place]:
    """Each line that is not blank."""
    for line in _lines(file, PIECE):
        if line.head and not line.head.isspace():
            yield Place(line.start, line.end, line.number)


def find_whole(file: BinaryIO) -> Iterator[Place]:
    """The whole file, unless it is blank."""
    start, end, blank = 0, 0, True
    for line in _lines(file, PIECE):
        start, end = line.start if line.number == 1 else start, line.end
        blank = blank and not line.head.strip()
    if not blank:
        yield Place(start, end, 1)


class _Line(NamedTuple):
    start: int
    end: int
    number: int
    head: bytes  # as much of the line as is held


def _lines(file: BinaryIO, most: int) -> Iterator[_Line]:
    """All lines, of each at most `most` bytes; a byte order mark belongs to none."""
    end = number = 0
    while head := file.readline(most):
        number += 1
        start, end, piece = end, end + len(head), head
        while not piece.endswith(b"\n") and (piece := file.readline(PIECE)):
            end += len(piece)
        if number == 1 and head.startswith(BYTE_ORDER_MARK):
            start, head = len(BYTE_ORDER_MARK), head[len(BYTE_ORDER_MARK) :]
        yield _Line(start, end, number, head)


# ---------------------------------------------------------------- CSV


class _Feed:
    """Lines for csv.reader; remembers which ones it took since the last record."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = _lines(file, LONGEST_ROW + 1)
        self.first: _Line | None = None
        self.end = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.first, self.end = self.first or line, line.end
        if line.end - line.start > LONGEST_ROW:
            raise csv.Error("the line is too long")
        return line.head.decode("latin-1")  # one character a byte; commas, quotes and line ends are those of UTF-8


def find_records(file: BinaryIO, delimiter: str) -> Iterator[Place]:
    """Each CSV record, header included, as Python's csv module divides them; what it refuses is a place too."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))  # for the process: there is no other way
    feed = _Feed(file)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        feed.first = None
        try:
            blank = not next(reader)
        except StopIteration:
            return
        except csv.Error:
            blank = False
        if feed.first and not blank:
            yield Place(feed.first.start, feed.end, feed.first.number)


# ---------------------------------------------------------------- JSON arrays


def find_elements(file: BinaryIO, name: str) -> Iterator[Place]:
    """Each element of the one JSON array that the file is. Raises InputError where the array itself is broken."""
    signs = _Signs(file, name)
    separator = signs.next(_VISIBLE)
    if separator != b"[":
        signs.refuse("it does not begin with [")
    while separator != b"]":
        sign = signs.next(_VISIBLE)
        if separator == b"[" and sign == b"]":
            break
        if sign in (b",", b"]", b"}", b""):
            signs.refuse(f"a value is missing before {sign.decode() or 'the end of the file'}")
        start, line, column = signs.offset, signs.line, signs.column
        separator = signs.skip_value(sign)
        if separator == b"}":
            signs.refuse("this } closes nothing")
        yield Place(start, signs.offset, line, column)
    if signs.next(_VISIBLE):
        signs.refuse("there is more behind the end of the array")


_VISIBLE, _VALUE, _DEEP, _STRING = (re.compile(signs) for signs in (rb"\S", rb'["\[\]{},]', rb'["\[\]{}]', rb'["\\]'))


class _Signs:
    """A file, looked through for the signs that structure JSON. `offset`, `line` and `column` are of the last one."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._piece = file.read(PIECE)
        self._begin = 0  # offset of the piece
        self._at = len(BYTE_ORDER_MARK) if self._piece.startswith(BYTE_ORDER_MARK) else 0
        self._counted = 0  # bytes of the piece whose line ends are counted
        self._line_start = self._at
        self.offset, self.line = self._at, 1

    @property
    def column(self) -> int:
        return self.offset - self._line_start + 1

    def next(self, wanted: re.Pattern[bytes]) -> bytes:
        """The next sign that matches; empty at the end of the file."""
        while not (found := wanted.search(self._piece, self._at)):
            self._count(len(self._piece))
            self._begin += len(self._piece)
            self._at = max(0, self._at - len(self._piece))
            self._piece, self._counted = self._file.read(PIECE), 0
            if not self._piece:
                return b""
        self._at = found.end()
        self.offset = self._begin + found.start()
        if wanted is _VISIBLE:
            self._count(found.start())
        return found[0]

    def skip_value(self, first: bytes) -> bytes:
        """From the first sign of a value to the comma or bracket behind it, which is returned."""
        start, line, column, depth, sign = self.offset, self.line, self.column, 0, first
        while depth or sign not in (b",", b"]", b"}"):
            if sign == b'"':
                while (sign := self.next(_STRING)) == b"\\":
                    self._at += 1  # what is escaped ends no string
            elif sign in (b"[", b"{"):
                depth += 1
            elif sign in (b"]", b"}"):
                depth -= 1
            sign = self.next(_DEEP if depth else _VALUE)
            if not sign:
                self.offset, self.line, self._line_start = start, line, start - column + 1
                self.refuse("the value that begins here never ends")
        return sign

    def refuse(self, what: str) -> NoReturn:
        fix = "correct it here; what follows cannot be told apart"
        raise InputError(f"not a JSON array: {what}", where=f"{self._name}:{self.line}:{self.column}", fix=fix)

    def _count(self, upto: int) -> None:
        """Bring `line` up to a byte of the piece."""
        if ends := self._piece.count(b"\n", self._counted, upto):
            self.line += ends
            self._line_start = self._begin + self._piece.rfind(b"\n", self._counted, upto) + 1
        self._counted = max(self._counted, upto)
