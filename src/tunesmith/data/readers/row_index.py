"""The byte range of every row of a file, found without decoding the rows.

    open file -> RowSpan (start, end, line, column) of each row

Rows are lines, CSV records, elements of a JSON array, or a full text file. Lines and texts are read
in pieces, so one over `MAX_ROW_BYTES` or `MAX_TEXT_BYTES` is only measured here, and refused when
it is read. A JSON array is read at once and may have `MAX_ARRAY_BYTES`. Where the file is so broken
that the next row cannot be located, an InputError is raised."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import JSON_TEXT

MAX_ROW_BYTES = 8 * 2**20  # in memory several times, with up to four bytes per character
MAX_TURNS_BYTES = 4 * 2**20  # of a row of turns, which are rendered and held as tokens
MAX_TEXT_BYTES = 64 * 2**20  # of a text file
MAX_ARRAY_BYTES = 2**30
MAX_FIELD_CHARS = 4 * 2**20  # the most that a forgotten quote in a CSV file can swallow
MAX_BLANK_LINES = 1_000_000  # one after another
CHUNK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowSpan(NamedTuple):
    """Bytes start..end - 1 of a file."""

    start: int
    end: int
    line: int  # from 1
    column: int = 0  # in bytes, from 1, for elements of an array; other rows start their line


def find_lines(file: BinaryIO, name: str = "") -> Iterator[RowSpan]:
    """Yield each line that is not blank. Raises InputError for too many blank ones in a row."""
    for line in _iter_lines(file, CHUNK_BYTES, name):
        if not line.is_blank:
            yield RowSpan(line.start, line.end, line.number)


def find_full_text(file: BinaryIO) -> Iterator[RowSpan]:
    """Yield the full file as one row, unless it is blank."""
    chunk = file.read(CHUNK_BYTES)
    start = len(BYTE_ORDER_MARK) if chunk.startswith(BYTE_ORDER_MARK) else 0
    end = len(chunk)
    is_blank = not chunk[start:].strip()
    while chunk := file.read(CHUNK_BYTES):
        end += len(chunk)
        is_blank = is_blank and not chunk.strip()
    if not is_blank:
        yield RowSpan(start, end, 1)


class _Line(NamedTuple):
    start: int
    end: int
    number: int
    head: bytes  # the first bytes of the line
    is_blank: bool  # as far as `head` goes


def _iter_lines(file: BinaryIO, max_bytes: int, name: str) -> Iterator[_Line]:
    """Yield all lines without the byte order mark, with at most `max_bytes` of each as `head`.

    Raises InputError for too many blank ones, each of which takes as long as a short row."""
    end = 0
    number = 0
    num_blank = 0  # lines one after another
    while head := file.readline(max_bytes):
        number += 1
        start = end
        end += len(head)
        chunk = head
        while not chunk.endswith(b"\n") and (chunk := file.readline(CHUNK_BYTES)):
            end += len(chunk)
        if number == 1 and head.startswith(BYTE_ORDER_MARK):
            start = len(BYTE_ORDER_MARK)
            head = head.removeprefix(BYTE_ORDER_MARK)
        is_blank = not head or head.isspace()
        num_blank = num_blank + 1 if is_blank else 0
        if num_blank > MAX_BLANK_LINES:
            message = f"over {MAX_BLANK_LINES:,} blank lines one after another"
            fix = "remove them; is this a text file?"
            raise InputError(message, where=f"{name}:{number}", fix=fix)
        yield _Line(start, end, number, head, is_blank)


# ---------------------------------------------------------------- CSV


class _CsvLines:
    """Lines for csv.reader, with the first and last line of the current record."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._lines = _iter_lines(file, MAX_ROW_BYTES + 1, name)
        self.first_line: _Line | None = None
        self.end = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.first_line = self.first_line or line
        self.end = line.end
        if line.end - line.start > MAX_ROW_BYTES:
            raise csv.Error("the line is too long")
        # One character per byte; commas, quotes and line ends are the same bytes in UTF-8.
        return line.head.decode("latin-1")


def find_records(file: BinaryIO, delimiter: str, name: str = "") -> Iterator[RowSpan]:
    """Yield each CSV record, header included, as Python's csv module separates them.

    A record that the csv module refuses is yielded too: decoding it reports the error."""
    # The limit is global to the process: csv has no other setting.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    csv_lines = _CsvLines(file, name)
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

_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
# Lenient about everything but structure: the strict decoder judges each row when it is read.
# A number becomes its length: only where the element ends matters.
_ELEMENT_DECODER = json.JSONDecoder(strict=False, parse_int=len, parse_float=len)
_STRUCTURE = re.compile(rf"{JSON_TEXT}|[\[\]{{}}]", re.DOTALL)
MAX_ELEMENT_TOKENS = 10**6  # brackets and texts of an element that is decoded


def find_elements(file: BinaryIO, name: str) -> Iterator[RowSpan]:
    """Yield each element of a file that is one JSON array.

    Raises InputError for a file over `MAX_ARRAY_BYTES` and for a syntax error anywhere in it."""
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size_bytes > MAX_ARRAY_BYTES:
        message = f"a JSON array of {size_bytes:,} bytes; at most 1 GiB is read"
        fix = f"convert it to JSON Lines: jq -c '.[]' {name} > NEW.jsonl"
        raise InputError(message, where=name, fix=fix)
    # One character per byte, so positions are byte offsets; JSON's structure is ASCII.
    text = str(file.read(), "latin-1")
    num_elements = 0
    try:
        for row_span in _iter_elements(text):
            yield row_span
            num_elements += 1
    except json.JSONDecodeError as error:
        raise InputError(
            f"not a JSON array: element {num_elements + 1}: {error.msg}",
            where=f"{name}:{error.lineno}:{error.colno}",
            fix="correct it here: the rows after it cannot be located",
        ) from None
    except RecursionError:
        message = f"not a JSON array of rows: element {num_elements + 1} is nested too deep"
        raise InputError(message, where=name, fix="flatten the rows") from None


def _iter_elements(text: str) -> Iterator[RowSpan]:
    """Yield each element of a JSON array. Raises JSONDecodeError."""
    line_start = len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK.decode("latin-1")) else 0
    line = 1
    counted = line_start  # line breaks before this position are in `line`
    position = _skip_white_space(text, line_start)
    separator = text[position : position + 1]
    if separator != "[":
        raise json.JSONDecodeError("Expecting '['", text, position)
    start = _skip_white_space(text, position + 1)
    if text[start : start + 1] == "]":
        separator = "]"
        position = start
    while separator != "]":
        start = _skip_white_space(text, position + 1)
        _refuse_large_element(text, start)
        _, end = _ELEMENT_DECODER.raw_decode(text, start)
        if line_breaks := text.count("\n", counted, start):
            line += line_breaks
            line_start = text.rindex("\n", counted, start) + 1
        counted = start
        yield RowSpan(start, end, line, start - line_start + 1)
        position = _skip_white_space(text, end)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    rest = _skip_white_space(text, position + 1)
    if rest < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _refuse_large_element(text: str, start: int) -> None:
    """Raise JSONDecodeError for an element of so many values that decoding it takes much memory."""
    if not text.startswith(("{", "["), start) or len(text) - start < MAX_ELEMENT_TOKENS:
        return
    depth = 0
    for count, match in enumerate(_STRUCTURE.finditer(text, start)):
        token = text[match.start()]
        depth += (token in "{[") - (token in "}]")
        if depth == 0:
            return
        if count == MAX_ELEMENT_TOKENS:
            message = f"more than {MAX_ELEMENT_TOKENS:,} texts and brackets"
            raise json.JSONDecodeError(message, text, start)


def _skip_white_space(text: str, position: int) -> int:
    match = _WHITE_SPACE.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()
