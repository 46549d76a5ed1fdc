"""A config of another tool as a recipe: which tool it is, what its keys become, and what is left.

In: the path of a YAML file of LLaMA-Factory, Axolotl or TRL, and where the recipe will stand (its paths are relative
to that). Out: a Translation, whose values make a valid recipe. Keys that a config leaves out are left to our rules,
not to the other tool's defaults. Left out: writing the recipe (init.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.importers import axolotl, llamafactory, trl
from tunesmith.recipe.importers.draft import Draft, Left
from tunesmith.recipe.importers.unsupported import leave_the_rest
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import KEYS
from tunesmith.recipe.yaml_lines import Document, read_yaml

DATA_KEYS = ("dataset", "datasets", "pretraining_dataset", "dataset_name")


@dataclass(frozen=True)
class Translation:
    """`values` are a recipe's; `notes` say for each key of it where its value comes from."""

    tool: str
    why: str
    values: Json
    notes: dict[str, str]
    left: tuple[Left, ...]


def translate(config: Path, recipe: Path, given: Json | None = None) -> Translation:
    """`given` are values that win, such as a model named on the command line.

    Raises InputError with file:line when the file is not YAML, not a config of one of the tools, contradicts itself,
    or asks for a kind of training that there is not.
    """
    document = read_yaml(config)
    for key, line in document.duplicates:
        raise InputError(f"'{key}' stands here a second time", where=f"{config}:{line}", fix="keep one")
    tool, why = detect(document)
    draft = Draft(document, config, recipe, dict(document.values))
    given = given or {}
    if "data" in given:
        for key in DATA_KEYS:
            draft.take(key)
    TOOLS[tool][1](draft)
    leave_the_rest(draft)
    for key, value in given.items():
        draft.values[key], draft.notes[key] = value, "as you said"
    _drop_the_adapter(draft)
    _check(draft, tool)
    left = sorted(draft.left, key=lambda one: not one.matters)
    return Translation(tool, why, draft.values, draft.notes, tuple(left))


def detect(document: Document) -> tuple[str, str]:
    """(tool, reason): the one that the most keys belong to. Raises InputError when that is none, or two."""
    keys = document.values.keys()
    signs = {tool: [key for key in keys if key in signs] for tool, (signs, _) in TOOLS.items()}
    first, second, *_ = sorted(signs, key=lambda tool: -len(signs[tool]))
    if keys and keys <= set(KEYS.values()):
        raise InputError("this is a recipe of tunesmith already", where=document.name, fix="run `tunesmith plan` on it")
    if not signs[first]:
        what = f"not a config of {', '.join(TOOLS)}: none of its keys is theirs"
        raise InputError(what, where=document.name, fix="`tunesmith init` without --from writes a recipe to fill in")
    if len(signs[first]) == len(signs[second]):
        both = f"{first} ({', '.join(signs[first])}) and {second} ({', '.join(signs[second])})"
        raise InputError(f"keys of two tools, as many of each: {both}", where=document.name, fix="remove those of one")
    return first, f"it has {', '.join(signs[first][:4])}"


def _drop_the_adapter(draft: Draft) -> None:
    """Their tools pass over adapter settings when all weights are trained; a recipe calls them a contradiction."""
    if draft.values.get("method") == "full":
        for key in [key for key in draft.values if key.startswith("lora_") or key in ("use_rslora", "use_dora")]:
            source = draft.notes.pop(key)
            draft.leave(source, draft.values.pop(key), "method: full trains no adapter", matters=False)


def _check(draft: Draft, tool: str) -> None:
    """The recipe has to load: what is wrong with a value is said in the words of a recipe."""
    if "data" not in draft.values:
        raise InputError("no data set is named", where=str(draft.config), fix="name one, or give --data FILE")
    try:
        load_recipe(None, arguments=(draft.values,))
    except InputError as error:
        raise InputError(f"what {tool} has there is not valid here: {error.what}", where=str(draft.config)) from None


TOOLS: dict[str, tuple[frozenset[str], Callable[[Draft], None]]] = {
    "LLaMA-Factory": (llamafactory.SIGNS, llamafactory.translate),
    "Axolotl": (axolotl.SIGNS, axolotl.translate),
    "TRL": (trl.SIGNS, trl.translate),
}
