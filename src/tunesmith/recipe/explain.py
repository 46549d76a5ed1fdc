"""Messages about recipe keys and values.

In: a key that is not ours, or an error of pydantic with the recipe's JSON schema. Out: one line of
text. Left out: finding the errors and their place in the file (load.py)."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from tunesmith.core.types import Json
from tunesmith.recipe.fields import (
    Constraint,
    DataSource,
    GuardConfig,
    MixtureConfig,
    PromptForm,
    RehearsalConfig,
)
from tunesmith.recipe.objectives import PairLoss, SchedulerKwargs
from tunesmith.recipe.schema import NAMES
from tunesmith.recipe.sweep import SweepConfig, ValueRange

MAX_SHOWN_CHARS = 80  # of a key or value

REPLACEMENTS: dict[str, str] = {
    key: row["do"] for row in NAMES["replacements"] for key in row["keys"].split()
}
VALUE_REPLACEMENTS: dict[str, dict[str, str]] = NAMES["value_replacements"]
MAX_NAMED_FIELDS = 5
MAPPINGS: tuple[type[BaseModel], ...] = (
    Constraint,
    DataSource,
    GuardConfig,
    MixtureConfig,
    PairLoss,
    PromptForm,
    RehearsalConfig,
    SchedulerKwargs,
    SweepConfig,
    ValueRange,
)
TYPE_TEXTS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
}
BOUND_TEXTS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}

Location = tuple[str | int, ...]


def describe_unknown_key(raw_key: str, valid_keys: Iterable[str]) -> str:
    """Say what to do about an unknown key: a replacement, or the closest valid key."""
    key = normalize_key(raw_key)
    raw_key = raw_key[:MAX_SHOWN_CHARS]
    if key in REPLACEMENTS:
        return f"'{raw_key}' is not a key here: {REPLACEMENTS[key]}"
    close_keys = difflib.get_close_matches(key, valid_keys, n=1)
    hint = f"did you mean '{close_keys[0]}'?" if close_keys else "`tunesmith schema` lists all"
    return f"unknown key '{raw_key}'; {hint}"


def normalize_key(raw_key: str) -> str:
    return raw_key.lstrip("-").replace("-", "_")


# ---------------------------------------------------------------- invalid values


def locate_error(detail: ErrorDetails, recipe_schema: Json) -> Location:
    """Return the place of an error in the recipe; pydantic's names of union members are cut off."""
    location: Location = ()
    schema: Json | None = recipe_schema
    for part in detail["loc"]:
        schema = _find_child(schema, part, recipe_schema)
        if schema is None:
            is_unknown_key = detail["type"] == "extra_forbidden"
            return (*location, part) if is_unknown_key else location
        location = (*location, part)
    return location


def _find_child(schema: Json, part: str | int, recipe_schema: Json) -> Json | None:
    """Return the schema of a key or list item, looking into every alternative."""
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            option = recipe_schema["$defs"][option["$ref"].rpartition("/")[2]]
        if isinstance(part, int) and "items" in option:
            return option["items"]
        if part in option.get("properties", {}):
            return option["properties"][part]
    return None


def describe_error(
    raw_key: str, value: Any, location: Location, detail: ErrorDetails, recipe_schema: Json
) -> str:
    """Describe an error at `location`; `raw_key` and `value` are the recipe key as written."""
    key = location[0]
    advice = VALUE_REPLACEMENTS.get(str(key), {}).get(value) if isinstance(value, str) else None
    if advice is not None:
        return f"{raw_key}: '{value}' is not a value here: {advice}"
    schemas = [recipe_schema]
    for part in location:
        if (child := _find_child(schemas[-1], part, recipe_schema)) is not None:
            schemas.append(child)
    parent = raw_key + _format_path(location[1:-1])
    if detail["type"] == "extra_forbidden":
        valid_keys = _list_keys(schemas[-1], recipe_schema)
        return f"{parent}: {describe_unknown_key(str(location[-1]), valid_keys)}"
    if detail["type"] == "missing":
        return f"{parent} has no '{location[-1]}'"
    name = raw_key + _format_path(location[1:])
    if detail["type"] == "value_error":
        return f"{name}: {detail['msg'].removeprefix('Value error, ')}"
    invalid_value = value if len(location) == 1 else detail["input"]
    return f"{name}: expected {describe_schema(schemas[-1])}, found {describe_value(invalid_value)}"


def _format_path(parts: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def _list_keys(schema: Json, recipe_schema: Json) -> list[str]:
    """List the keys of the mapping that a schema allows."""
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            return list(recipe_schema["$defs"][option["$ref"].rpartition("/")[2]]["properties"])
    return []


def describe_schema(schema: Json) -> str:
    """Describe the values that a JSON schema allows."""
    if "anyOf" in schema:
        options = cast("list[Json]", schema["anyOf"])
        return " or ".join(opt.get("description") or describe_schema(opt) for opt in options)
    if "$ref" in schema:
        return MAPPING_TEXTS[schema["$ref"].rpartition("/")[2]]
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"'{value}'" for value in values)
    items = schema.get("items", {})
    if items.get("type") == "string" and "format" not in items:
        return "a list of names"
    name = "a path" if schema.get("format") == "path" else TYPE_TEXTS[schema["type"]]
    bounds = [f"{text} {schema[bound]}" for bound, text in BOUND_TEXTS.items() if bound in schema]
    return f"{name} {' and '.join(bounds)}".strip()


def describe_value(value: Any) -> str:
    """Describe a value from YAML."""
    if isinstance(value, bool):
        text = str(value).lower()
        return f"{text} (YAML reads on, yes, off and no as true and false; quotes make them text)"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value[:MAX_SHOWN_CHARS]}'" if value else "an empty text"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, (list, dict)):
        kind = "list" if isinstance(value, list) else "mapping"
        return f"the {kind} {reprlib.repr(cast('Any', value)):.60}"
    return (
        f"the {type(value).__name__} {str(value)[:MAX_SHOWN_CHARS]} (quote it to make it a string)"
    )


def _describe_mapping(model: type[BaseModel]) -> str:
    names = list(model.model_fields)
    if len(names) > MAX_NAMED_FIELDS:
        names = [*names[: MAX_NAMED_FIELDS - 2], "..."]
    return f"a mapping {{{', '.join(names)}}}"


MAPPING_TEXTS = {model.__name__: _describe_mapping(model) for model in MAPPINGS}
