"""`tunesmith init`: a recipe to start from, with the schema beside it for editors.

Either every key with its default, commented out; that text is made from the recipe model itself, so
that it names every key and says what the key does. Or another tool's config, translated; what could
not be is written at its end."""

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
from tunesmith.recipe.schema import FILE_KEYS, KEYS, Recipe, build_recipe_schema

SCHEMA_FILE = "recipe.schema.json"
DEFAULT_MODEL, DEFAULT_DATA = "smollm2-135m-instruct", "train.jsonl"

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
class InitResult:
    """The files that `tunesmith init` wrote; with --from, which tool the config is of and what was
    left of it."""

    recipe: Path
    schema: Path
    tool: str = ""
    reason: str = ""
    untranslated: tuple[UntranslatedKey, ...] = ()


def write_recipe(path: Path, *, model: str | None = None, data: str | None = None) -> InitResult:
    """Every key with its default. Raises InputError if there is a recipe at `path` already."""
    values = {"model": model or DEFAULT_MODEL, "data": data or DEFAULT_DATA}
    return InitResult(path, _write_files(path, build_commented_recipe(**values)))


def write_translated(
    path: Path, config: Path, *, model: str | None = None, data: str | None = None
) -> InitResult:
    """The config of another tool as a recipe; `model` and `data` win over it. Raises InputError as
    `translate` does."""
    overrides = {key: value for key, value in (("model", model), ("data", data)) if value}
    translation = translate(config, path, overrides)
    schema = _write_files(path, build_translated_recipe(translation, config.name))
    return InitResult(path, schema, translation.tool, translation.reason, translation.untranslated)


def _write_files(path: Path, text: str) -> Path:
    """The recipe, and the schema beside it, which is brought up to date if it is there."""
    if path.exists():
        raise InputError(
            "there is a file with this name already", where=str(path), fix="name another file"
        )
    schema = path.parent / SCHEMA_FILE
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(schema, dump_json(build_recipe_schema(), indent=2))
    write_file(path, text.encode())
    return schema


# ---------------------------------------------------------------- the two texts


def build_commented_recipe(*, model: str, data: str) -> str:
    """Every key with its default, commented out, but for the model and the data."""
    values = {"model": model, "data": data}
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# `tunesmith plan` shows what every auto becomes, and why. `tunesmith train` runs it.",
    ]
    for name, field in Recipe.model_fields.items():
        key = KEYS[name]
        if key in SECTIONS:
            lines += ["", f"# {SECTIONS[key]}"]
        line = (
            f"{key}: {_format_scalar(values[key])}"
            if key in values
            else f"# {key}: {_format_scalar(field.default)}"
        )
        lines.append(f"{line:<36}  # {field.description}")
    return "\n".join(lines) + "\n"


def build_translated_recipe(translation: Translation, name: str) -> str:
    """The keys that the config sets, each with where it comes from, and what was left as
    comments."""
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
        lines += _format_entry(key, value, translation.notes[key])
    lines += [f"# {line}" if line else "" for line in format_untranslated(translation.untranslated)]
    return "\n".join(lines) + "\n"


def _format_entry(key: str, value: Any, note: str) -> list[str]:
    """One key; data sources one a line, unless there is but a path."""
    comment = "" if note == key else f"  # {to_single_line(note)}"
    if key in FILE_KEYS and isinstance(value, list):
        if len(value) > 1 or value[0].keys() != {"path"}:
            return [
                f"{key + ':':<36}{comment}".rstrip(),
                *(f"  - {_format_scalar(source)}" for source in value),
            ]
        value = value[0]["path"]
    return [f"{key + ': ' + _format_scalar(value):<36}{comment}".rstrip()]


def format_untranslated(untranslated: tuple[UntranslatedKey, ...]) -> Iterator[str]:
    """What was not translated and why, in lines: what may matter one by one, then what does not, by
    reason."""
    important = [entry for entry in untranslated if entry.is_important]
    if important:
        yield from ("", "Not translated, and it may matter:")
    for entry in important:
        yield f"  {to_single_line(entry.key)}: {to_single_line(_format_scalar(entry.value), 60)} -> {entry.reason}"
    reasons = list(dict.fromkeys(entry.reason for entry in untranslated if not entry.is_important))
    if reasons:
        yield from ("", "Not needed here:")
    for reason in reasons:
        yield f"  {', '.join(to_single_line(entry.key) for entry in untranslated if entry.reason == reason)} -> {reason}"


def to_single_line(text: str, max_chars: int = 90) -> str:
    """Text from another file, fit for a comment."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= max_chars else plain[: max_chars - 1] + "…"


def _format_scalar(value: object) -> str:
    """A default as YAML; an empty list is how the model holds what is not given, and an empty
    mapping is auto."""
    if isinstance(value, BaseModel):
        value = "auto"
    return (
        yaml.safe_dump(
            None if value == () else value,
            default_flow_style=True,
            sort_keys=False,
            allow_unicode=True,
            width=10**6,
        )
        .removesuffix("\n...\n")
        .strip()
    )
