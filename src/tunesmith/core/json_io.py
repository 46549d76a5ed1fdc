"""Frozen dataclasses as JSON, and back.

    to_jsonable(plan) -> dict;  parse_as(Plan, dict) -> plan;  read_json(path)

Strict: NaN, infinities and other objects raise ValueError or TypeError with the path of the value,
since a number that is not finite must never be written as a result. Left out: rows of data files
(`data/readers/decode.py`), which tell duplicate keys and lone surrogates by line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast, runtime_checkable

from pydantic import BaseModel, TypeAdapter, ValidationError

from tunesmith.core.errors import InputError, raise_if_machine_failed

T = TypeVar("T")
Json = dict[str, Any]
MAX_FILE_BYTES = 2**28  # of a file that is read as a whole
MAX_TEXT_VALUES = 100_000  # of JSON in a text: answers, arguments of tool calls
JSON_TEXT = r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'  # closed, or up to the end
_JSON_VALUE = re.compile(JSON_TEXT + r"|[\[{]", re.DOTALL)
MAX_DIGITS = 300  # of an integer that a float can hold


@runtime_checkable
class HasJsonForm(Protocol):
    """An object with a JSON form of its own, such as a plan."""

    def to_json(self) -> Json: ...


def to_jsonable(value: Any, path: str = "value") -> Any:
    """Return `value` as dicts, lists, strings, numbers, booleans and None.

    NumPy numbers become Python numbers, and paths strings. Raises ValueError for a number that is
    not finite, TypeError for another object; both name its path."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{path} is {number}")
        return number
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        items = cast("list[Any]", value)
        return [to_jsonable(item, f"{path}[{index}]") for index, item in enumerate(items)]
    fields = _get_fields(value)
    if fields is None:
        raise TypeError(f"{path} is a {type(value).__name__}, which has no JSON form")
    return {str(key): to_jsonable(item, f"{path}.{key}") for key, item in fields.items()}


def _get_fields(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, HasJsonForm):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return cast("Mapping[Any, Any]", value) if isinstance(value, Mapping) else None


def iter_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf; a list is one leaf."""
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, Any]", value).items():
            yield from iter_leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def dump_json(value: Any, *, indent: int | None = None) -> bytes:
    """Return UTF-8, on one line unless `indent` is given. A lone surrogate is escaped, since UTF-8
    cannot encode it."""
    text = json.dumps(to_jsonable(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode(errors="backslashreplace") + b"\n"


def parse_as(cls: type[T], value: Any, where: str = "", fix: str = "") -> T:
    """Return a value of the type `cls` from its JSON form. Raises InputError with the first field
    that does not match."""
    try:
        return _make_adapter(cls).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        problem = f"{location}: {first['msg']}" if location else first["msg"]
        raise InputError(f"not a {cls.__name__}: {problem}", where=where, fix=fix) from None


@lru_cache(maxsize=64)
def _make_adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)  # takes milliseconds, and every reply of a server is parsed


def read_json(
    path: Path,
    *,
    key: str = "",
    fix: str = "",
    max_values: int | None = None,
    is_ours: bool = False,
) -> Any:
    """Read a JSON file. Raises InputError with file:line:column if it is missing or broken, or has
    more than `max_values` commas and brackets: a value takes up to 200 bytes.

    `key` is the setting that named the file. One that `is_ours` has finite numbers only."""
    where = f"{key}: {path}" if key else str(path)
    content = read_file(path, where=where, fix=fix)
    if max_values is not None and count_json_marks(content) > max_values:
        message = f"more than {max_values:,} commas and brackets"
        raise InputError(message, where=where, fix=fix)
    try:
        return load_finite_json(content) if is_ours else json.loads(content)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            where = f"{where}:{error.lineno}:{error.colno}"
        raise InputError(describe_json_error(error), where=where, fix=fix) from None


def read_file(
    path: Path, *, where: str = "", fix: str = "", max_bytes: int | None = MAX_FILE_BYTES
) -> bytes:
    """Return the content of a file. Raises InputError if it is missing, no file or larger than
    `max_bytes`, MachineError if the disk fails."""
    where = where or str(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # 0 of a pipe
            limit = -1 if max_bytes is None else min(size or max_bytes, max_bytes) + 1
            content = file.read(limit)
    except FileNotFoundError:
        raise InputError("no such file", where=where, fix=fix or "check the path") from None
    except OSError as error:
        raise_if_machine_failed(error, where)
        raise InputError(f"cannot be read: {error.strerror}", where=where, fix=fix) from None
    except ValueError as error:  # a NUL in the path
        raise InputError(f"cannot be read: {error}", where=where, fix=fix) from None
    if max_bytes is not None and len(content) > max_bytes:
        raise InputError(f"more than {max_bytes:,} bytes", where=where, fix=fix)
    return content


def load_finite_json(content: str | bytes) -> Any:
    """Decode JSON that tunesmith wrote. Raises ValueError for anything else and for a number that
    no float can hold, RecursionError if it is nested too deeply.

    Python reads NaN, Infinity and integers of any length. A file with one of them is damaged or
    forged, and readers compute with what they find."""
    return json.loads(
        content, parse_constant=_refuse, parse_float=_parse_float, parse_int=_parse_int
    )


def _parse_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text:.20} is not a finite number")


def describe_json_error(error: ValueError | RecursionError) -> str:
    """Return what `json.loads` could not read: valid JSON, too, has numbers and depths that Python
    refuses."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid JSON: byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "integer string conversion" in str(error):
        return f"an integer has more than {sys.get_int_max_str_digits():,} digits"
    return f"not valid JSON: {error}"


def read_json_object(
    path: Path,
    *,
    is_optional: bool = False,
    fix: str = "",
    max_values: int | None = None,
    is_ours: bool = False,
) -> Json:
    """Read a JSON file with an object; one that is missing is empty if `is_optional`. Raises
    InputError for anything else."""
    if is_optional and not path.is_file():
        return {}
    content = read_json(path, fix=fix, max_values=max_values, is_ours=is_ours)
    if not isinstance(content, dict):
        raise InputError("not a JSON object", where=str(path), fix=fix)
    return cast("Json", content)


def count_json_marks(content: bytes) -> int:
    """Return the commas and opening brackets of JSON, at least as many as its values."""
    return content.count(b",") + content.count(b"[") + content.count(b"{")


def has_more_values(text: str, limit: int) -> bool:
    """Return whether JSON has more than `limit` keys, texts, objects and arrays, without decoding
    it: one of them takes up to 200 bytes. Numbers, which are small, are not counted."""
    if (text.count('"') + 1) // 2 + text.count("[") + text.count("{") <= limit:
        return False
    return any(islice(_JSON_VALUE.finditer(text), limit, None))


def measure_depth(value: Any) -> int:
    """Return how many objects and arrays are nested in each other, without recursion."""
    level: list[Any] = [[value]]
    depth = -1
    while level:
        depth += 1
        next_level: list[Any] = []
        for outer in level:
            children = cast("Json", outer).values() if isinstance(outer, dict) else outer
            next_level += (child for child in children if isinstance(child, (dict, list)))
        level = next_level
    return depth
