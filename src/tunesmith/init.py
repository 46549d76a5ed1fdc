"""`tunesmith init`: a commented recipe to start from, with the schema beside it for editors.

The text is made from the recipe model itself, so that it names every key and says what the key does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from tunesmith.atomic import disk_errors, write_file
from tunesmith.errors import InputError
from tunesmith.jsonfile import json_bytes
from tunesmith.recipe import KEYS, Recipe, recipe_schema

SCHEMA_FILE = "recipe.schema.json"

SECTIONS = {
    "model": "What is trained",
    "data": "On what",
    "max_length": "Lengths and steps",
    "learning_rate": "The optimizer",
    "lora_r": "The adapter",
    "dtype": "How it is computed, measured and saved",
}


@dataclass(frozen=True)
class Written:
    """The files that `tunesmith init` wrote."""

    recipe: Path
    schema: Path


def write_recipe(path: Path, *, model: str, data: str) -> Written:
    """Raises InputError if there is a recipe at `path` already; a schema file beside it is brought up to date."""
    if path.exists():
        raise InputError("there is a file with this name already", where=str(path), fix="name another file")
    schema = path.parent / SCHEMA_FILE
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(schema, json_bytes(recipe_schema(), indent=2))
    write_file(path, commented_recipe(model=model, data=data).encode())
    return Written(path, schema)


def commented_recipe(*, model: str, data: str) -> str:
    """Every key with its default, commented out, but for the model and the data."""
    given = {"model": model, "data": data}
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# `tunesmith plan` shows what every auto becomes, and why. `tunesmith train` runs it.",
    ]
    for name, field in Recipe.model_fields.items():
        key = KEYS[name]
        if key in SECTIONS:
            lines += ["", f"# {SECTIONS[key]}"]
        line = f"{key}: {_scalar(given[key])}" if key in given else f"# {key}: {_scalar(field.default)}"
        lines.append(f"{line:<36}  # {field.description}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    """A default as YAML; an empty list is how the model holds what is not given."""
    return yaml.safe_dump(None if value == () else value, default_flow_style=True).removesuffix("\n...\n").strip()
