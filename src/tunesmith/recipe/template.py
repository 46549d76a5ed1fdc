"""`tunesmith init`: a recipe to start from, with the schema beside it for editors.

Either every key with its default, commented out; that text is made from the recipe model itself, so that it names every
key and says what the key does. Or another tool's config, translated; what could not be is written at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tunesmith.core.atomic import disk_errors, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import json_bytes
from tunesmith.recipe.importers.convert import Translation, translate
from tunesmith.recipe.importers.draft import Left
from tunesmith.recipe.schema import FILE_KEYS, KEYS, Recipe, recipe_schema

SCHEMA_FILE = "recipe.schema.json"
MODEL, DATA = "smollm2-135m-instruct", "train.jsonl"

SECTIONS = {
    "model": "What is trained",
    "data": "On what",
    "max_length": "Lengths and steps",
    "learning_rate": "The optimizer",
    "loss": "Pairs of a better and a worse answer, with stage: preference",
    "lora_r": "The adapter",
    "dtype": "How it is computed, measured and saved",
}


@dataclass(frozen=True)
class Written:
    """The files that `tunesmith init` wrote; with --from, which tool the config is of and what was left of it."""

    recipe: Path
    schema: Path
    tool: str = ""
    why: str = ""
    left: tuple[Left, ...] = ()


def write_recipe(path: Path, *, model: str | None = None, data: str | None = None) -> Written:
    """Every key with its default. Raises InputError if there is a recipe at `path` already."""
    given = {"model": model or MODEL, "data": data or DATA}
    return Written(path, _write(path, commented_recipe(**given)))


def write_translated(path: Path, config: Path, *, model: str | None = None, data: str | None = None) -> Written:
    """The config of another tool as a recipe; `model` and `data` win over it. Raises InputError as `translate` does."""
    given = {key: value for key, value in (("model", model), ("data", data)) if value}
    translation = translate(config, path, given)
    schema = _write(path, translated_recipe(translation, config.name))
    return Written(path, schema, translation.tool, translation.why, translation.left)


def _write(path: Path, text: str) -> Path:
    """The recipe, and the schema beside it, which is brought up to date if it is there."""
    if path.exists():
        raise InputError("there is a file with this name already", where=str(path), fix="name another file")
    schema = path.parent / SCHEMA_FILE
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(schema, json_bytes(recipe_schema(), indent=2))
    write_file(path, text.encode())
    return schema


# ---------------------------------------------------------------- the two texts


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


def translated_recipe(translation: Translation, name: str) -> str:
    """The keys that the config sets, each with where it comes from, and what was left as comments."""
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Translated from {name} of {translation.tool}. Keys left out are decided by rules: see `tunesmith plan`.",
    ]
    section = ""
    for field, key in KEYS.items():
        section = SECTIONS.get(key, section)
        value = translation.values.get(key)
        if value is None or value == Recipe.model_fields[field].default:
            continue
        if section:
            lines += ["", f"# {section}"]
            section = ""
        lines += _entry(key, value, translation.notes[key])
    lines += [f"# {line}" if line else "" for line in left_lines(translation.left)]
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, note: str) -> list[str]:
    """One key; data sources one a line, unless there is but a path."""
    comment = "" if note == key else f"  # {one_line(note)}"
    if key in FILE_KEYS and isinstance(value, list):
        if len(value) > 1 or value[0].keys() != {"path"}:
            return [f"{key + ':':<36}{comment}".rstrip(), *(f"  - {_scalar(source)}" for source in value)]
        value = value[0]["path"]
    return [f"{key + ': ' + _scalar(value):<36}{comment}".rstrip()]


def left_lines(left: tuple[Left, ...]) -> Iterator[str]:
    """What was not translated and why, in lines: what may matter one by one, then what does not, by reason."""
    lost = [one for one in left if one.matters]
    if lost:
        yield from ("", "Not translated, and it may matter:")
    for one in lost:
        yield f"  {one_line(one.key)}: {one_line(_scalar(one.value), 60)} -> {one.reason}"
    reasons = list(dict.fromkeys(one.reason for one in left if not one.matters))
    if reasons:
        yield from ("", "Not needed here:")
    for reason in reasons:
        yield f"  {', '.join(one_line(one.key) for one in left if one.reason == reason)} -> {reason}"


def one_line(text: str, most: int = 90) -> str:
    """Text from another file, fit for a comment."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def _scalar(value: object) -> str:
    """A default as YAML; an empty list is how the model holds what is not given, and an empty mapping is auto."""
    if isinstance(value, BaseModel):
        value = "auto"
    return (
        yaml.safe_dump(
            None if value == () else value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
        )
        .removesuffix("\n...\n")
        .strip()
    )
