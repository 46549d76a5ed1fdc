"""What the bytes of one row say, strictly.

    bytes, Spot (where they stand) -> JSON object

Nothing is repaired in silence: bytes that are not UTF-8, duplicate keys, NaN, lone surrogates, NUL and absurd depths
are a BadRow that names the place. JSON objects keep the order of their keys; numbers keep their value (1e3 is later
written as 1000.0, as every JSON library does), strings stay what they are.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from typing import Any, NamedTuple, NoReturn

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.readers.invalid_row import BadRow

DEEPEST_ROW = 100  # levels of nesting

# Escapes of JSON strings from left to right: a character in two halves, NUL, half a character, any other.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u0000)|(u[dD][89a-fA-F]..)|.)")
_SUSPICIOUS = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


class Spot(NamedTuple):
    """Where a row begins: in which file, line and column (from 1), and at which byte of the file."""

    name: str
    line: int = 1
    column: int = 1
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" + (f":{self.column}" if self.column > 1 else "")

    def at(self, line: int, column: int) -> str:
        """A place inside the row; line and column count from 1 at its beginning."""
        return f"{self.name}:{self.line + line - 1}:{column + (self.column - 1) * (line == 1)}"


def decode_text(raw: bytes, spot: Spot) -> Json:
    """A plain text as {"text": ...}, with \\n line ends."""
    return {"text": _plain_text(raw, spot).replace("\r\n", "\n")}


def decode_record(raw: bytes, spot: Spot, *, header: tuple[str, ...], delimiter: str) -> Json:
    """One CSV record as an object; all values are strings."""
    text = _plain_text(raw, spot)
    try:
        fields = next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        fix = 'quote the whole field with "..." and write a quote inside it twice'
        raise BadRow("not CSV", f"not CSV: {error}", where=str(spot), fix=fix) from None
    if len(fields) != len(header):
        what = f"{len(fields)} fields, the header has {len(header)}"
        raise BadRow("wrong number of fields", what, where=str(spot), fix="quote fields that hold the separator")
    return dict(zip(header, fields, strict=True))


def read_header(raw: bytes, spot: Spot, delimiter: str) -> tuple[str, ...]:
    """The column names of a CSV file. Raises InputError, since without them no row can be read."""
    try:
        names = tuple(next(csv.reader([_plain_text(raw, spot)], delimiter=delimiter, strict=True)))
    except csv.Error as error:
        raise InputError(f"the header is not CSV: {error}", where=str(spot), fix="write it again") from None
    except BadRow as problem:
        raise InputError(f"the header: {problem.what}", where=problem.where, fix=problem.fix) from None
    if len(names) == 1 and ";" in names[0]:
        fix = "save it as CSV with commas: a semicolon is text here"
        raise InputError("the columns are separated by semicolons", where=str(spot), fix=fix)
    if "" in names or len(set(names)) < len(names):
        problem = "a column has no name" if "" in names else "two columns have the same name"
        raise InputError(f"{problem} in {delimiter.join(names)!r:.200}", where=str(spot), fix="name each column once")
    return names


def decode_json(raw: bytes, spot: Spot) -> Json:
    """One JSON object, strictly. Raises BadRow with line and column."""
    text = _decode_utf8(raw, spot).rstrip("\r\n")  # so that columns count within the line
    data = read_json_text(text, spot)
    if not isinstance(data, dict):
        fix = _JSON_FIX if isinstance(data, list) else 'write an object, such as {"messages": [...]}'
        raise BadRow("not an object", f"the row is a {type(data).__name__}, not an object", where=str(spot), fix=fix)
    return data


def read_json_text(text: str, spot: Spot) -> Any:
    """A JSON value, strictly."""
    where = str(spot)
    try:
        data = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep(where) from None
    except json.JSONDecodeError as error:
        fix = _JSON_FIX if text.strip() in ("[", "{") else "correct the row: it is one whole JSON object"
        raise BadRow("not JSON", f"not JSON: {error.msg}", where=spot.at(error.lineno, error.colno), fix=fix) from None
    except BadRow as problem:
        raise BadRow(problem.reason, problem.what, where=where, fix=problem.fix) from None
    except ValueError:  # Python refuses to read whole numbers of more than 4300 digits
        what = "a number has thousands of digits"
        raise BadRow("number too large", what, where=where, fix="write it as a string") from None
    _check_escapes(text, spot)
    if text.count("{") + text.count("[") > DEEPEST_ROW and _depth(data) > DEEPEST_ROW:
        raise _too_deep(where)
    return data


_JSON_FIX = "one object a line is expected; an array of them goes into a .json file (jq '.KEY' FILE takes out a list)"


def _too_deep(where: str) -> BadRow:
    return BadRow("nested too deep", f"nested deeper than {DEEPEST_ROW} levels", where=where, fix="flatten the row")


def _plain_text(raw: bytes, spot: Spot) -> str:
    text = _decode_utf8(raw, spot)
    if "\0" in text:
        at = raw.index(b"\0")
        what = f"a NUL character at byte {spot.offset + at}"
        raise BadRow("NUL character", what, where=_inside(raw, at, spot), fix="is this a text file? remove the NUL")
    return text


def _decode_utf8(raw: bytes, spot: Spot) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at offset {spot.offset + error.start} is not UTF-8"
        wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        fix = f"convert the file: iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} -t UTF-8 FILE > NEW"
        raise BadRow("not UTF-8", what, where=_inside(raw, error.start, spot), fix=fix) from None


def _inside(raw: bytes, at: int, spot: Spot) -> str:
    """The place of a byte, before which all is UTF-8."""
    before = raw[:at].decode("utf-8")
    return spot.at(before.count("\n") + 1, len(before) - before.rfind("\n"))


def _check_escapes(text: str, spot: Spot) -> None:
    """Refuse what JSON can spell but no text holds: half a surrogate pair, and NUL, which cuts texts in C programs."""
    if not _SUSPICIOUS.search(text):
        return
    for escape in _ESCAPE.finditer(text):
        if escape[1] or escape[2]:
            before = text[: escape.start()].encode()
            what, where = f"{escape[0]} at byte {spot.offset + len(before)} is", _inside(before, len(before), spot)
            if escape[1]:
                raise BadRow("NUL character", f"{what} a NUL character", where=where, fix="remove it")
            raise BadRow("half a character", f"{what} half a character", where=where, fix="write both halves")


def _depth(data: Any) -> int:
    level: list[Any] = [data]
    depth = 0
    while level:
        depth += 1
        inner = (child for value in level for child in (value.values() if isinstance(value, dict) else value))
        level = [child for child in inner if isinstance(child, (dict, list))]
    return depth


def _object(pairs: list[tuple[str, Any]]) -> Json:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRow("duplicate key", f"the key {twice!r:.60} appears twice in one object", fix="keep one of them")
    return data


def _float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise BadRow("number too large", f"the number {literal:.40} does not fit", fix="write it as a string")
    return value


def _constant(literal: str) -> NoReturn:
    raise BadRow("NaN or infinity", f"{literal} is not JSON", fix="write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
