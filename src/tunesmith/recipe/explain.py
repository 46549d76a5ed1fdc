"""Messages about recipe keys and values.

In: a key that is not ours, or an error of pydantic with the recipe's JSON schema. Out: one line of
text. Left out: finding the errors and their place in the file (load.py)."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from tunesmith.core.types import Json
from tunesmith.recipe.fields import (
    Constraint,
    DataSource,
    GuardConfig,
    MixtureConfig,
    PromptForm,
    RehearsalConfig,
)
from tunesmith.recipe.objectives import PairLoss, SchedulerKwargs
from tunesmith.recipe.sweep import SweepConfig, ValueRange

MAX_SHOWN_CHARS = 80  # of a key or value

# Keys of other tools -> what to do instead.
REPLACEMENT_ROWS = (
    (
        "micro_batch_size per_device_train_batch_size gradient_accumulation_steps",
        "set batch_size, the data rows per optimizer step (micro batch x accumulation x devices)",
    ),
    (
        "dataset datasets dataset_name train_file",
        "set data, a path or a list of {path, format, columns, ...}",
    ),
    (
        "packing sample_packing neat_packing",
        "leave it out: documents are always packed, without cross-document attention",
    ),
    (
        "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt",
        "set train_on: answers, all, or a list of roles",
    ),
    (
        "mask_history",
        'set "train": false on the messages that are not trained',
    ),
    (
        "desirable_weight undesirable_weight kto_desirable_weight kto_undesirable_weight "
        "kto_chosen_weight kto_rejected_weight",
        "set loss: {name: kto, desirable_weight: ..., undesirable_weight: ...}",
    ),
    ("bf16 fp16 tf32 torch_dtype", "set dtype: bf16, fp16 or fp32"),
    ("attn_implementation flash_attn flash_attention", "leave it out, or set attention"),
    (
        "deepspeed fsdp fsdp_config",
        "leave it out: `train --gpus N` or torchrun starts processes, and dp_shard_size divides "
        "the weights",
    ),
    ("warmup_steps", "set warmup_ratio, the fraction of steps"),
    (
        "load_in_4bit quantization_bit quantization",
        "set method: qlora, which keeps frozen weights in 4 bits",
    ),
    ("load_in_8bit", "8-bit weights are not supported; set method: qlora for 4 bits"),
    ("lora_target_linear", "set lora_target_modules: all-linear"),
    ("trust_remote_code", "leave it out: code from a model folder is never run"),
    ("rl", "set stage: preference and loss: dpo, orpo, simpo or kto"),
    ("dpo_label_smoothing", "set label_smoothing, with stage: preference"),
    ("beta pref_beta rl_beta", "set loss: {beta: ...}"),
    ("gamma simpo_gamma", "set loss: {name: simpo, gamma: ...}"),
    ("nll_coefficient pref_ftx rpo_alpha", "set loss: {nll_coefficient: ...}"),
    ("resume_from_checkpoint", "run `tunesmith resume RUN`"),
    (
        "report_to logging_steps logging_strategy",
        "leave it out: every step is in events.jsonl",
    ),
    (
        "eval_strategy evaluation_strategy save_strategy",
        "leave it out, or set eval_steps and save_steps",
    ),
    (
        "load_best_model_at_end metric_for_best_model greater_is_better",
        "leave it out: the checkpoint that is best on eval_data is used",
    ),
    ("save_total_limit", "leave it out: the newest two checkpoints and the best are retained"),
    (
        "max_new_tokens generation_max_length generation_max_new_tokens",
        "leave it out: the longest expected answer sets the limit",
    ),
    ("push_to_hub hub_model_id", "run `tunesmith export RUN --to hub`"),
)
REPLACEMENTS = {key: advice for keys, advice in REPLACEMENT_ROWS for key in keys.split()}
PREFERENCE_STAGES = ("dpo", "orpo", "simpo", "kto")
REINFORCEMENT_STAGES = ("grpo", "ppo", "rlhf", "rloo", "reward", "rm")
VALUE_REPLACEMENTS = {
    ("method", "dora"): "set use_dora: true, which works with lora and qlora",
    ("stage", "pretrain"): "set stage: cpt",
    ("stage", "finetune"): "set stage: sft",
}
for _name in PREFERENCE_STAGES:
    VALUE_REPLACEMENTS["stage", _name] = f"set stage: preference and loss: {_name}"
for _name in REINFORCEMENT_STAGES:
    VALUE_REPLACEMENTS["stage", _name] = (
        "reward models and reinforcement learning are not supported; for pairs of answers set "
        "stage: preference"
    )

MAX_NAMED_FIELDS = 5
MAPPINGS: tuple[type[BaseModel], ...] = (
    Constraint,
    DataSource,
    GuardConfig,
    MixtureConfig,
    PairLoss,
    PromptForm,
    RehearsalConfig,
    SchedulerKwargs,
    SweepConfig,
    ValueRange,
)
TYPE_TEXTS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
}
BOUND_TEXTS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}

Location = tuple[str | int, ...]


def describe_unknown_key(raw_key: str, valid_keys: Iterable[str]) -> str:
    """Say what to do about an unknown key: a replacement, or the closest valid key."""
    key = normalize_key(raw_key)
    raw_key = raw_key[:MAX_SHOWN_CHARS]
    if key in REPLACEMENTS:
        return f"'{raw_key}' is not a key here: {REPLACEMENTS[key]}"
    close_keys = difflib.get_close_matches(key, valid_keys, n=1)
    hint = f"did you mean '{close_keys[0]}'?" if close_keys else "`tunesmith schema` lists all"
    return f"unknown key '{raw_key}'; {hint}"


def normalize_key(raw_key: str) -> str:
    return raw_key.lstrip("-").replace("-", "_")


# ---------------------------------------------------------------- invalid values


def locate_error(detail: ErrorDetails, recipe_schema: Json) -> Location:
    """Return the place of an error in the recipe; pydantic's names of union members are cut off."""
    location: Location = ()
    schema: Json | None = recipe_schema
    for part in detail["loc"]:
        schema = _find_child(schema, part, recipe_schema)
        if schema is None:
            is_unknown_key = detail["type"] == "extra_forbidden"
            return (*location, part) if is_unknown_key else location
        location = (*location, part)
    return location


def _find_child(schema: Json, part: str | int, recipe_schema: Json) -> Json | None:
    """Return the schema of a key or list item, looking into every alternative."""
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            option = recipe_schema["$defs"][option["$ref"].rpartition("/")[2]]
        if isinstance(part, int) and "items" in option:
            return option["items"]
        if part in option.get("properties", {}):
            return option["properties"][part]
    return None


def describe_error(
    raw_key: str, value: Any, location: Location, detail: ErrorDetails, recipe_schema: Json
) -> str:
    """Describe an error at `location`; `raw_key` and `value` are the recipe key as written."""
    key = location[0]
    if isinstance(value, str) and (key, value) in VALUE_REPLACEMENTS:
        advice = VALUE_REPLACEMENTS[str(key), value]
        return f"{raw_key}: '{value}' is not a value here: {advice}"
    schemas = [recipe_schema]
    for part in location:
        if (child := _find_child(schemas[-1], part, recipe_schema)) is not None:
            schemas.append(child)
    parent = raw_key + _format_path(location[1:-1])
    if detail["type"] == "extra_forbidden":
        valid_keys = _list_keys(schemas[-1], recipe_schema)
        return f"{parent}: {describe_unknown_key(str(location[-1]), valid_keys)}"
    if detail["type"] == "missing":
        return f"{parent} has no '{location[-1]}'"
    name = raw_key + _format_path(location[1:])
    if detail["type"] == "value_error":
        return f"{name}: {detail['msg'].removeprefix('Value error, ')}"
    invalid_value = value if len(location) == 1 else detail["input"]
    return f"{name}: expected {describe_schema(schemas[-1])}, found {describe_value(invalid_value)}"


def _format_path(parts: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def _list_keys(schema: Json, recipe_schema: Json) -> list[str]:
    """List the keys of the mapping that a schema allows."""
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            return list(recipe_schema["$defs"][option["$ref"].rpartition("/")[2]]["properties"])
    return []


def describe_schema(schema: Json) -> str:
    """Describe the values that a JSON schema allows."""
    if "anyOf" in schema:
        options = cast("list[Json]", schema["anyOf"])
        return " or ".join(opt.get("description") or describe_schema(opt) for opt in options)
    if "$ref" in schema:
        return MAPPING_TEXTS[schema["$ref"].rpartition("/")[2]]
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"'{value}'" for value in values)
    items = schema.get("items", {})
    if items.get("type") == "string" and "format" not in items:
        return "a list of names"
    name = "a path" if schema.get("format") == "path" else TYPE_TEXTS[schema["type"]]
    bounds = [f"{text} {schema[bound]}" for bound, text in BOUND_TEXTS.items() if bound in schema]
    return f"{name} {' and '.join(bounds)}".strip()


def describe_value(value: Any) -> str:
    """Describe a value from YAML."""
    if isinstance(value, bool):
        text = str(value).lower()
        return f"{text} (YAML reads on, yes, off and no as true and false; quotes make them text)"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value[:MAX_SHOWN_CHARS]}'" if value else "an empty text"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, (list, dict)):
        kind = "list" if isinstance(value, list) else "mapping"
        return f"the {kind} {reprlib.repr(cast('Any', value)):.60}"
    return (
        f"the {type(value).__name__} {str(value)[:MAX_SHOWN_CHARS]} (quote it to make it a string)"
    )


def _describe_mapping(model: type[BaseModel]) -> str:
    names = list(model.model_fields)
    if len(names) > MAX_NAMED_FIELDS:
        names = [*names[: MAX_NAMED_FIELDS - 2], "..."]
    return f"a mapping {{{', '.join(names)}}}"


MAPPING_TEXTS = {model.__name__: _describe_mapping(model) for model in MAPPINGS}
