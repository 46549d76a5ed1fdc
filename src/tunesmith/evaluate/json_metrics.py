"""Metrics of JSON answers: is it JSON, does it follow a schema, are its fields right?

Each metric is a function (answer, expected, schema) -> [0, 1] of the complete answer: JSON within a
code fence or a sentence is not JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from jsonschema.protocols import Validator

from tunesmith.data.answer_values import normalize_value, refuse_constant
from tunesmith.data.json_schema import find_violation, make_validator


def json_valid(answer: str, expected: str, schema: Any) -> float:
    """Return 1 if the complete answer is JSON, without a fence or a sentence around it."""
    del expected, schema
    return float(_parse_json(answer) is not NOT_JSON)


def schema_valid(answer: str, expected: str, schema: Any) -> float:
    """Return 1 if the complete answer is JSON that follows the schema. A `$ref` fetches nothing."""
    del expected
    value = _parse_json(answer)
    if value is NOT_JSON or schema is None:
        return 0.0
    return float(not find_violation(value, _read_validator(json.dumps(schema))))


@lru_cache(maxsize=16)
def _read_validator(schema_json: str) -> Validator:
    """Return the validator of a schema, which is checked once and not for each answer."""
    return make_validator(json.loads(schema_json))


def field_f1(answer: str, expected: str, schema: Any) -> float:
    """Return F1 over the (path, value) pairs of the expected and the generated JSON.

    The order of a list of plain values does not count, how often each occurs does. The indices of
    other lists are part of the path; an empty object or list is a value. 0 for an answer that is
    not JSON, 1 only for the same JSON up to the order of keys and of plain values.
    """
    del schema
    expected_value = _parse_json(expected)
    answer_value = _parse_json(answer)
    if expected_value is NOT_JSON or answer_value is NOT_JSON:
        return 0.0
    expected_pairs = Counter(_iter_fields(expected_value))
    answer_pairs = Counter(_iter_fields(answer_value))
    common = (expected_pairs & answer_pairs).total()
    return 2 * common / (expected_pairs.total() + answer_pairs.total())


ANY_INDEX = -1  # of the values of a list whose order does not count
NOT_JSON = object()  # not None, which is the value of null


def _parse_json(text: str) -> Any:
    """Return the JSON value of a text, or NOT_JSON."""
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return NOT_JSON


def _iter_fields(
    value: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield (path, value as JSON) of every leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _iter_fields(item, (*path, key))
    elif isinstance(value, list) and value:
        has_order = any(isinstance(item, dict | list) for item in value)
        for index, item in enumerate(value):
            yield from _iter_fields(item, (*path, index if has_order else ANY_INDEX))
    else:
        yield path, json.dumps(normalize_value(value))
