"""Translating a config of another tool into a recipe.

In: a config of one of the tools (read_config.py), and the future path of the recipe, to which its
paths are relative. Out: a Translation with the values of a valid recipe. keys.yaml says what each
key becomes. Keys missing in the config are left to our rules, not to the other tool's defaults.
Left out: writing the recipe (template.py)."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.importers import data_sets, key_map
from tunesmith.recipe.importers.draft import TABLE, RecipeDraft, UntranslatedKey
from tunesmith.recipe.importers.read_config import Expression, read_config
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import KEYS
from tunesmith.recipe.yaml_lines import YamlMapping

TOOLS: dict[str, Json] = TABLE["tools"]
DATA_KEYS = "dataset datasets pretraining_dataset dataset_name dataset_mixture val_dataset"
SECRET_PATTERN = re.compile("token$|api_key|secret|password")
OFF_VALUES = (None, False, "", 0, [], {})
CONVERSIONS: dict[str, Any] = vars(key_map) | vars(data_sets)


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
    document = read_config(config)
    for key, line in document.duplicates:
        raise InputError(f"'{key}' is repeated", where=f"{config}:{line}", fix="keep one")
    tool, reason = detect_tool(document)
    document = _read_switches(document, tool)
    draft = RecipeDraft(document, config, recipe)
    overrides = overrides or {}
    unread_keys = DATA_KEYS.split() if "data" in overrides else []
    for key in document.values:
        if key in unread_keys:
            draft.pop_value(key)
        elif isinstance(draft.remaining[key], Expression):
            draft.skip_key(key, str(draft.pop_value(key)), "code, which is not run: set the value")
    for row in TOOLS[tool]["rows"]:
        arguments = {name: value for name, value in row.items() if name not in ("do", "methods")}
        if draft.values.get("method") in row.get("methods", (draft.values.get("method"),)):
            CONVERSIONS[row["do"]](draft, **arguments)
    on_by_default = f"{TABLE['on_by_default']} {TOOLS[tool]['on_by_default']}".split()
    _skip_remaining_keys(draft, on_by_default)
    _report_unused_keys(draft, on_by_default, unread_keys)
    for key, value in overrides.items():
        draft.values[key] = value
        draft.notes[key] = "set by you"
    _drop_adapter_keys(draft)
    _report_silent_defaults(draft, tool)
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
    for tool, rules in TOOLS.items():
        if (mark := rules.get("mark")) in keys:
            return tool, f"it has {mark}"
        signature = set(rules["signature"].split())
        keys_by_tool[tool] = [key for key in keys if key in signature]
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


def list_switches(tool: str) -> list[str]:
    """Return the keys that a tool reads as true or false."""
    return f"{TABLE['switches']} {TOOLS[tool]['switches']}".split()


def _read_switches(document: YamlMapping, tool: str) -> YamlMapping:
    """Return a config with its switches as true and false. Raises InputError for a value that the
    tool does not read as a switch.

    Axolotl's pydantic and TRL's argparse turn a text into true or false; to LLaMA-Factory any text,
    "false" too, is true: it is refused, since whoever wrote it did not mean that."""
    values = dict(document.values)
    texts: Json = TOOLS[tool]["switch_texts"] | TOOLS[tool].get("more_texts", {})
    for key in list_switches(tool):
        value = values.get(key)
        names: Json = TOOLS[tool].get("bf16", {}) if key == "bf16" else {}
        is_text = isinstance(value, str)
        if value in (None, ""):
            continue
        if is_text and value in names:
            values[key] = names[value]
        elif is_text and value.lower() in texts:
            values[key] = texts[value.lower()]
        elif isinstance(value, (bool, int)) and value in (False, True):
            values[key] = bool(value)
        else:
            fix = "write true or false"
            if is_text and not texts:
                fix += f", without quotes: to {tool}, any text is true"
            message = f"{key}: expected true or false, found {value!r:.60}"
            raise InputError(message, where=document.format_location((key,)), fix=fix)
    return replace(document, values=values)


# ---------------------------------------------------------------- keys that no row takes


def _skip_remaining_keys(draft: RecipeDraft, on_by_default: Container[str]) -> None:
    """Record a reason for every key that no row has taken; secrets are not repeated.

    A key that is off asks for nothing, unless it is on by default."""
    for key, value in list(draft.remaining.items()):
        draft.pop_value(key)
        if value in OFF_VALUES and key not in on_by_default:
            continue
        if _is_match(key, TABLE["secrets"]):
            value = "..."
        if reason := _find_reason(key, TABLE["unneeded"]):
            draft.skip_unneeded(key, value, reason)
        else:
            reason = _find_reason(key, TABLE["unsupported"]) or "a recipe has no such key"
            draft.skip_key(key, value, reason)


def _find_reason(key: str, rows: list[dict[str, str]]) -> str:
    return next((row["reason"] for row in rows if _is_match(key, row["keys"])), "")


def _is_match(key: str, patterns: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns.split())


def _report_unused_keys(
    draft: RecipeDraft, on_by_default: Container[str], unread_keys: Container[str]
) -> None:
    """Record every key that neither a note nor another entry names: its value is the same here, or
    a rule decides. Keys that are off, as they are by default, and `unread_keys` ask for nothing."""
    texts = [*draft.notes.values(), *(entry.key for entry in draft.untranslated)]
    named = {word for text in texts for word in re.findall(r"[\w.]+", text)}
    for key, value in draft.document.values.items():
        is_off = value in OFF_VALUES and key not in on_by_default
        if key in named or key in unread_keys or is_off or SECRET_PATTERN.search(key):
            continue
        draft.skip_unneeded(key, value, "nothing in the recipe follows from it")


def _report_silent_defaults(draft: RecipeDraft, tool: str) -> None:
    """Record the tool's defaults for what the config leaves out and a rule decides otherwise."""
    reason = f"defaults of {tool} that the config leaves out; here a rule decides"
    for key, text in TOOLS[tool]["defaults"].items():
        is_adapter_key = key.startswith("lora_") and draft.values.get("method") == "full"
        is_set = text.partition(" ")[0] in draft.document.values
        if key not in draft.values and not is_adapter_key and not is_set:
            draft.skip_unneeded(text, None, reason)
    loss: Any = draft.values.get("loss")
    if loss is None:
        return
    loss_config: Json = loss if isinstance(loss, dict) else {"name": loss}
    for key, text in TOOLS[tool]["loss_defaults"].items():
        is_unused = key == "gamma" and loss_config["name"] != "simpo"
        if key not in loss_config and not is_unused:
            draft.skip_unneeded(text, None, reason)


# ---------------------------------------------------------------- the recipe


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
