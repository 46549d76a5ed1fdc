"""Decode the bytes of one row, strictly.

    bytes, SourceLocation -> JSON object

Nothing is repaired silently: invalid UTF-8, duplicate keys, NaN, lone surrogates, NUL and extreme
nesting raise InvalidRow with line and column. JSON objects keep the order of their keys. Numbers
keep their value (1e3 is written as 1000.0 later, as by every JSON library); strings stay as they
are."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import Counter
from typing import Any, NamedTuple, NoReturn

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import has_more_values, measure_depth
from tunesmith.core.types import Json
from tunesmith.data.readers.invalid_row import InvalidRow

MAX_ROW_MEMORY = 16 * 2**20  # bytes of a text: one emoji makes each character take four
MAX_ROW_DEPTH = 100  # levels of nesting
MAX_ROW_VALUES = 200_000  # keys, texts, objects and arrays; twenty thousand tools have more

# JSON escapes from left to right: a surrogate pair, NUL, a lone surrogate, any other escape.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u0000)|(u[dD][89a-fA-F]..)|.)")
_SUSPICIOUS = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_JSON_FIX = (
    "write one object per line; an array of them goes into a .json file "
    "(jq '.KEY' FILE extracts a list)"
)


class SourceLocation(NamedTuple):
    """Where a row starts: file, line and column (from 1), and byte offset in the file."""

    name: str
    line: int = 1
    column: int = 1
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" + (f":{self.column}" if self.column > 1 else "")

    def format_position(self, line: int, column: int) -> str:
        """Return `file:line:column` of a position inside the row, counted from 1 at its start."""
        if line == 1:
            column += self.column - 1
        return f"{self.name}:{self.line + line - 1}:{column}"


def decode_text(raw: bytes, location: SourceLocation) -> Json:
    """Decode plain text to {"text": ...}, with \\n line ends."""
    return {"text": _decode_plain_text(raw, location).replace("\r\n", "\n")}


# ---------------------------------------------------------------- CSV


def decode_record(
    raw: bytes, location: SourceLocation, *, header: tuple[str, ...], delimiter: str
) -> Json:
    """Decode one CSV record to an object; all values are strings."""
    where = str(location)
    text = _decode_plain_text(raw, location)
    try:
        fields = next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        fix = 'quote the full field with "..." and double each quote inside it'
        raise InvalidRow("not CSV", f"not CSV: {error}", where=where, fix=fix) from None
    if len(fields) != len(header):
        plural = "s" * (len(fields) != 1)
        message = f"{len(fields)} field{plural}, but the header has {len(header)}"
        fix = "quote fields that contain the separator"
        raise InvalidRow("wrong number of fields", message, where=where, fix=fix)
    return dict(zip(header, fields, strict=True))


def read_header(raw: bytes, location: SourceLocation, delimiter: str) -> tuple[str, ...]:
    """Return the column names of a CSV file. Raises InputError: no row can be read without them."""
    where = str(location)
    try:
        text = _decode_plain_text(raw, location)
        names = tuple(next(csv.reader([text], delimiter=delimiter, strict=True)))
    except csv.Error as error:
        message = f"the header is not CSV: {error}"
        raise InputError(message, where=where, fix="correct the header") from None
    except InvalidRow as problem:
        message = f"header: {problem.message}"
        raise InputError(message, where=problem.where, fix=problem.fix) from None
    if len(names) == 1 and ";" in names[0]:
        fix = "save the file as CSV with commas"
        raise InputError("the columns are separated by semicolons", where=where, fix=fix)
    if "" in names or len(set(names)) < len(names):
        problem = "a column has no name" if "" in names else "two columns have the same name"
        message = f"{problem}: {delimiter.join(names)!r:.200}"
        raise InputError(message, where=where, fix="give each column a different name")
    return names


# ---------------------------------------------------------------- JSON


def decode_json(raw: bytes, location: SourceLocation) -> Json:
    """Decode one JSON object strictly. Raises InvalidRow with line and column."""
    text = _decode_utf8(raw, location).rstrip("\r\n")  # so that columns count within the line
    if _estimate_memory(text) > MAX_ROW_MEMORY:
        message = f"{len(text):,} characters of up to four bytes; at most 4 million are read"
        fix = "split or remove this row"
        raise InvalidRow("too long", message, where=str(location), fix=fix)
    data = read_json_text(text, location)
    if not isinstance(data, dict):
        message = f"the row is {describe_type(data)}, not an object"
        fix = 'write an object, such as {"messages": [...]}'
        if isinstance(data, list):
            fix = _JSON_FIX
        raise InvalidRow("not an object", message, where=str(location), fix=fix)
    return data


def _estimate_memory(text: str) -> int:
    """Return the bytes of a text after its escapes are decoded, at most: a surrogate pair becomes a
    character of four bytes, and all others with it."""
    has_pairs = r"\ud" in text or r"\uD" in text
    return max(sys.getsizeof(text), 4 * len(text) if has_pairs else 0)


def read_json_text(text: str, location: SourceLocation) -> Any:
    """Decode any JSON value strictly. Raises InvalidRow with line and column."""
    where = str(location)
    if has_more_values(text, MAX_ROW_VALUES):
        message = f"more than {MAX_ROW_VALUES:,} keys, texts, objects and arrays"
        raise InvalidRow("too many values", message, where=where, fix="split or remove this row")
    try:
        data = _DECODER.decode(text)
    except RecursionError:
        raise _build_depth_error(where) from None
    except json.JSONDecodeError as error:
        position = location.format_position(error.lineno, error.colno)
        fix = "correct the row: it must be one complete JSON object"
        if text.strip() in ("[", "{"):
            fix = _JSON_FIX
        raise InvalidRow("not JSON", f"not JSON: {error.msg}", where=position, fix=fix) from None
    except InvalidRow as problem:
        raise InvalidRow(problem.reason, problem.message, where=where, fix=problem.fix) from None
    except ValueError:  # Python refuses integers of more than 4300 digits
        message = "a number has thousands of digits"
        fix = "write it as a string"
        raise InvalidRow("number too large", message, where=where, fix=fix) from None
    _check_escapes(text, location)
    if text.count("{") + text.count("[") > MAX_ROW_DEPTH and measure_depth(data) > MAX_ROW_DEPTH:
        raise _build_depth_error(where)
    return data


def describe_type(value: Any) -> str:
    """Return the type of a JSON value for an error message."""
    if value is None:
        return "null"
    name = type(value).__name__
    return f"an {name}" if name.startswith("i") else f"a {name}"


def _build_depth_error(where: str) -> InvalidRow:
    message = f"nested deeper than {MAX_ROW_DEPTH} levels"
    return InvalidRow("nested too deep", message, where=where, fix="flatten the row")


def _check_escapes(text: str, location: SourceLocation) -> None:
    """Refuse escapes that no valid text contains: a lone surrogate, and NUL (it ends C strings)."""
    if not _SUSPICIOUS.search(text):
        return
    for escape in _ESCAPE.finditer(text):
        is_nul = bool(escape[1])
        is_surrogate = bool(escape[2])
        if not (is_nul or is_surrogate):
            continue
        prefix = text[: escape.start()].encode()
        where = _locate_byte(prefix, len(prefix), location)
        subject = f"{escape[0]} at byte {location.offset + len(prefix)}"
        if is_nul:
            message = f"{subject} is a NUL character"
            raise InvalidRow("NUL character", message, where=where, fix="remove it")
        message = f"{subject} is a lone surrogate: half of a character"
        raise InvalidRow("lone surrogate", message, where=where, fix="write both halves")


def _build_object(pairs: list[tuple[str, Any]]) -> Json:
    data = dict(pairs)
    if len(data) != len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        message = f"the key {duplicate!r:.60} appears twice in one object"
        raise InvalidRow("duplicate key", message, fix="remove one of them")
    return data


def _parse_float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        message = f"the number {literal:.40} is too large"
        raise InvalidRow("number too large", message, fix="write it as a string")
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise InvalidRow("NaN or infinity", f"{literal} is not JSON", fix="write null or a number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_build_object, parse_float=_parse_float, parse_constant=_refuse_constant
)


# ---------------------------------------------------------------- bytes


def _decode_plain_text(raw: bytes, location: SourceLocation) -> str:
    text = _decode_utf8(raw, location)
    if "\0" in text:
        offset = raw.index(b"\0")
        message = f"a NUL character at byte {location.offset + offset}"
        where = _locate_byte(raw, offset, location)
        fix = "remove it; is this a text file?"
        raise InvalidRow("NUL character", message, where=where, fix=fix)
    return text


def _decode_utf8(raw: bytes, location: SourceLocation) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = location.offset + error.start
        message = f"byte 0x{raw[error.start]:02x} at offset {offset} is not UTF-8"
        where = _locate_byte(raw, error.start, location)
        is_utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        encoding = "UTF-16" if is_utf16 else "WINDOWS-1252"
        fix = f"convert the file: iconv -f {encoding} -t UTF-8 FILE > NEW"
        raise InvalidRow("not UTF-8", message, where=where, fix=fix) from None


def _locate_byte(raw: bytes, offset: int, location: SourceLocation) -> str:
    """Return the position of a byte; all bytes before it must be UTF-8."""
    prefix = raw[:offset].decode("utf-8")
    return location.format_position(prefix.count("\n") + 1, len(prefix) - prefix.rfind("\n"))
