"""What the bytes of one row say, strictly.

    bytes, Spot (where they stand) -> JSON object

Nothing is repaired in silence: bytes that are not UTF-8, duplicate keys, NaN, lone surrogates, NUL
and absurd depths are a BadRow that names the place. JSON objects keep the order of their keys;
numbers keep their value (1e3 is later written as 1000.0, as every JSON library does), strings stay
what they are."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from typing import Any, NamedTuple, NoReturn

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.readers.invalid_row import InvalidRow

MAX_ROW_DEPTH = 100  # levels of nesting

# Escapes of JSON strings from left to right: a character in two halves, NUL, half a character, any
# other.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u0000)|(u[dD][89a-fA-F]..)|.)")
_SUSPICIOUS = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


class SourceLocation(NamedTuple):
    """Where a row begins: in which file, line and column (from 1), and at which byte of the
    file."""

    name: str
    line: int = 1
    column: int = 1
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" + (f":{self.column}" if self.column > 1 else "")

    def format_position(self, line: int, column: int) -> str:
        """A place inside the row; line and column count from 1 at its beginning."""
        return f"{self.name}:{self.line + line - 1}:{column + (self.column - 1) * (line == 1)}"


def decode_text(raw: bytes, location: SourceLocation) -> Json:
    """A plain text as {"text": ...}, with \\n line ends."""
    return {"text": _decode_plain_text(raw, location).replace("\r\n", "\n")}


def decode_record(
    raw: bytes, location: SourceLocation, *, header: tuple[str, ...], delimiter: str
) -> Json:
    """One CSV record as an object; all values are strings."""
    text = _decode_plain_text(raw, location)
    try:
        fields = next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        fix = 'quote the whole field with "..." and write a quote inside it twice'
        raise InvalidRow("not CSV", f"not CSV: {error}", where=str(location), fix=fix) from None
    if len(fields) != len(header):
        message = f"{len(fields)} fields, the header has {len(header)}"
        raise InvalidRow(
            "wrong number of fields",
            message,
            where=str(location),
            fix="quote fields that hold the separator",
        )
    return dict(zip(header, fields, strict=True))


def read_header(raw: bytes, location: SourceLocation, delimiter: str) -> tuple[str, ...]:
    """The column names of a CSV file. Raises InputError, since without them no row can be read."""
    try:
        names = tuple(
            next(csv.reader([_decode_plain_text(raw, location)], delimiter=delimiter, strict=True))
        )
    except csv.Error as error:
        raise InputError(
            f"the header is not CSV: {error}", where=str(location), fix="write it again"
        ) from None
    except InvalidRow as problem:
        raise InputError(
            f"the header: {problem.message}", where=problem.where, fix=problem.fix
        ) from None
    if len(names) == 1 and ";" in names[0]:
        fix = "save it as CSV with commas: a semicolon is text here"
        raise InputError("the columns are separated by semicolons", where=str(location), fix=fix)
    if "" in names or len(set(names)) < len(names):
        problem = "a column has no name" if "" in names else "two columns have the same name"
        raise InputError(
            f"{problem} in {delimiter.join(names)!r:.200}",
            where=str(location),
            fix="name each column once",
        )
    return names


def decode_json(raw: bytes, location: SourceLocation) -> Json:
    """One JSON object, strictly. Raises BadRow with line and column."""
    text = _decode_utf8(raw, location).rstrip("\r\n")  # so that columns count within the line
    data = read_json_text(text, location)
    if not isinstance(data, dict):
        fix = (
            _JSON_FIX if isinstance(data, list) else 'write an object, such as {"messages": [...]}'
        )
        raise InvalidRow(
            "not an object",
            f"the row is a {type(data).__name__}, not an object",
            where=str(location),
            fix=fix,
        )
    return data


def read_json_text(text: str, location: SourceLocation) -> Any:
    """A JSON value, strictly."""
    where = str(location)
    try:
        data = _DECODER.decode(text)
    except RecursionError:
        raise _build_depth_error(where) from None
    except json.JSONDecodeError as error:
        fix = (
            _JSON_FIX
            if text.strip() in ("[", "{")
            else "correct the row: it is one whole JSON object"
        )
        raise InvalidRow(
            "not JSON",
            f"not JSON: {error.msg}",
            where=location.format_position(error.lineno, error.colno),
            fix=fix,
        ) from None
    except InvalidRow as problem:
        raise InvalidRow(problem.reason, problem.message, where=where, fix=problem.fix) from None
    except ValueError:  # Python refuses to read whole numbers of more than 4300 digits
        message = "a number has thousands of digits"
        raise InvalidRow(
            "number too large", message, where=where, fix="write it as a string"
        ) from None
    _check_escapes(text, location)
    if text.count("{") + text.count("[") > MAX_ROW_DEPTH and _measure_depth(data) > MAX_ROW_DEPTH:
        raise _build_depth_error(where)
    return data


_JSON_FIX = "one object a line is expected; an array of them goes into a .json file (jq '.KEY' FILE takes out a list)"


def _build_depth_error(where: str) -> InvalidRow:
    return InvalidRow(
        "nested too deep",
        f"nested deeper than {MAX_ROW_DEPTH} levels",
        where=where,
        fix="flatten the row",
    )


def _decode_plain_text(raw: bytes, location: SourceLocation) -> str:
    text = _decode_utf8(raw, location)
    if "\0" in text:
        offset = raw.index(b"\0")
        message = f"a NUL character at byte {location.offset + offset}"
        raise InvalidRow(
            "NUL character",
            message,
            where=_locate_byte(raw, offset, location),
            fix="is this a text file? remove the NUL",
        )
    return text


def _decode_utf8(raw: bytes, location: SourceLocation) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = (
            f"byte 0x{raw[error.start]:02x} at offset {location.offset + error.start} is not UTF-8"
        )
        is_utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        fix = f"convert the file: iconv -f {'UTF-16' if is_utf16 else 'WINDOWS-1252'} -t UTF-8 FILE > NEW"
        raise InvalidRow(
            "not UTF-8", message, where=_locate_byte(raw, error.start, location), fix=fix
        ) from None


def _locate_byte(raw: bytes, offset: int, location: SourceLocation) -> str:
    """The place of a byte, before which all is UTF-8."""
    prefix = raw[:offset].decode("utf-8")
    return location.format_position(prefix.count("\n") + 1, len(prefix) - prefix.rfind("\n"))


def _check_escapes(text: str, location: SourceLocation) -> None:
    """Refuse what JSON can spell but no text holds: half a surrogate pair, and NUL, which cuts
    texts in C programs."""
    if not _SUSPICIOUS.search(text):
        return
    for escape in _ESCAPE.finditer(text):
        if escape[1] or escape[2]:
            prefix = text[: escape.start()].encode()
            subject, where = (
                f"{escape[0]} at byte {location.offset + len(prefix)} is",
                _locate_byte(prefix, len(prefix), location),
            )
            if escape[1]:
                raise InvalidRow(
                    "NUL character", f"{subject} a NUL character", where=where, fix="remove it"
                )
            raise InvalidRow(
                "half a character",
                f"{subject} half a character",
                where=where,
                fix="write both halves",
            )


def _measure_depth(data: Any) -> int:
    level: list[Any] = [data]
    depth = 0
    while level:
        depth += 1
        inner = (
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
        )
        level = [child for child in inner if isinstance(child, (dict, list))]
    return depth


def _build_object(pairs: list[tuple[str, Any]]) -> Json:
    data = dict(pairs)
    if len(data) != len(pairs):
        duplicate = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InvalidRow(
            "duplicate key",
            f"the key {duplicate!r:.60} appears twice in one object",
            fix="keep one of them",
        )
    return data


def _parse_float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise InvalidRow(
            "number too large", f"the number {literal:.40} does not fit", fix="write it as a string"
        )
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise InvalidRow("NaN or infinity", f"{literal} is not JSON", fix="write null or a number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_build_object, parse_float=_parse_float, parse_constant=_refuse_constant
)
