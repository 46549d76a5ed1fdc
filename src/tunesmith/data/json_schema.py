"""Whether the JSON of an answer follows the recipe's `response_schema`.

    schema -> make_validator -> Validator;  value, validator -> find_violation -> "" or why not

Answers are strangers' texts, or those of a model that repeats itself: any depth, number and length
is judged, in linear time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json

SETTING = "response_schema"


def make_validator(schema: Json) -> Validator:
    """Return a validator that fetches nothing. Raises InputError unless it is a JSON schema."""
    validator_class = validator_for(schema, default=Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except SchemaError as error:
        message = f"not a JSON schema: {error.message}"
        where = f"{SETTING}: {error.json_path}"
        raise InputError(message, where=where, fix="correct the schema") from None
    # a nested `$ref: "#"` would otherwise go back to the class that `$schema` names
    content = {key: value for key, value in schema.items() if key != "$schema"}
    return _extend_class(validator_class)(content, registry=Registry())


def find_violation(value: Any, validator: Validator) -> str:
    """Return in a line why a value violates the schema; empty if it does not. Raises InputError for
    a `$ref` out of the schema."""
    try:
        error = next(validator.iter_errors(value), None)
    except Unresolvable as missing:
        fix = "put the referenced definition into the schema itself"
        message = f"the schema refers to {missing.ref!r:.200}, which it does not contain"
        raise InputError(message, where=SETTING, fix=fix) from None
    except RecursionError:
        return "nested too deeply to be checked against the schema"
    except OverflowError:  # of 1e999 or an integer of 400 digits
        return "a number is out of range"
    return "" if error is None else error.message


@lru_cache(maxsize=16)
def _extend_class(validator_class: type[Validator]) -> type[Validator]:
    return extend(validator_class, {"uniqueItems": _check_unique})


def _check_unique(
    validator: Validator, is_required: bool, items: Any, schema: Json
) -> Iterator[ValidationError]:
    """Judge `uniqueItems` in linear time: jsonschema compares each object with each other."""
    del schema
    if not is_required or not validator.is_type(items, "array"):
        return
    values = cast("list[Any]", items)
    if len({_freeze(value) for value in values}) < len(values):
        yield ValidationError("the items of a list are not unique")


def _freeze(value: Any) -> Any:
    """Return a hashable value, equal for equal JSON alone: 1 is 1.0, but not true."""
    if isinstance(value, bool):
        return bool, value
    if isinstance(value, dict):
        return frozenset((key, _freeze(item)) for key, item in cast("Json", value).items())
    if isinstance(value, list):
        return tuple(_freeze(item) for item in cast("list[Any]", value))
    return value
