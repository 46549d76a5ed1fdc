"""Loading a recipe: a YAML file, overridden by flags or Python arguments, checked as one.

In: the path of a YAML file, flags as text, Python values. Out: a frozen Recipe or Stages, or one
InputError that lists every problem with its line. Keys of other tools are accepted as an alias, or
answered with what to do instead (explain.py).

Input paths are relative to the recipe file, or to the current folder if they come from a flag or
from Python; `output_dir` is always relative to the current folder."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import make_hub_path
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.types import Json
from tunesmith.recipe.explain import (
    Location,
    describe_error,
    describe_unknown_key,
    describe_value,
    locate_error,
    normalize_key,
)
from tunesmith.recipe.fields import (
    BUILT_IN,
    NO_DATA,
    is_self_generated,
    parse_custom_metric,
    wrap_list,
)
from tunesmith.recipe.schema import (
    ALIASES,
    KEYS,
    RUN_LEVEL_KEYS,
    SOURCE_KEYS,
    UNUSED_CPT_KEYS,
    Recipe,
    Stages,
    build_recipe_schema,
    find_contradictions,
    validate_keys,
)
from tunesmith.recipe.yaml_lines import YamlMapping, read_flag, read_yaml

RecipeLike = str | Path | Mapping[str, Any] | Recipe | Stages | None

MAX_PROBLEMS = 20  # that an error lists
STAGE_KEYS = (*UNUSED_CPT_KEYS, "batch_tokens", "loss")  # without effect in some stages
COMMAND_LINE = "command line"
ARGUMENTS = "arguments"


@dataclass(frozen=True)
class _RawSetting:
    """One value as the user wrote it."""

    raw_key: str  # as written, with its dashes on the command line
    value: Any
    where: str
    folder: Path  # paths are relative to it
    parent_path: Location = ()  # keys and list indices that lead to it in the file


@dataclass(frozen=True)
class _Problem:
    where: str
    message: str


def read_recipe(recipe: RecipeLike = None, **changes: Any) -> Recipe | Stages:
    """Read a recipe from a YAML file, a mapping or another recipe, with `changes` applied.

    Keys may be spelled with dashes, underscores or as an alias. Returns Stages if `stage` is a
    list. Paths in a file are relative to that file, all others to the current folder. Raises
    InputError listing every problem."""
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json", exclude_unset=True)
        return load_recipe(None, arguments=(values, changes)) if changes else recipe
    if isinstance(recipe, Stages):
        recipes = [read_recipe(stage_recipe, **changes) for stage_recipe in recipe.recipes]
        return Stages(tuple(item for item in recipes if isinstance(item, Recipe)))
    if isinstance(recipe, Mapping):
        return load_recipe(None, arguments=(recipe, changes))
    if recipe is None or isinstance(recipe, (str, Path)):
        return load_recipe(Path(recipe) if recipe else None, arguments=(changes,))
    message = f"a recipe is a path, a mapping or a Recipe, not a {type(recipe).__name__}"
    raise InputError(message, where="recipe")


def load_recipe(
    path: Path | None,
    overrides: Mapping[str, str] | None = None,
    *,
    arguments: Sequence[Mapping[str, Any]] = (),
) -> Recipe | Stages:
    """Load a recipe file with `overrides` and `arguments` applied in turn.

    `overrides` map a key, in any spelling, to its text as on the command line; lists are written
    as in YAML: `[q_proj, v_proj]`. `arguments` map keys to Python values."""
    document = read_yaml(path) if path else YamlMapping("recipe")
    cwd = Path.cwd()
    folder = path.absolute().parent if path else cwd
    problems: list[_Problem] = []
    for key, line in document.duplicates:
        problems.append(_Problem(f"{document.name}:{line}", f"'{key}' is repeated"))
    file_settings = [
        _RawSetting(key, value, document.format_location((key,)), folder)
        for key, value in document.values.items()
    ]
    flag_settings = [
        _RawSetting(f"--{key}", read_flag(text), COMMAND_LINE, cwd)
        for key, text in (overrides or {}).items()
    ]
    layers = [_index_by_key(file_settings, problems), _index_by_key(flag_settings, problems)]
    for layer in arguments:
        argument_settings = [
            _RawSetting(str(key), _to_yaml_value(key, value), ARGUMENTS, cwd)
            for key, value in layer.items()
        ]
        layers.append(_index_by_key(argument_settings, problems))
    stage = _merge_layers(layers).get("stage")
    if stage is not None and isinstance(stage.value, list):
        stage_settings = _split_stages(layers, stage, document, problems)
    else:
        stage_settings = [_merge_layers(layers)]
    recipes: list[Recipe] = []
    for settings in stage_settings:
        if (recipe := _build(settings, document, problems)) is not None:
            recipes.append(recipe)
    if problems or len(recipes) < len(stage_settings):
        raise _combine_problems(document.name, list(dict.fromkeys(problems)))
    if stage is not None and isinstance(stage.value, list):
        return Stages(tuple(recipes))
    return recipes[0]


def _merge_layers(layers: Iterable[Mapping[str, _RawSetting]]) -> dict[str, _RawSetting]:
    """Merge settings by key; later layers win."""
    merged: dict[str, _RawSetting] = {}
    for layer in layers:
        merged.update(layer)
    return merged


def _index_by_key(settings: list[_RawSetting], problems: list[_Problem]) -> dict[str, _RawSetting]:
    """Index settings by recipe key; add unknown and repeated keys to `problems`."""
    by_key: dict[str, _RawSetting] = {}
    for setting in settings:
        key = normalize_key(setting.raw_key)
        key = ALIASES.get(key, key)
        if key not in KEYS:
            is_listed = len(problems) < MAX_PROBLEMS  # looking for a close key takes a while
            message = describe_unknown_key(setting.raw_key, (*KEYS, *ALIASES) if is_listed else ())
            problems.append(_Problem(setting.where, message))
        elif key in by_key:
            message = f"'{setting.raw_key}' and '{by_key[key].raw_key}' are the same key: keep one"
            problems.append(_Problem(setting.where, message))
        else:
            by_key[key] = setting
    return by_key


def _to_yaml_value(key: object, value: Any) -> Any:
    """Convert a Python value to what YAML would hold: paths are texts, tuples are lists."""
    try:
        return to_jsonable(value, str(key))
    except (TypeError, ValueError) as error:
        raise InputError(str(error), where=ARGUMENTS) from None


def _build(
    settings: dict[str, _RawSetting], document: YamlMapping, problems: list[_Problem]
) -> Recipe | None:
    """Validate one recipe; add what is wrong to `problems`."""
    values: Json = {}
    for key, setting in settings.items():
        values[key] = _resolve_paths(key, setting.value, setting.folder)
    valid = validate_keys(values)
    invalid_keys = [key for key in values if key not in valid]
    if "stage" not in invalid_keys:  # most contradictions depend on it
        for key, message in find_contradictions(valid, invalid_keys):
            problems.append(_Problem(settings[key].where, message))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems += _iter_invalid_values(error, settings, document)
        return None


def _iter_invalid_values(
    error: ValidationError, settings: dict[str, _RawSetting], document: YamlMapping
) -> Iterator[_Problem]:
    """Yield one problem per place; pydantic reports a union once per member."""
    recipe_schema = build_recipe_schema()
    properties = recipe_schema["properties"]
    reported: set[Location] = set()
    for detail in error.errors():
        # Without a place: contradictions, which are listed already.
        location = locate_error(detail, recipe_schema)
        if not location or location in reported:
            continue
        if detail["type"] == "too_short" and detail["input"]:
            continue  # the items were refused, each with its own message
        reported.add(location)
        key = str(location[0])
        if key not in settings:
            yield _Problem(document.name, f"'{key}' is missing. {properties[key]['description']}")
            continue
        setting = settings[key]
        where = setting.where
        if where not in (COMMAND_LINE, ARGUMENTS):
            path = (*setting.parent_path, setting.raw_key, *location[1:])
            where = document.format_location(path)
        if key == "stage" and setting.parent_path:  # in a list of stages: one stage, not a list
            properties["stage"] = properties["stage"]["anyOf"][0]
        message = describe_error(setting.raw_key, setting.value, location, detail, recipe_schema)
        yield _Problem(where, message)


def _combine_problems(name: str, problems: list[_Problem]) -> InputError:
    if len(problems) == 1:
        return InputError(problems[0].message, where=problems[0].where)
    lines = [f"{len(problems)} problems"]
    problems = sorted(problems, key=lambda problem: _parse_line(problem.where))
    for problem in problems[:MAX_PROBLEMS]:
        lines.append(f"  {problem.where}: {problem.message}")
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"  and {len(problems) - MAX_PROBLEMS:,} more")
    return InputError("\n".join(lines), where=name)


def _parse_line(where: str) -> float:
    """Return the line number for sorting: the file as a whole first, the command line last."""
    line = where.rpartition(":")[2]
    if line.isdigit():
        return int(line)
    return math.inf if where == COMMAND_LINE else 0


# ---------------------------------------------------------------- stages


def _split_stages(
    layers: Sequence[dict[str, _RawSetting]],
    stages: _RawSetting,
    document: YamlMapping,
    problems: list[_Problem],
) -> list[dict[str, _RawSetting]]:
    """Return the settings of each stage: shared keys, then its own, then those that override the
    list of stages."""
    if not stages.value:
        message = "stage: an empty list trains nothing; name at least one"
        problems.append(_Problem(stages.where, message))
    level = max(index for index, layer in enumerate(layers) if layer.get("stage") is stages)
    stage_settings: list[dict[str, _RawSetting]] = []
    for index, item in enumerate(cast("list[Any]", stages.value)):
        stage_layer = _parse_stage(item, index, stages, document, problems)
        if stage_layer is None:
            continue
        merged = _merge_layers([*layers[: level + 1], stage_layer, *layers[level + 1 :]])
        if index:  # later stages continue the adapter of the first
            merged.pop("adapter_from", None)
        stage_settings.append(merged)
    return _drop_unused_keys(stage_settings)


def _drop_unused_keys(
    stage_settings: Sequence[dict[str, _RawSetting]],
) -> list[dict[str, _RawSetting]]:
    """Remove from each stage the keys beside the list that have no effect in it, if they have an
    effect in another one: batch_size is of sft, batch_tokens of cpt."""
    unused_keys: list[set[str]] = []
    for settings in stage_settings:
        values = {key: setting.value for key, setting in settings.items()}
        problems = find_contradictions(validate_keys(values))
        unused_keys.append({key for key, _ in problems if key in STAGE_KEYS})
    unused_anywhere = set.intersection(*unused_keys) if unused_keys else set[str]()
    used_settings: list[dict[str, _RawSetting]] = []
    for settings, unused in zip(stage_settings, unused_keys, strict=True):
        used: dict[str, _RawSetting] = {}
        for key, setting in settings.items():
            is_shared = not setting.parent_path
            if not (is_shared and key in unused - unused_anywhere):
                used[key] = setting
        used_settings.append(used)
    return used_settings


def _parse_stage(
    item: Any, index: int, stages: _RawSetting, document: YamlMapping, problems: list[_Problem]
) -> dict[str, _RawSetting] | None:
    """Index the settings of one stage, with its name under `stage`; None if it has no name."""
    name, values = _parse_stage_item(item)
    path = (stages.raw_key, index, name)
    is_in_file = stages.where not in (COMMAND_LINE, ARGUMENTS)
    where = document.format_location(path) if is_in_file else stages.where
    if not name:
        text = describe_value(item)
        message = f"stage[{index}]: expected a stage or a mapping {{stage: keys}}, found {text}"
        problems.append(_Problem(where, message))
        return None
    settings: list[_RawSetting] = []
    for key, value in values.items():
        key_where = document.format_location((*path, key)) if is_in_file else where
        settings.append(_RawSetting(str(key), value, key_where, stages.folder, path))
    layer = _index_by_key(settings, problems)
    for key in layer.keys() & set(RUN_LEVEL_KEYS):
        message = f"stage[{index}]: '{key}' is the same for all stages: move it out of the list"
        problems.append(_Problem(layer[key].where, message))
    layer["stage"] = _RawSetting(f"stage[{index}]", name, where, stages.folder, path[:2])
    return layer


def _parse_stage_item(item: Any) -> tuple[str, Json]:
    """Return (name, keys) of `cpt` or `{cpt: {...}}`; the name is empty for anything else."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(cast("Json", item)) == 1:
        ((name, values),) = cast("dict[Any, Any]", item).items()
        if isinstance(name, str) and (values is None or isinstance(values, dict)):
            return name, cast("Json", values or {})
    return "", {}


# ---------------------------------------------------------------- paths


def _resolve_paths(key: str, value: Any, folder: Path) -> Any:
    """Make the input paths of a value absolute; a model that is not a file here stays a name."""
    if key == "rehearsal" and isinstance(value, dict) and "data" in value:
        data = cast("Json", value)["data"]
        if is_self_generated(data):
            return cast("Any", value)
        return {**cast("Json", value), "data": _resolve_paths("data", data, folder)}
    if key == "test_data" and _is_no_test(value):
        return NO_DATA
    if key in SOURCE_KEYS:
        items = wrap_list(cast("Any", value))
        sources = [_resolve_source(item, folder) for item in items]
        return sources if isinstance(value, list) else sources[0]
    if key == "retention_data":
        return _resolve_general_texts(value, folder)
    if key in ("response_schema", "adapter_from"):
        return _resolve_path(value, folder)
    if key == "chat_template" and value not in ("auto", "none"):
        return _resolve_path(value, folder)
    if key == "metrics" and isinstance(value, (str, list)) and value != "auto":
        return [_resolve_metric_path(item, folder) for item in wrap_list(cast("Any", value))]
    if key == "model" and isinstance(value, str) and value:
        path = _resolve_path(value, folder)
        return path if os.path.exists(path) else value
    return value


def _resolve_general_texts(value: Any, folder: Path) -> Any:
    """Raises InputError for a name of the hub."""
    if value in (BUILT_IN, NO_DATA):
        return value
    if isinstance(value, str) and make_hub_path(value, folder):
        message = f"there is no file {value!r:.200}, and data sets of the hub are not read here"
        fix = "download it and name the file; data, eval_data and test_data take names of the hub"
        raise InputError(message, where="retention_data", fix=fix)
    return _resolve_path(value, folder)


def _resolve_metric_path(value: Any, folder: Path) -> Any:
    """Make the path of a custom metric, FILE.py:FUNCTION, absolute."""
    is_custom = isinstance(value, str) and parse_custom_metric(value)
    return _resolve_path(value, folder) if is_custom else value


def _is_no_test(value: Any) -> bool:
    """Return whether test_data is none, also as a stored recipe has it: a source of that path."""
    first, *others = wrap_list(value) or [None]
    path = cast("Json", first).get("path") if isinstance(first, dict) else first
    return not others and path == NO_DATA


def _resolve_source(value: Any, folder: Path) -> Any:
    """Make the path of a data source absolute; one that is on the hub becomes hf://org/name."""
    if isinstance(value, dict) and "path" in value:
        source = cast("Json", value)
        return {**source, "path": _resolve_source(source["path"], folder)}
    hub_path = make_hub_path(value, folder) if isinstance(value, str) else ""
    return hub_path or _resolve_path(value, folder)


def _resolve_path(value: Any, folder: Path) -> Any:
    return str(folder / os.path.expanduser(value)) if isinstance(value, str) and value else value


# ---------------------------------------------------------------- flags, and recipes in files


def is_flag_value(flag: str, word: str) -> bool:
    """Return whether the word after a flag is its value; a switch takes only true and false."""
    field = _find_field(flag)
    if field is not None and field.annotation is bool:
        return word.lower() in ("true", "false")
    return not word.startswith("--")


def needs_value(flag: str) -> bool:
    """Return whether a flag is a key that cannot be a switch."""
    field = _find_field(flag)
    return field is not None and bool not in (field.annotation, *get_args(field.annotation))


def list_choices(flag: str) -> tuple[str, ...]:
    """Return the words that a flag accepts, if it accepts nothing else."""
    field = _find_field(flag)
    choices: list[str] = []
    parts = [] if field is None else [field.annotation]
    while parts:
        part = parts.pop(0)
        if get_origin(part) is Literal:
            choices += get_args(part)
        elif get_origin(part) is Annotated:
            parts.insert(0, get_args(part)[0])
        elif get_args(part):
            parts = [*get_args(part), *parts]
        else:  # a number, a text or a path
            return ()
    return tuple(map(str, choices))


def _find_field(flag: str) -> FieldInfo | None:
    """Return the field that a flag sets, by its name or a former one."""
    key = normalize_key(flag)
    return Recipe.model_fields.get(ALIASES.get(key, key))


def rebuild_recipe(values: Mapping[str, Any]) -> Recipe:
    """Rebuild the recipe stored in a plan. Raises InputError if another version wrote it."""
    try:
        keys = {k for k, value in values.items() if value is not None or k == "retention_data"}
        return Recipe.model_validate({key: values[key] for key in keys})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the recipe in the plan is invalid: {key}: {first['msg']}",
            where="plan.json",
            fix="use the tunesmith version that wrote it, or start a new run from recipe.yaml",
        ) from None


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with the keys that were set; it reads back equal in any folder."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
