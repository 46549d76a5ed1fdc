"""Reads a recipe file, lets command-line flags win, and says everything that is wrong with it.

In: the path of a YAML file and the flags as text. Out: a frozen Recipe, or one InputError that lists every problem
with its line. Keys of other tools are taken as an alias, or answered with what to do instead.

Paths of input files are relative to the recipe file, or to the current folder when they come from a flag;
`output_dir` is always relative to the current folder.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import to_json
from tunesmith.core.types import Json
from tunesmith.recipe.explain import MAPPINGS, expected, found
from tunesmith.recipe.fields import OWN, Form, items, own_metric
from tunesmith.recipe.mappings import Guard, PairLoss
from tunesmith.recipe.schema import (
    ALIASES,
    FILE_KEYS,
    KEYS,
    OF_THE_WHOLE,
    Constraint,
    DataSource,
    Mixture,
    Recipe,
    Rehearsal,
    Stages,
    contradictions,
    recipe_schema,
)
from tunesmith.recipe.yaml_lines import Document, read_flag, read_yaml

COMMAND_LINE, ARGUMENTS = "command line", "arguments"

INSTEAD = {
    key: advice
    for keys, advice in (
        (
            "micro_batch_size per_device_train_batch_size gradient_accumulation_steps",
            "set batch_size, the data rows per optimizer step (micro batch x accumulation x devices); "
            "how a step is cut into packs follows from the memory",
        ),
        ("dataset datasets dataset_name train_file", "set data, a path or a list of {path, format, columns, ...}"),
        ("packing sample_packing neat_packing", "leave it out: documents are always packed, and never see each other"),
        (
            "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt mask_history roles_to_train",
            'leave it out: answers are trained; a message with "train": false in the data is not',
        ),
        ("bf16 fp16 tf32 torch_dtype", "set dtype: bf16 or fp32"),
        ("attn_implementation flash_attn flash_attention", "leave it out, or set attention"),
        ("deepspeed fsdp", "leave it out: memory is fitted by the plan"),
        ("warmup_steps", "set warmup_ratio, the share of the steps"),
        ("load_in_4bit quantization_bit quantization", "set method: qlora, which keeps the frozen weights in 4 bits"),
        ("lora_target_linear", "set lora_target_modules: all-linear"),
        ("trust_remote_code", "leave it out: code from a model folder is never run"),
        ("rl", "set stage: preference and loss: dpo, orpo or simpo"),
        ("beta pref_beta rl_beta", "set loss: {beta: ...}"),
        ("gamma simpo_gamma", "set loss: {name: simpo, gamma: ...}"),
        ("nll_coefficient pref_ftx rpo_alpha", "set loss: {nll_coefficient: ...}"),
        ("resume_from_checkpoint", "run `tunesmith resume RUN`"),
        (
            "modules_to_save lora_modules_to_save additional_target",
            "leave it out: with add_tokens the new tokens' rows in embedding and head are trained and saved; no other "
            "whole module is",
        ),
        ("report_to logging_steps", "leave it out: every step is in events.jsonl"),
    )
    for key in keys.split()
}

LATER_KEYS = ("load_in_8bit",)
INSTEAD_VALUES = {("method", "dora"): "set use_dora: true, which goes with any method that trains an adapter"}


@dataclass(frozen=True)
class _Given:
    """One value as the user wrote it; `folder` is what its paths are relative to."""

    written: str  # the key as it stands in the file, with its dashes on the command line
    value: Any
    where: str
    folder: Path
    within: tuple[str | int, ...] = ()  # the keys and list positions that lead to it in the file


@dataclass(frozen=True)
class _Problem:
    where: str
    message: str


def load_recipe(
    path: Path | None, overrides: Mapping[str, str] | None = None, *, arguments: Sequence[Mapping[str, Any]] = ()
) -> Recipe | Stages:
    """`overrides` maps a key, in any spelling, to its text; a list is written as in YAML: `[q_proj, v_proj]`.
    `arguments` map keys to Python values; each of them wins over those before it and over the file."""
    document = read_yaml(path) if path else Document("recipe")
    here = Path.cwd()
    folder = path.absolute().parent if path else here
    in_file = [_Given(key, value, document.where((key,)), folder) for key, value in document.values.items()]
    flags = [_Given(f"--{key}", read_flag(text), COMMAND_LINE, here) for key, text in (overrides or {}).items()]
    problems = [
        _Problem(f"{document.name}:{n}", f"'{key}' stands here a second time") for key, n in document.duplicates
    ]
    layers = [_by_key(in_file, problems), _by_key(flags, problems)]
    for layer in arguments:
        written = [_Given(str(key), _plain_value(key, layer[key]), ARGUMENTS, here) for key in layer]
        layers.append(_by_key(written, problems))
    stages = next((found for layer in reversed(layers) if (found := layer.get("stage"))), None)
    several = stages if stages is not None and isinstance(stages.value, list) else None
    of_stages = _by_stage(layers, several, document, problems) if several else [_merged(layers)]
    recipes = [_made(given, document, problems) for given in of_stages]
    if problems or not all(recipes):
        raise _report(document.name, list(dict.fromkeys(problems)))
    made = tuple(recipe for recipe in recipes if recipe is not None)
    return Stages(made) if several else made[0]


def _merged(layers: Iterable[Mapping[str, _Given]]) -> dict[str, _Given]:
    """Each layer wins over those before it."""
    return {key: item for layer in layers for key, item in layer.items()}


def _made(given: dict[str, _Given], document: Document, problems: list[_Problem]) -> Recipe | None:
    """One recipe; adds to the problems."""
    values = {key: _anchored(key, item.value, item.folder) for key, item in given.items()}
    problems += [_Problem(given[key].where, message) for key, message in contradictions(values)]
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems += _invalid_values(error, given, document)
        return None


def _by_stage(
    layers: Sequence[dict[str, _Given]], stages: _Given, document: Document, problems: list[_Problem]
) -> list[dict[str, _Given]]:
    """The keys of each stage: of the whole, then its own, then what wins over the list of stages."""
    last = max(n for n, layer in enumerate(layers) if layer.get("stage") is stages)
    if not stages.value:
        problems.append(_Problem(stages.where, "stage: an empty list trains nothing; name at least one"))
    of_each: list[dict[str, _Given]] = []
    in_file = stages.where not in (COMMAND_LINE, ARGUMENTS)
    for number, item in enumerate(cast("list[Any]", stages.value)):
        name, own = _name_and_keys(item)
        within = (stages.written, number, name)
        where = document.where(within) if in_file else stages.where
        if not name:
            what = f"stage[{number}]: expected a stage, or a mapping from one to its keys, found {found(item)}"
            problems.append(_Problem(where, what))
            continue
        keys = [
            _Given(str(key), value, document.where((*within, key)) if in_file else where, stages.folder, within)
            for key, value in own.items()
        ]
        own_keys = _by_key(keys, problems)
        for key in own_keys.keys() & set(OF_THE_WHOLE):
            what = f"stage[{number}]: '{key}' is of the whole recipe: write it beside stage"
            problems.append(_Problem(own_keys[key].where, what))
        own_keys["stage"] = _Given(f"stage[{number}]", name, where, stages.folder, within[:2])
        given = _merged([*layers[: last + 1], own_keys, *layers[last + 1 :]])
        of_each.append({key: one for key, one in given.items() if key != "adapter_from" or not number})
    return of_each


def _name_and_keys(item: Any) -> tuple[str, Json]:
    """`cpt`, or `{cpt: {...}}`; no name for anything else."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(item) == 1:
        ((name, own),) = cast("dict[Any, Any]", item).items()
        if isinstance(name, str) and (own is None or isinstance(own, dict)):
            return name, cast("Json", own or {})
    return "", {}


def takes_value(flag: str, word: str) -> bool:
    """Whether the word after a flag is its value. A switch such as --skip-bad takes only true or false."""
    key = Recipe.model_fields.get(_plain(flag))
    switch = key is not None and key.annotation is bool
    return word.lower() in ("true", "false") if switch else not word.startswith("--")


def needs_value(flag: str) -> bool:
    """Whether a flag is a key that cannot be switched on."""
    key = Recipe.model_fields.get(_plain(flag))
    return key is not None and bool not in (key.annotation, *get_args(key.annotation))


def _report(name: str, problems: list[_Problem]) -> InputError:
    if len(problems) == 1:
        return InputError(problems[0].message, where=problems[0].where)
    in_order = sorted(problems, key=lambda problem: _line(problem.where))
    lines = "".join(f"\n  {problem.where}: {problem.message}" for problem in in_order)
    return InputError(f"{len(problems)} problems{lines}", where=name)


def _line(where: str) -> float:
    """For sorting: what concerns the whole file first, the command line last."""
    line = where.rpartition(":")[2]
    return int(line) if line.isdigit() else math.inf if where == COMMAND_LINE else 0


def _plain_value(key: object, value: Any) -> Any:
    """A Python value as YAML would hold it: paths are texts, tuples are lists."""
    try:
        return to_json(value, str(key))
    except (TypeError, ValueError) as error:
        raise InputError(str(error), where=ARGUMENTS) from None


def kept_recipe(values: Mapping[str, Any]) -> Recipe:
    """The wish that a plan keeps. Raises InputError for that of another version."""
    try:
        return Recipe.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        what = f"the recipe in the plan does not fit: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        fix = "it is of another version of tunesmith: go on with that one, or start a new run from recipe.yaml"
        raise InputError(what, where="plan.json", fix=fix) from None


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as a file, with the keys that were given; reading it back gives the same recipe anywhere."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- keys


def _by_key(items: list[_Given], problems: list[_Problem]) -> dict[str, _Given]:
    """Items under their own key; what is unknown or stands twice goes to `problems`."""
    found: dict[str, _Given] = {}
    for item in items:
        key = _plain(item.written)
        key = ALIASES.get(key, key)
        if key not in KEYS.values():
            problems.append(_Problem(item.where, _unknown_key(item.written, (*KEYS.values(), *ALIASES))))
        elif key in found:
            message = f"'{item.written}' and '{found[key].written}' are the same key: keep one"
            problems.append(_Problem(item.where, message))
        else:
            found[key] = item
    return found


def _plain(written: str) -> str:
    return written.lstrip("-").replace("-", "_")


def _unknown_key(written: str, known: Iterable[str]) -> str:
    key = _plain(written)
    if key in INSTEAD:
        return f"'{written}' is not a key here: {INSTEAD[key]}"
    if key in LATER_KEYS:
        return f"'{written}' is not supported yet"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key '{written}'" + (f"; did you mean '{near[0]}'?" if near else "; `tunesmith schema` lists all")


def _anchored(key: str, value: Any, folder: Path) -> Any:
    """The value with its input paths made absolute. A model name that is no folder or file here stays a name."""
    if key == "rehearsal" and isinstance(value, dict) and "data" in value:
        own = value["data"] in (OWN, [{"path": OWN}])
        return value if own else {**value, "data": _anchored("data", value["data"], folder)}
    if key in FILE_KEYS and isinstance(value, list):
        return [_anchored_path(item, folder) for item in cast("list[Any]", value)]
    if key in (*FILE_KEYS, "schema", "adapter_from") or (key == "template" and value not in ("auto", "none")):
        return _anchored_path(value, folder)
    if key == "metrics" and isinstance(value, (str, list)):
        return [_anchored_metric(item, folder) for item in items(cast("Any", value))] if value != "auto" else value
    if key == "model" and isinstance(value, str) and value:
        path = _anchored_path(value, folder)
        return path if os.path.exists(path) else value
    return value


def _anchored_metric(value: Any, folder: Path) -> Any:
    """A metric of the user's own is FILE.py:FUNCTION."""
    return _anchored_path(value, folder) if isinstance(value, str) and own_metric(value) else value


def _anchored_path(value: Any, folder: Path) -> Any:
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _anchored_path(value["path"], folder)}
    return str(folder / os.path.expanduser(value)) if isinstance(value, str) and value else value


# ---------------------------------------------------------------- values


def _invalid_values(error: ValidationError, given: dict[str, _Given], document: Document) -> Iterator[_Problem]:
    """One problem for each place that pydantic complains about; a union complains once per member."""
    properties = recipe_schema()["properties"]
    told: set[tuple[str | int, ...]] = set()
    for detail in error.errors():
        place = _place(detail["loc"])
        if not place or place in told:  # without a place: the contradictions, which are listed already
            continue
        if detail["type"] == "too_short" and detail["input"]:  # its items were refused, each in its own words
            continue
        told.add(place)
        key = str(place[0])
        if key not in given:
            yield _Problem(document.name, f"'{key}' is missing. {properties[key]['description']}")
            continue
        item = given[key]
        place_in_file = (*item.within, item.written, *place[1:])
        where = item.where if item.where in (COMMAND_LINE, ARGUMENTS) else document.where(place_in_file)
        yield _Problem(where, _message(item, place, detail, properties[key]))


def _place(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A pydantic location without the names of union members: `data, 0, format` stays, `lora_r, int` is `lora_r`."""
    if location and location[0] in (*FILE_KEYS, *MAPPED, "never"):
        return tuple(part for part in location if isinstance(part, int) or part.isidentifier())
    return location[:1]


def _message(item: _Given, place: tuple[str | int, ...], detail: ErrorDetails, schema: Json) -> str:
    key = str(place[0])
    if key in MAPPED and len(place) > 1:
        field = str(place[1])
        if len(place) == 2:
            return _message_on_mapping(item.written, MAPPED[key], field, detail)
        item, place = replace(item, written=f"{item.written}.{field}"), place[1:]
    if key == "never" and detail["type"] == "value_error":
        name = item.written + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:])
        return f"{name}: {detail['msg'].removeprefix('Value error, ')}"
    if len(place) > 1:
        return _message_on_item(item.written, place, detail)
    if isinstance(item.value, str) and (key, item.value) in INSTEAD_VALUES:
        return f"{item.written}: '{item.value}' is not a value here: {INSTEAD_VALUES[key, item.value]}"
    if key == "stage" and item.within:
        schema = schema["anyOf"][0]
    if key == "add_tokens" and (why := detail.get("ctx", {}).get("error")):
        return f"{item.written}: {why}"
    return f"{item.written}: expected {expected(schema)}, found {found(item.value)}"


def _message_on_item(written: str, place: tuple[str | int, ...], detail: ErrorDetails) -> str:
    """Of a list of sources or constraints."""
    never, name = place[0] == "never", f"{written}[{place[1]}]"
    inner = str(place[2]) if len(place) > 2 else ""
    model, kind = (Constraint, "a pattern, the name of a checker") if never else (DataSource, "a path")
    if inner == "prompts" and len(place) > 4:
        return _message_on_mapping(f"{name}.prompts[{place[3]}]", Form, str(place[4]), detail)
    if detail["type"] == "extra_forbidden":
        return f"{name}: {_unknown_key(inner, model.model_fields)}"
    if detail["type"] == "missing":
        return f"{name} has no '{inner}'"
    if detail["type"] == "value_error" and inner == "name":
        return f"{name}.{inner}: {detail['msg'].removeprefix('Value error, ')}"
    fields = model.model_json_schema()["properties"]
    wanted = expected(fields[inner]) if inner in fields else f"{kind}, or {MAPPINGS[model.__name__]}"
    return f"{name}{'.' * bool(inner)}{inner}: expected {wanted}, found {found(detail['input'])}"


def _message_on_mapping(name: str, model: type[BaseModel], key: str, detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return f"{name}: {_unknown_key(key, model.model_fields)}"
    if detail["type"] == "missing":
        return f"{name} has no '{key}'"
    if detail["type"] == "value_error":
        return f"{name}.{key}: {detail['msg'].removeprefix('Value error, ')}"
    wanted = expected(model.model_json_schema()["properties"][key])
    return f"{name}.{key}: expected {wanted}, found {found(detail['input'])}"


MAPPED: dict[str, type[BaseModel]] = {  # keys that take one mapping
    "rehearsal": Rehearsal,
    "mixture": Mixture,
    "loss": PairLoss,
    "guard": Guard,
}
