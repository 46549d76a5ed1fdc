"""`tunesmith init`: write a recipe, and its JSON schema for editors.

Either every key with its default, commented out and described, or another tool's config translated,
with what could not be translated at the end. Left out: the translation (importers/)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from tunesmith.core.atomic import disk_errors, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.recipe.importers.convert import Translation, translate
from tunesmith.recipe.importers.draft import UntranslatedKey
from tunesmith.recipe.schema import FILE_KEYS, Recipe, build_recipe_schema

SCHEMA_FILE = "recipe.schema.json"
DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_DATA = "train.jsonl"
COMMENT_COLUMN = 36
MAX_VALUE_CHARS = 60

SECTIONS = {
    "model": "Model",
    "data": "Data",
    "max_length": "Lengths and steps",
    "learning_rate": "Optimizer",
    "loss": "Loss",
    "lora_r": "Adapter",
    "dtype": "Computation, evaluation and checkpoints",
}


@dataclass(frozen=True)
class InitResult:
    """The files that `tunesmith init` wrote; with --from, the tool and the untranslated keys."""

    recipe: Path
    schema: Path
    tool: str = ""
    reason: str = ""
    untranslated: tuple[UntranslatedKey, ...] = ()


def write_recipe(path: Path, *, model: str | None = None, data: str | None = None) -> InitResult:
    """Write every key with its default. Raises InputError if `path` exists."""
    text = build_commented_recipe(model=model or DEFAULT_MODEL, data=data or DEFAULT_DATA)
    return InitResult(path, _write_files(path, text))


def write_translated(
    path: Path, config: Path, *, model: str | None = None, data: str | None = None
) -> InitResult:
    """Translate another tool's config; `model` and `data` override it.

    Raises InputError as `translate` does, and if `path` exists."""
    overrides = {key: value for key, value in (("model", model), ("data", data)) if value}
    translation = translate(config, path, overrides)
    schema = _write_files(path, build_translated_recipe(translation, config.name))
    return InitResult(path, schema, translation.tool, translation.reason, translation.untranslated)


def _write_files(path: Path, text: str) -> Path:
    """Write the recipe, and write or update the schema in its folder."""
    if path.exists():
        raise InputError("the file already exists", where=str(path), fix="choose another name")
    schema = path.parent / SCHEMA_FILE
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(schema, dump_json(build_recipe_schema(), indent=2))
    write_file(path, text.encode())
    return schema


# ---------------------------------------------------------------- the two texts


def build_commented_recipe(*, model: str, data: str) -> str:
    """Write every key with its default, commented out except for the model and the data."""
    values = {"model": model, "data": data}
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# `tunesmith plan` shows the value and reason of every auto; `tunesmith train` runs it.",
    ]
    for key, field in Recipe.model_fields.items():
        if key in SECTIONS:
            lines += ["", f"# {SECTIONS[key]}"]
        if key in values:
            setting = f"{key}: {_format_scalar(values[key])}"
        else:
            setting = f"# {key}: {_format_scalar(field.default)}"
        lines.append(f"{setting:<{COMMENT_COLUMN}}  # {field.description}")
    return "\n".join(lines) + "\n"


def build_translated_recipe(translation: Translation, name: str) -> str:
    """Write the keys that the config sets, each with its origin, and the rest as comments."""
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Translated from {name} of {translation.tool}. `tunesmith plan` shows missing keys.",
    ]
    section = ""
    for key, field in Recipe.model_fields.items():
        section = SECTIONS.get(key, section)
        value = translation.values.get(key)
        if value is None or value == field.default:
            continue
        if section:
            lines += ["", f"# {section}"]
            section = ""
        lines += _format_entry(key, value, translation.notes[key])
    lines += [f"# {line}" if line else "" for line in format_untranslated(translation.untranslated)]
    return "\n".join(lines) + "\n"


def _format_entry(key: str, value: Any, note: str) -> list[str]:
    """Format one key; several data sources, or one with options, take a line each."""
    comment = "" if note == key else f"  # {to_single_line(note)}"
    if key in FILE_KEYS and isinstance(value, list):
        if len(value) > 1 or value[0].keys() != {"path"}:
            sources = [f"  - {_format_scalar(source)}" for source in value]
            return [f"{key + ':':<{COMMENT_COLUMN}}{comment}".rstrip(), *sources]
        value = value[0]["path"]
    setting = f"{key}: {_format_scalar(value)}"
    return [f"{setting:<{COMMENT_COLUMN}}{comment}".rstrip()]


def format_untranslated(untranslated: tuple[UntranslatedKey, ...]) -> Iterator[str]:
    """Yield lines on untranslated keys: those that may matter, then the others by reason."""
    important = [entry for entry in untranslated if entry.is_important]
    if important:
        yield from ("", "Not translated, and may matter:")
    for entry in important:
        value = to_single_line(_format_scalar(entry.value), MAX_VALUE_CHARS)
        yield f"  {to_single_line(entry.key)}: {value} -> {entry.reason}"
    keys_by_reason: dict[str, list[str]] = {}
    for entry in untranslated:
        if not entry.is_important:
            keys_by_reason.setdefault(entry.reason, []).append(to_single_line(entry.key))
    if keys_by_reason:
        yield from ("", "Not needed here:")
    for reason, keys in keys_by_reason.items():
        yield f"  {', '.join(keys)} -> {reason}"


def to_single_line(text: str, max_chars: int = 90) -> str:
    """Make text from another file fit for a comment."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= max_chars else plain[: max_chars - 1] + "…"


def _format_scalar(value: object) -> str:
    """Format a value as flow-style YAML; an empty tuple is null, and an empty mapping is auto."""
    if isinstance(value, BaseModel):
        value = "auto"
    text = yaml.safe_dump(
        None if value == () else value,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
    )
    return text.removesuffix("\n...\n").strip()
