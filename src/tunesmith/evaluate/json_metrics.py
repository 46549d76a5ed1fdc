"""Whether an answer is JSON, follows a schema, and holds the right fields.

Each is a function (answer, expected, schema) -> [0, 1]. A whole answer is judged: a fence or a
sentence around the JSON makes it none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json


def json_valid(answer: str, expected: str, schema: Any) -> float:
    """The whole answer is JSON: no fence, no sentence around it."""
    del expected, schema
    return float(_parse_json(answer) is not NOT_JSON)


def schema_valid(answer: str, expected: str, schema: Any) -> float:
    """The whole answer is JSON that follows the schema. Nothing is fetched for a `$ref`."""
    del expected
    value = _parse_json(answer)
    if value is NOT_JSON or schema is None:
        return 0.0
    try:
        return float(validator_for(schema)(schema, registry=Registry()).is_valid(value))
    except Unresolvable as error:
        raise InputError(
            f"the schema refers to {error.ref!r}, which it does not hold", where="response_schema"
        ) from error


def field_f1(answer: str, expected: str, schema: Any) -> float:
    """F1 over the (path, value) pairs of the expected and the given JSON; a list's places are part
    of the path, an empty object or list is a value. 0 for an answer that is not JSON; 1 only for
    the same JSON, key order aside."""
    del schema
    expected_value, answer_value = _parse_json(expected), _parse_json(answer)
    if expected_value is NOT_JSON or answer_value is NOT_JSON:
        return 0.0
    expected_pairs, answer_pairs = (
        set(_iter_fields(expected_value)),
        set(_iter_fields(answer_value)),
    )
    return 2 * len(expected_pairs & answer_pairs) / (len(expected_pairs) + len(answer_pairs))


NOT_JSON = object()  # None is JSON


def _parse_json(text: str) -> Any:
    """The JSON value of a text, or NOT_JSON; strict: Python also reads NaN, which is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return NOT_JSON


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _iter_fields(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], str, Any]]:
    """(path, kind, value) of every leaf. The kind keeps true apart from 1, which Python holds to be
    equal."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _iter_fields(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _iter_fields(item, (*path, index))
    elif isinstance(value, bool | dict | list):
        yield path, type(value).__name__, str(value)
    else:
        yield path, "", value


def check_schema(schema: Json) -> None:
    """Raises InputError for what is no JSON schema."""
    try:
        validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(
            f"not a JSON schema: {error.message}", where=f"schema: {error.json_path}"
        ) from error
