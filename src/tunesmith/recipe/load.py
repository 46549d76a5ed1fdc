"""Reads a recipe file, lets command-line flags win, and says everything that is wrong with it.

In: the path of a YAML file and the flags as text. Out: a frozen Recipe, or one InputError that
lists every problem with its line. Keys of other tools are taken as an alias, or answered with what
to do instead.

Paths of input files are relative to the recipe file, or to the current folder when they come from a
flag; `output_dir` is always relative to the current folder."""

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
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json
from tunesmith.recipe.explain import MAPPING_TEXTS, describe_schema, describe_value
from tunesmith.recipe.fields import SELF_GENERATED, PromptForm, as_list, parse_custom_metric
from tunesmith.recipe.mappings import GuardConfig, PairLoss
from tunesmith.recipe.schema import (
    ALIASES,
    FILE_KEYS,
    KEYS,
    RUN_LEVEL_KEYS,
    Constraint,
    DataSource,
    MixtureConfig,
    Recipe,
    RehearsalConfig,
    Stages,
    build_recipe_schema,
    find_contradictions,
)
from tunesmith.recipe.yaml_lines import YamlMapping, read_flag, read_yaml

COMMAND_LINE, ARGUMENTS = "command line", "arguments"

REPLACEMENTS = {
    key: advice
    for keys, advice in (
        (
            "micro_batch_size per_device_train_batch_size gradient_accumulation_steps",
            "set batch_size, the data rows per optimizer step (micro batch x accumulation x devices); "
            "how a step is cut into packs follows from the memory",
        ),
        (
            "dataset datasets dataset_name train_file",
            "set data, a path or a list of {path, format, columns, ...}",
        ),
        (
            "packing sample_packing neat_packing",
            "leave it out: documents are always packed, and never see each other",
        ),
        (
            "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt mask_history roles_to_train",
            'leave it out: answers are trained; a message with "train": false in the data is not',
        ),
        ("bf16 fp16 tf32 torch_dtype", "set dtype: bf16 or fp32"),
        ("attn_implementation flash_attn flash_attention", "leave it out, or set attention"),
        ("deepspeed fsdp", "leave it out: memory is fitted by the plan"),
        ("warmup_steps", "set warmup_ratio, the share of the steps"),
        (
            "load_in_4bit quantization_bit quantization",
            "set method: qlora, which keeps the frozen weights in 4 bits",
        ),
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

UNSUPPORTED_KEYS = ("load_in_8bit",)
VALUE_REPLACEMENTS = {
    ("method", "dora"): "set use_dora: true, which goes with any method that trains an adapter"
}


@dataclass(frozen=True)
class _RawSetting:
    """One value as the user wrote it; `folder` is what its paths are relative to."""

    raw_key: str  # the key as it stands in the file, with its dashes on the command line
    value: Any
    where: str
    folder: Path
    parent_path: tuple[
        str | int, ...
    ] = ()  # the keys and list positions that lead to it in the file


@dataclass(frozen=True)
class _Problem:
    where: str
    message: str


def load_recipe(
    path: Path | None,
    overrides: Mapping[str, str] | None = None,
    *,
    arguments: Sequence[Mapping[str, Any]] = (),
) -> Recipe | Stages:
    """`overrides` maps a key, in any spelling, to its text; a list is written as in YAML: `[q_proj,
    v_proj]`. `arguments` map keys to Python values; each of them wins over those before it and over
    the file."""
    document = read_yaml(path) if path else YamlMapping("recipe")
    cwd = Path.cwd()
    folder = path.absolute().parent if path else cwd
    file_settings = [
        _RawSetting(key, value, document.format_location((key,)), folder)
        for key, value in document.values.items()
    ]
    flag_settings = [
        _RawSetting(f"--{key}", read_flag(text), COMMAND_LINE, cwd)
        for key, text in (overrides or {}).items()
    ]
    problems = [
        _Problem(f"{document.name}:{line}", f"'{key}' stands here a second time")
        for key, line in document.duplicates
    ]
    layers = [_index_by_key(file_settings, problems), _index_by_key(flag_settings, problems)]
    for layer in arguments:
        layer_settings = [
            _RawSetting(str(key), _to_yaml_value(key, layer[key]), ARGUMENTS, cwd) for key in layer
        ]
        layers.append(_index_by_key(layer_settings, problems))
    stage_setting = next(
        (setting for layer in reversed(layers) if (setting := layer.get("stage"))), None
    )
    stage_list = (
        stage_setting
        if stage_setting is not None and isinstance(stage_setting.value, list)
        else None
    )
    stage_settings = (
        _split_stages(layers, stage_list, document, problems)
        if stage_list
        else [_merge_layers(layers)]
    )
    recipes = [_build(settings, document, problems) for settings in stage_settings]
    if problems or not all(recipes):
        raise _combine_problems(document.name, list(dict.fromkeys(problems)))
    valid_recipes = tuple(recipe for recipe in recipes if recipe is not None)
    return Stages(valid_recipes) if stage_list else valid_recipes[0]


def _merge_layers(layers: Iterable[Mapping[str, _RawSetting]]) -> dict[str, _RawSetting]:
    """Each layer wins over those before it."""
    return {key: setting for layer in layers for key, setting in layer.items()}


def _build(
    settings: dict[str, _RawSetting], document: YamlMapping, problems: list[_Problem]
) -> Recipe | None:
    """One recipe; adds to the problems."""
    values = {
        key: _resolve_paths(key, setting.value, setting.folder) for key, setting in settings.items()
    }
    problems += [
        _Problem(settings[key].where, message) for key, message in find_contradictions(values)
    ]
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems += _iter_invalid_values(error, settings, document)
        return None


def _split_stages(
    layers: Sequence[dict[str, _RawSetting]],
    stages: _RawSetting,
    document: YamlMapping,
    problems: list[_Problem],
) -> list[dict[str, _RawSetting]]:
    """The keys of each stage: of the whole, then its own, then what wins over the list of
    stages."""
    stage_level = max(level for level, layer in enumerate(layers) if layer.get("stage") is stages)
    if not stages.value:
        problems.append(
            _Problem(stages.where, "stage: an empty list trains nothing; name at least one")
        )
    stage_settings: list[dict[str, _RawSetting]] = []
    is_in_file = stages.where not in (COMMAND_LINE, ARGUMENTS)
    for number, item in enumerate(cast("list[Any]", stages.value)):
        name, stage_values = _parse_stage_item(item)
        yaml_path = (stages.raw_key, number, name)
        where = document.format_location(yaml_path) if is_in_file else stages.where
        if not name:
            message = f"stage[{number}]: expected a stage, or a mapping from one to its keys, found {describe_value(item)}"
            problems.append(_Problem(where, message))
            continue
        settings = [
            _RawSetting(
                str(key),
                value,
                document.format_location((*yaml_path, key)) if is_in_file else where,
                stages.folder,
                yaml_path,
            )
            for key, value in stage_values.items()
        ]
        stage_layer = _index_by_key(settings, problems)
        for key in stage_layer.keys() & set(RUN_LEVEL_KEYS):
            message = f"stage[{number}]: '{key}' is of the whole recipe: write it beside stage"
            problems.append(_Problem(stage_layer[key].where, message))
        stage_layer["stage"] = _RawSetting(
            f"stage[{number}]", name, where, stages.folder, yaml_path[:2]
        )
        merged = _merge_layers(
            [*layers[: stage_level + 1], stage_layer, *layers[stage_level + 1 :]]
        )
        stage_settings.append(
            {key: setting for key, setting in merged.items() if key != "adapter_from" or not number}
        )
    return stage_settings


def _parse_stage_item(item: Any) -> tuple[str, Json]:
    """`cpt`, or `{cpt: {...}}`; no name for anything else."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(item) == 1:
        ((name, values),) = cast("dict[Any, Any]", item).items()
        if isinstance(name, str) and (values is None or isinstance(values, dict)):
            return name, cast("Json", values or {})
    return "", {}


def is_flag_value(flag: str, word: str) -> bool:
    """Whether the word after a flag is its value. A switch such as --skip-bad takes only true or
    false."""
    field = Recipe.model_fields.get(_normalize_key(flag))
    is_switch = field is not None and field.annotation is bool
    return word.lower() in ("true", "false") if is_switch else not word.startswith("--")


def needs_value(flag: str) -> bool:
    """Whether a flag is a key that cannot be switched on."""
    field = Recipe.model_fields.get(_normalize_key(flag))
    return field is not None and bool not in (field.annotation, *get_args(field.annotation))


def _combine_problems(name: str, problems: list[_Problem]) -> InputError:
    if len(problems) == 1:
        return InputError(problems[0].message, where=problems[0].where)
    sorted_problems = sorted(problems, key=lambda problem: _parse_line(problem.where))
    lines = "".join(f"\n  {problem.where}: {problem.message}" for problem in sorted_problems)
    return InputError(f"{len(problems)} problems{lines}", where=name)


def _parse_line(where: str) -> float:
    """For sorting: what concerns the whole file first, the command line last."""
    line = where.rpartition(":")[2]
    return int(line) if line.isdigit() else math.inf if where == COMMAND_LINE else 0


def _to_yaml_value(key: object, value: Any) -> Any:
    """A Python value as YAML would hold it: paths are texts, tuples are lists."""
    try:
        return to_jsonable(value, str(key))
    except (TypeError, ValueError) as error:
        raise InputError(str(error), where=ARGUMENTS) from None


def recipe_from_plan(values: Mapping[str, Any]) -> Recipe:
    """The wish that a plan keeps. Raises InputError for that of another version."""
    try:
        return Recipe.model_validate(
            {key: value for key, value in values.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors()[0]
        message = f"the recipe in the plan does not fit: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        fix = "it is of another version of tunesmith: go on with that one, or start a new run from recipe.yaml"
        raise InputError(message, where="plan.json", fix=fix) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as a file, with the keys that were given; reading it back gives the same recipe
    anywhere."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- keys


def _index_by_key(settings: list[_RawSetting], problems: list[_Problem]) -> dict[str, _RawSetting]:
    """Items under their own key; what is unknown or stands twice goes to `problems`."""
    by_key: dict[str, _RawSetting] = {}
    for setting in settings:
        key = _normalize_key(setting.raw_key)
        key = ALIASES.get(key, key)
        if key not in KEYS.values():
            problems.append(
                _Problem(
                    setting.where,
                    _describe_unknown_key(setting.raw_key, (*KEYS.values(), *ALIASES)),
                )
            )
        elif key in by_key:
            message = f"'{setting.raw_key}' and '{by_key[key].raw_key}' are the same key: keep one"
            problems.append(_Problem(setting.where, message))
        else:
            by_key[key] = setting
    return by_key


def _normalize_key(raw_key: str) -> str:
    return raw_key.lstrip("-").replace("-", "_")


def _describe_unknown_key(raw_key: str, valid_keys: Iterable[str]) -> str:
    key = _normalize_key(raw_key)
    if key in REPLACEMENTS:
        return f"'{raw_key}' is not a key here: {REPLACEMENTS[key]}"
    if key in UNSUPPORTED_KEYS:
        return f"'{raw_key}' is not supported yet"
    close_keys = difflib.get_close_matches(key, valid_keys, n=1)
    return f"unknown key '{raw_key}'" + (
        f"; did you mean '{close_keys[0]}'?" if close_keys else "; `tunesmith schema` lists all"
    )


def _resolve_paths(key: str, value: Any, folder: Path) -> Any:
    """The value with its input paths made absolute. A model name that is no folder or file here
    stays a name."""
    if key == "rehearsal" and isinstance(value, dict) and "data" in value:
        is_self_generated = value["data"] in (SELF_GENERATED, [{"path": SELF_GENERATED}])
        return (
            value
            if is_self_generated
            else {**value, "data": _resolve_paths("data", value["data"], folder)}
        )
    if key in FILE_KEYS and isinstance(value, list):
        return [_resolve_path(item, folder) for item in cast("list[Any]", value)]
    if key in (*FILE_KEYS, "schema", "adapter_from") or (
        key == "template" and value not in ("auto", "none")
    ):
        return _resolve_path(value, folder)
    if key == "metrics" and isinstance(value, (str, list)):
        return (
            [_resolve_metric_path(item, folder) for item in as_list(cast("Any", value))]
            if value != "auto"
            else value
        )
    if key == "model" and isinstance(value, str) and value:
        path = _resolve_path(value, folder)
        return path if os.path.exists(path) else value
    return value


def _resolve_metric_path(value: Any, folder: Path) -> Any:
    """A metric of the user's own is FILE.py:FUNCTION."""
    return (
        _resolve_path(value, folder)
        if isinstance(value, str) and parse_custom_metric(value)
        else value
    )


def _resolve_path(value: Any, folder: Path) -> Any:
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _resolve_path(value["path"], folder)}
    return str(folder / os.path.expanduser(value)) if isinstance(value, str) and value else value


# ---------------------------------------------------------------- values


def _iter_invalid_values(
    error: ValidationError, settings: dict[str, _RawSetting], document: YamlMapping
) -> Iterator[_Problem]:
    """One problem for each place that pydantic complains about; a union complains once per
    member."""
    properties = build_recipe_schema()["properties"]
    reported: set[tuple[str | int, ...]] = set()
    for detail in error.errors():
        location = _strip_union_members(detail["loc"])
        if (
            not location or location in reported
        ):  # without a place: the contradictions, which are listed already
            continue
        if (
            detail["type"] == "too_short" and detail["input"]
        ):  # its items were refused, each in its own words
            continue
        reported.add(location)
        key = str(location[0])
        if key not in settings:
            yield _Problem(document.name, f"'{key}' is missing. {properties[key]['description']}")
            continue
        setting = settings[key]
        yaml_path = (*setting.parent_path, setting.raw_key, *location[1:])
        where = (
            setting.where
            if setting.where in (COMMAND_LINE, ARGUMENTS)
            else document.format_location(yaml_path)
        )
        yield _Problem(where, _describe_error(setting, location, detail, properties[key]))


def _strip_union_members(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A pydantic location without the names of union members: `data, 0, format` stays, `lora_r,
    int` is `lora_r`."""
    if location and location[0] in (*FILE_KEYS, *MAPPING_MODELS, "never"):
        return tuple(part for part in location if isinstance(part, int) or part.isidentifier())
    return location[:1]


def _describe_error(
    setting: _RawSetting, location: tuple[str | int, ...], detail: ErrorDetails, schema: Json
) -> str:
    key = str(location[0])
    if key in MAPPING_MODELS and len(location) > 1:
        field = str(location[1])
        if len(location) == 2:
            return _describe_mapping_error(setting.raw_key, MAPPING_MODELS[key], field, detail)
        setting, location = replace(setting, raw_key=f"{setting.raw_key}.{field}"), location[1:]
    if key == "never" and detail["type"] == "value_error":
        name = setting.raw_key + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[1:]
        )
        return f"{name}: {detail['msg'].removeprefix('Value error, ')}"
    if len(location) > 1:
        return _describe_item_error(setting.raw_key, location, detail)
    if isinstance(setting.value, str) and (key, setting.value) in VALUE_REPLACEMENTS:
        return f"{setting.raw_key}: '{setting.value}' is not a value here: {VALUE_REPLACEMENTS[key, setting.value]}"
    if key == "stage" and setting.parent_path:
        schema = schema["anyOf"][0]
    if key == "add_tokens" and (reason := detail.get("ctx", {}).get("error")):
        return f"{setting.raw_key}: {reason}"
    return f"{setting.raw_key}: expected {describe_schema(schema)}, found {describe_value(setting.value)}"


def _describe_item_error(
    raw_key: str, location: tuple[str | int, ...], detail: ErrorDetails
) -> str:
    """Of a list of sources or constraints."""
    is_constraint, name = location[0] == "never", f"{raw_key}[{location[1]}]"
    inner = str(location[2]) if len(location) > 2 else ""
    model, kind = (
        (Constraint, "a pattern, the name of a checker")
        if is_constraint
        else (DataSource, "a path")
    )
    if inner == "prompts" and len(location) > 4:
        return _describe_mapping_error(
            f"{name}.prompts[{location[3]}]", PromptForm, str(location[4]), detail
        )
    if detail["type"] == "extra_forbidden":
        return f"{name}: {_describe_unknown_key(inner, model.model_fields)}"
    if detail["type"] == "missing":
        return f"{name} has no '{inner}'"
    if detail["type"] == "value_error" and inner == "name":
        return f"{name}.{inner}: {detail['msg'].removeprefix('Value error, ')}"
    fields = model.model_json_schema()["properties"]
    expectation = (
        describe_schema(fields[inner])
        if inner in fields
        else f"{kind}, or {MAPPING_TEXTS[model.__name__]}"
    )
    return f"{name}{'.' * bool(inner)}{inner}: expected {expectation}, found {describe_value(detail['input'])}"


def _describe_mapping_error(
    name: str, model: type[BaseModel], key: str, detail: ErrorDetails
) -> str:
    if detail["type"] == "extra_forbidden":
        return f"{name}: {_describe_unknown_key(key, model.model_fields)}"
    if detail["type"] == "missing":
        return f"{name} has no '{key}'"
    if detail["type"] == "value_error":
        return f"{name}.{key}: {detail['msg'].removeprefix('Value error, ')}"
    expectation = describe_schema(model.model_json_schema()["properties"][key])
    return f"{name}.{key}: expected {expectation}, found {describe_value(detail['input'])}"


MAPPING_MODELS: dict[str, type[BaseModel]] = {  # keys that take one mapping
    "rehearsal": RehearsalConfig,
    "mixture": MixtureConfig,
    "loss": PairLoss,
    "guard": GuardConfig,
}
