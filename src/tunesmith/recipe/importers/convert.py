"""A config of another tool as a recipe: which tool it is, what its keys become, and what is left.

In: the path of a YAML file of LLaMA-Factory, Axolotl or TRL, and where the recipe will stand (its
paths are relative to that). Out: a Translation, whose values make a valid recipe. Keys that a
config leaves out are left to our rules, not to the other tool's defaults. Left out: writing the
recipe (init.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.importers import axolotl, llamafactory, trl
from tunesmith.recipe.importers.draft import RecipeDraft, UntranslatedKey
from tunesmith.recipe.importers.unsupported import skip_remaining_keys
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import KEYS
from tunesmith.recipe.yaml_lines import YamlMapping, read_yaml

DATA_KEYS = ("dataset", "datasets", "pretraining_dataset", "dataset_name")


@dataclass(frozen=True)
class Translation:
    """`values` are a recipe's; `notes` say for each key of it where its value comes from."""

    tool: str
    reason: str
    values: Json
    notes: dict[str, str]
    untranslated: tuple[UntranslatedKey, ...]


def translate(config: Path, recipe: Path, overrides: Json | None = None) -> Translation:
    """`given` are values that win, such as a model named on the command line.

    Raises InputError with file:line when the file is not YAML, not a config of one of the tools,
    contradicts itself, or asks for a kind of training that there is not."""
    document = read_yaml(config)
    for key, line in document.duplicates:
        raise InputError(
            f"'{key}' stands here a second time", where=f"{config}:{line}", fix="keep one"
        )
    tool, reason = detect_tool(document)
    draft = RecipeDraft(document, config, recipe, dict(document.values))
    overrides = overrides or {}
    if "data" in overrides:
        for key in DATA_KEYS:
            draft.pop_value(key)
    TOOLS[tool][1](draft)
    skip_remaining_keys(draft)
    for key, value in overrides.items():
        draft.values[key], draft.notes[key] = value, "as you said"
    _drop_adapter_keys(draft)
    _validate_recipe(draft, tool)
    untranslated = sorted(draft.untranslated, key=lambda entry: not entry.is_important)
    return Translation(tool, reason, draft.values, draft.notes, tuple(untranslated))


def detect_tool(document: YamlMapping) -> tuple[str, str]:
    """(tool, reason): the one that the most keys belong to. Raises InputError when that is none, or
    two."""
    keys = document.values.keys()
    signatures = {
        tool: [key for key in keys if key in signatures] for tool, (signatures, _) in TOOLS.items()
    }
    first, second, *_ = sorted(signatures, key=lambda tool: -len(signatures[tool]))
    if keys and keys <= set(KEYS.values()):
        raise InputError(
            "this is a recipe of tunesmith already",
            where=document.name,
            fix="run `tunesmith plan` on it",
        )
    if not signatures[first]:
        message = f"not a config of {', '.join(TOOLS)}: none of its keys is theirs"
        raise InputError(
            message,
            where=document.name,
            fix="`tunesmith init` without --from writes a recipe to fill in",
        )
    if len(signatures[first]) == len(signatures[second]):
        both = f"{first} ({', '.join(signatures[first])}) and {second} ({', '.join(signatures[second])})"
        raise InputError(
            f"keys of two tools, as many of each: {both}",
            where=document.name,
            fix="remove those of one",
        )
    return first, f"it has {', '.join(signatures[first][:4])}"


def _drop_adapter_keys(draft: RecipeDraft) -> None:
    """Their tools pass over adapter settings when all weights are trained; a recipe calls them a
    contradiction."""
    if draft.values.get("method") == "full":
        for key in [
            key
            for key in draft.values
            if key.startswith("lora_") or key in ("use_rslora", "use_dora")
        ]:
            source = draft.notes.pop(key)
            draft.skip_key(
                source, draft.values.pop(key), "method: full trains no adapter", is_important=False
            )


def _validate_recipe(draft: RecipeDraft, tool: str) -> None:
    """The recipe has to load: what is wrong with a value is said in the words of a recipe."""
    if "data" not in draft.values:
        raise InputError(
            "no data set is named",
            where=str(draft.config_path),
            fix="name one, or give --data FILE",
        )
    try:
        load_recipe(None, arguments=(draft.values,))
    except InputError as error:
        raise InputError(
            f"what {tool} has there is not valid here: {error.message}",
            where=str(draft.config_path),
        ) from None


TOOLS: dict[str, tuple[frozenset[str], Callable[[RecipeDraft], None]]] = {
    "LLaMA-Factory": (llamafactory.SIGNATURE_KEYS, llamafactory.translate),
    "Axolotl": (axolotl.SIGNATURE_KEYS, axolotl.translate),
    "TRL": (trl.SIGNATURE_KEYS, trl.translate),
}
