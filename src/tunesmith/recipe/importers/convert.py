"""Translating a config of another tool into a recipe.

In: a YAML file of LLaMA-Factory, Axolotl or TRL, and the future path of the recipe, to which its
paths are relative. Out: a Translation with the values of a valid recipe. Keys missing in the config
are left to our rules, not to the other tool's defaults. Left out: writing the recipe
(template.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.importers import axolotl, llamafactory, trl
from tunesmith.recipe.importers.draft import RecipeDraft, UntranslatedKey
from tunesmith.recipe.importers.switches import read_switches
from tunesmith.recipe.importers.tool_defaults import (
    ON_BY_DEFAULT,
    report_silent_defaults,
    report_unused_keys,
)
from tunesmith.recipe.importers.unsupported import skip_remaining_keys
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import KEYS
from tunesmith.recipe.yaml_lines import YamlMapping, read_yaml

DATA_KEYS = ("dataset", "datasets", "pretraining_dataset", "dataset_name")


@dataclass(frozen=True)
class Translation:
    """Recipe values, with the origin of each in `notes`."""

    tool: str
    reason: str
    values: Json
    notes: dict[str, str]
    untranslated: tuple[UntranslatedKey, ...]


def translate(config: Path, recipe: Path, overrides: Json | None = None) -> Translation:
    """Translate a config; `overrides` are recipe values from the command line.

    Raises InputError with file:line if the file is not YAML, not a config of one of the tools,
    contradicts itself, or asks for an unsupported kind of training."""
    document = read_yaml(config)
    for key, line in document.duplicates:
        raise InputError(f"'{key}' is repeated", where=f"{config}:{line}", fix="keep one")
    tool, reason = detect_tool(document)
    document = read_switches(document, tool)
    draft = RecipeDraft(document, config, recipe, dict(document.values))
    overrides = overrides or {}
    if "data" in overrides:
        for key in DATA_KEYS:
            draft.pop_value(key)
    TOOLS[tool][1](draft)
    skip_remaining_keys(draft, ON_BY_DEFAULT[tool])
    report_unused_keys(draft, tool, DATA_KEYS if "data" in overrides else ())
    for key, value in overrides.items():
        draft.values[key] = value
        draft.notes[key] = "set by you"
    _drop_adapter_keys(draft)
    report_silent_defaults(draft, tool)
    _validate_recipe(draft, tool)
    untranslated = sorted(draft.untranslated, key=lambda entry: not entry.is_important)
    return Translation(tool, reason, draft.values, draft.notes, tuple(untranslated))


def detect_tool(document: YamlMapping) -> tuple[str, str]:
    """Return (tool, reason): the tool with the most keys. Raises InputError for none, and for a
    tie."""
    keys = document.values.keys()
    if keys and keys <= set(KEYS):
        fix = "run `tunesmith plan` on it"
        raise InputError("this is already a tunesmith recipe", where=document.name, fix=fix)
    keys_by_tool: dict[str, list[str]] = {}
    for tool, (signature_keys, _) in TOOLS.items():
        keys_by_tool[tool] = [key for key in keys if key in signature_keys]
    first, second, *_ = sorted(keys_by_tool, key=lambda tool: -len(keys_by_tool[tool]))
    if not keys_by_tool[first]:
        raise InputError(
            f"not a config of {', '.join(TOOLS)}: it has none of their keys",
            where=document.name,
            fix="`tunesmith init` without --from writes a recipe to fill in",
        )
    if len(keys_by_tool[first]) == len(keys_by_tool[second]):
        names = [f"{tool} ({', '.join(keys_by_tool[tool])})" for tool in (first, second)]
        message = f"equally many keys of two tools: {' and '.join(names)}"
        raise InputError(message, where=document.name, fix="remove those of one tool")
    return first, f"it has {', '.join(keys_by_tool[first][:4])}"


def _drop_adapter_keys(draft: RecipeDraft) -> None:
    """Drop adapter settings with full training: other tools ignore them, a recipe refuses them."""
    if draft.values.get("method") != "full":
        return
    for key in list(draft.values):
        if key.startswith("lora_") or key in ("use_rslora", "use_dora"):
            source = draft.notes.pop(key)
            value = draft.values.pop(key)
            draft.skip_key(source, value, "method: full trains no adapter", is_important=False)


def _validate_recipe(draft: RecipeDraft, tool: str) -> None:
    """Raise InputError unless the values load as a recipe."""
    where = str(draft.config_path)
    if "data" not in draft.values:
        raise InputError("no data set is named", where=where, fix="name one, or pass --data FILE")
    try:
        load_recipe(None, arguments=(draft.values,))
    except InputError as error:
        message = f"a value of the {tool} config is not valid here: {error.message}"
        raise InputError(message, where=where) from None


TOOLS: dict[str, tuple[frozenset[str], Callable[[RecipeDraft], None]]] = {
    "LLaMA-Factory": (llamafactory.SIGNATURE_KEYS, llamafactory.translate),
    "Axolotl": (axolotl.SIGNATURE_KEYS, axolotl.translate),
    "TRL": (trl.SIGNATURE_KEYS, trl.translate),
}
