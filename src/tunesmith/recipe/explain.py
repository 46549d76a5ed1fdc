"""Values of a recipe and what is expected of them, in words for people.

In: a JSON schema, or a value from YAML. Out: a few words. Left out: where it stands, and what to do
(recipefile.py)."""

from __future__ import annotations

import reprlib
from typing import Any

from tunesmith.core.types import Json


def describe_schema(schema: Json) -> str:
    """A JSON schema of one value, in words."""
    if "anyOf" in schema:
        return " or ".join(
            option.get("description") or describe_schema(option) for option in schema["anyOf"]
        )
    if "$ref" in schema:
        return MAPPING_TEXTS[schema["$ref"].rpartition("/")[2]]
    if "const" in schema or "enum" in schema:
        return " or ".join(f"'{value}'" for value in schema.get("enum", [schema.get("const")]))
    bounds = [f"{text} {schema[bound]}" for bound, text in BOUND_TEXTS.items() if bound in schema]
    if schema.get("items", {}).get("type") == "string" and "format" not in schema["items"]:
        return "a list of names"
    name = "a path" if schema.get("format") == "path" else TYPE_TEXTS[schema["type"]]
    return " ".join([name, " and ".join(bounds)]).strip()


def describe_value(value: Any) -> str:
    """A value from YAML, in words."""
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads on, yes, off and no as true and false; quotes make them text)"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value}'" if value else "an empty text"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, (list, dict)):
        return f"the {'list' if isinstance(value, list) else 'mapping'} {reprlib.repr(value):.60}"
    return f"the {type(value).__name__} {value} (quotes make it a text)"


MAPPING_TEXTS = {
    "DataSource": "a mapping {path, format, columns, ...}",
    "Rehearsal": "a mapping {data, ratio, shift}",
    "Mixture": "a mapping {temperature, limit}",
    "PairLoss": "a mapping {name, beta, gamma, nll_coefficient}",
    "Guard": "a mapping {collapse, forgetting, margin, patience, probe_steps}",
    "Form": "a mapping {prompt, shots}",
    "Constraint": "a mapping {match, text, check, name, mode}",
}

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
