"""Data files as rows, one at a time.

    path -> Source (where each row begins and ends) -> Row (id, data)

`open_source` walks over the bytes once and keeps two numbers a row, so any row can be read later, in any order,
while the file itself is never held. `.jsonl` holds one JSON object a line; `.txt` and `.md` are one document a file.

Nothing is repaired in silence: bytes that are not UTF-8, duplicate keys, NaN, lone surrogates, absurd lengths and
depths are errors that name the place. A byte order mark, CRLF line ends and blank lines are fine. JSON objects keep
the order of their keys; numbers keep their value (1e3 is later written as 1000.0, as every JSON library does), strings
stay what they are. Which columns mean what is decided in `formats.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tunesmith.errors import InputError
from tunesmith.types import Json, Row

LONGEST_ROW = 64 * 2**20  # bytes
DEEPEST_ROW = 100  # levels of nesting
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


@dataclass(frozen=True, eq=False)
class Source:
    """A data file and where its rows are. `row(i)` reads row i from the disk, from any thread."""

    path: Path
    name: str  # the first half of a row's id
    decode: Callable[[bytes, str, int], Json]
    starts: array[int]  # byte offset of each row
    ends: array[int]
    lines: array[int]  # line number of each row, from 1
    stamp: tuple[int, int]  # size and time of change, to notice an edited file
    fingerprint: str  # sha256 over the bytes of the file

    def __len__(self) -> int:
        return len(self.starts)

    def id(self, index: int) -> str:
        return f"{self.name}:{self.lines[index]}"

    def row(self, index: int) -> Row:
        """Read and decode one row. Raises InputError that names file and line."""
        start, end = self.starts[index], self.ends[index]
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            what = f"the file was readable before: {error.strerror}"
            raise InputError(what, where=str(self.path), fix="put it back and start again") from None
        try:
            if _stamp(os.fstat(handle)) != self.stamp:
                raise InputError("the file changed while it was in use", where=str(self.path), fix="start again")
            raw = os.pread(handle, end - start, start)
        finally:
            os.close(handle)
        return Row(self.id(index), self.decode(raw, self.id(index), start))


def open_source(path: str | Path, *, name: str = "") -> Source:
    """Find the rows of a file, without decoding them.

    `name` goes into the row ids; the file's own name by default. Raises InputError for a missing, empty, special or
    unreadable file, an unknown suffix, and a row that is longer than `LONGEST_ROW`.
    """
    path = Path(path)
    status = _check_file(path)
    if path.suffix.lower() not in KINDS:
        known = ", ".join(KINDS)
        raise InputError(f"cannot read {path.suffix or 'files without a suffix'}", where=str(path), fix=f"use {known}")
    find_rows, decode = KINDS[path.suffix.lower()]
    starts, ends, lines, digest = array("q"), array("q"), array("q"), hashlib.sha256()
    with path.open("rb") as file:
        for start, end, line in find_rows(file, digest.update, name or path.name):
            starts.append(start)
            ends.append(end)
            lines.append(line)
    if not starts:
        what = "the file is empty" if status.st_size == 0 else "the file has only blank lines"
        raise InputError(what, where=str(path), fix="write at least one row into it")
    return Source(path, name or path.name, decode, starts, ends, lines, _stamp(status), digest.hexdigest())


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _check_file(path: Path) -> os.stat_result:
    """Only ordinary files are opened: a pipe or a device could block or never end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        fix = f"did you mean {path.parent / close[0]}?" if close else "check the path"
        raise InputError("there is no such file", where=str(path), fix=fix) from None
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror}", where=str(path), fix="check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError("is a folder", where=str(path), fix="name the files in it")
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is not an ordinary file", where=str(path), fix="copy the data into a file first")
    if not os.access(path, os.R_OK):
        raise InputError("may not be read", where=str(path), fix=f"chmod u+r {path}")
    return status


# ---------------------------------------------------------------- where the rows are


def find_lines(file: BinaryIO, seen: Callable[[bytes], object], name: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, line number) of each line that is not blank."""
    offset = number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise InputError("the line is longer than 64 MB", where=f"{name}:{number}", fix="split or drop this row")
        seen(line)
        mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
        if not line[mark:].isspace() and len(line) > mark:
            yield offset + mark, offset + len(line), number
        offset += len(line)


def find_whole(file: BinaryIO, seen: Callable[[bytes], object], name: str) -> Iterator[tuple[int, int, int]]:
    """Yield the whole file as one row."""
    raw = file.read(LONGEST_ROW + 1)
    if len(raw) > LONGEST_ROW:
        raise InputError("the file is longer than 64 MB", where=name, fix='write it as .jsonl rows {"text": ...}')
    seen(raw)
    mark = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
    if raw[mark:].strip():
        yield mark, len(raw), 1


# ---------------------------------------------------------------- what a row says


def decode_text(raw: bytes, where: str, offset: int) -> Json:
    """A plain text as {"text": ...}, with \\n line ends."""
    text = _decode_utf8(raw, where, offset)
    if "\0" in text:
        at = offset + raw.index(b"\0")
        raise InputError(f"a NUL character at byte {at}", where=where, fix="is this a text file? remove the NUL")
    return {"text": text.replace("\r\n", "\n")}


def decode_json(raw: bytes, where: str, offset: int) -> Json:
    """One JSON object, strictly. Raises InputError with line and column."""
    text = _decode_utf8(raw, where, offset).rstrip("\r\n")  # so that columns count within the line
    try:
        data = _DECODER.decode(text)
    except RecursionError:
        raise InputError(f"nested deeper than {DEEPEST_ROW} levels", where=where, fix="flatten the row") from None
    except json.JSONDecodeError as error:
        fix = _JSON_FIX if text.strip() in ("[", "{") else "correct the line; each line is one whole JSON object"
        raise InputError(f"not JSON: {error.msg}", where=f"{where}:{error.colno}", fix=fix) from None
    except ValueError:  # Python refuses to read whole numbers of more than 4300 digits
        raise InputError("a number has thousands of digits", where=where, fix="write it as a string") from None
    except InputError as error:
        raise InputError(error.what, where=where, fix=error.fix) from None
    if not isinstance(data, dict):
        fix = _JSON_FIX if isinstance(data, list) else 'write an object, such as {"messages": [...]}'
        raise InputError(f"the row is a {type(data).__name__}, not an object", where=where, fix=fix)
    _check_strings(text, data, where)
    if raw.count(b"{") + raw.count(b"[") > DEEPEST_ROW and _depth(data) > DEEPEST_ROW:
        raise InputError(f"nested deeper than {DEEPEST_ROW} levels", where=where, fix="flatten the row")
    return data


_JSON_FIX = "one object a line is expected; a JSON array becomes that with: jq -c '.[]' FILE > FILE.jsonl"


def _decode_utf8(raw: bytes, where: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8"
        column = len(raw[: error.start].decode("utf-8")) + 1
        fix = "convert the file: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW (or from UTF-16)"
        raise InputError(what, where=f"{where}:{column}", fix=fix) from None


def _check_strings(text: str, data: Json, where: str) -> None:
    """Refuse what JSON can spell but no text holds: half a surrogate pair, and NUL, which cuts texts in C programs."""
    if "\\u0000" in text and _ESCAPED_NUL.search(text):
        raise InputError("a string contains \\u0000", where=where, fix="remove the NUL character")
    if _ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise InputError(f"half a character, {half}", where=where, fix="write both halves or neither") from None


def _depth(data: Json) -> int:
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
        raise InputError(f"the key {twice!r} appears twice in one object", fix="keep one of them")
    return data


def _float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise InputError(f"the number {literal} does not fit", fix="write it as a string")
    return value


def _constant(literal: str) -> NoReturn:
    raise InputError(f"{literal} is not JSON", fix="write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)

KINDS = {
    ".jsonl": (find_lines, decode_json),
    ".ndjson": (find_lines, decode_json),
    ".json": (find_lines, decode_json),
    ".txt": (find_whole, decode_text),
    ".md": (find_whole, decode_text),
}
