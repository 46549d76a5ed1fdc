"""Our frozen dataclasses as JSON, and back.

    to_json(plan) -> plain dict; from_json(Plan, dict) -> plan; read_json(path)

Strict on purpose: NaN, infinities and objects that are not plain values raise ValueError or
TypeError, which name the place of the value. They are mistakes of ours: nothing that is not finite
may be written as a result."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from tunesmith.core.errors import InputError
from tunesmith.core.types import Plan

T = TypeVar("T")


def to_jsonable(value: Any, path: str = "value") -> Any:
    """Dicts, lists, texts, numbers, switches and None. NumPy numbers become Python's, paths become
    texts."""
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
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Plan):
        return to_jsonable(value.to_json(), path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {
            field.name: to_jsonable(getattr(value, field.name), f"{path}.{field.name}")
            for field in fields
        }
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): to_jsonable(item, f"{path}.{key}") for key, item in items}
    if isinstance(value, (list, tuple)):
        return [
            to_jsonable(item, f"{path}[{index}]")
            for index, item in enumerate(cast("list[Any]", value))
        ]
    raise TypeError(f"{path} is a {type(value).__name__}, which has no JSON form")


def dump_json(value: Any, *, indent: int | None = None) -> bytes:
    """UTF-8, one line unless `indent` is given. A lone surrogate, which UTF-8 cannot hold, is
    written as its escape."""
    text = json.dumps(to_jsonable(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode(errors="backslashreplace") + b"\n"


def parse_as(cls: type[T], value: Any, where: str = "") -> T:
    """A dataclass of types.py from its JSON form. Raises InputError naming the first field that
    does not fit."""
    try:
        return TypeAdapter(cls).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"not a {cls.__name__}: {location + ': ' if location else ''}{first['msg']}",
            where=where,
        ) from None


def read_json(path: Path) -> Any:
    """Raises InputError with file:line when the file is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError("there is no such file", where=str(path), fix="check the path") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not JSON: byte {error.start} is not UTF-8", where=str(path)) from None
