"""The recipe: what the user wishes for, under the names that people already know from Hugging Face.

In: plain values (from a file and flags by recipefile.py, or keyword arguments). Out: a frozen `Recipe`, and its JSON
schema for editors. Values left at "auto" are decided later, in the plan; nothing here looks at the machine, the model
or the data. A key exists only when it changes what a run does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tunesmith.core.types import Json
from tunesmith.recipe.fields import (
    Auto,
    Constraint,
    Constraints,
    Count,
    DataSource,
    FilePath,
    Metrics,
    Mixture,
    Name,
    NewTokens,
    NotNegative,
    Positive,
    Regex,
    Rehearsal,
    Share,
    Sources,
    Template,
    TemplateValue,
    as_policy,
    items,
    no_switch,
    optimizer_name,
    stage_name,
    task_of,
)
from tunesmith.recipe.mappings import Guard, GuardWish, PairLoss, PairLossWish


class Recipe(BaseModel):
    """One fine-tuning run, as wished for. Only `model` and `data` are needed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Name = Field(description="Base model: a built-in name, a local folder, a GGUF file or a hub id.")
    method: Auto | Literal["lora", "qlora", "full"] = Field(
        default="auto", description="What is trained: an adapter, an adapter on 4-bit weights, or all weights."
    )
    adapter_from: FilePath | None = Field(
        default=None, description="Go on with this LoRA adapter: an adapter folder, ours or PEFT's, or a run folder."
    )
    stage: Annotated[Literal["sft", "cpt", "preference"], BeforeValidator(stage_name)] = Field(
        default="sft",
        description="sft trains on answers, cpt on plain texts (continued pretraining), preference on pairs.",
    )

    data: Sources = Field(min_length=1, description="Training rows: a path, or a list of {path, format, columns, ...}.")
    eval_data: Sources = Field(
        default=(), description="Held-out rows that select (checkpoints, settings); never trained on."
    )
    eval_split: Annotated[float, Field(gt=0, lt=1), BeforeValidator(no_switch)] | None = Field(
        default=None, description="Instead of eval_data: this share of data, chosen by hash, is held out."
    )
    test_data: Sources = Field(
        default=(), description="Rows read once, for the before/after; else half of the held-out rows."
    )
    retention_data: FilePath | None = Field(
        default=None, description="General text; its bits per byte show what was forgotten."
    )
    rehearsal: Rehearsal | None = Field(
        default=None, description="General rows trained beside the data against forgetting: {data, ratio, shift}."
    )
    mixture: Mixture | None = Field(
        default=None, description="How much of each task of data an epoch holds: {temperature, limit}."
    )
    never: Constraints = Field(
        default=(), description="What no answer may say: patterns, names of checkers, or {match, mode, ...}."
    )
    max_examples: Count | None = Field(default=None, description="Train on at most this many rows, the first ones.")
    skip_bad: bool = Field(
        default=False, description="Leave out rows that cannot be used, instead of stopping; all are counted."
    )
    template: Auto | Literal["none"] | Template = Field(
        default="auto",
        description="Chat template: the model's own (auto), none for plain text, or the path of a .jinja file.",
    )
    chat_template_kwargs: dict[Name, TemplateValue] = Field(
        default={}, description="What the chat template is told: {enable_thinking: false}."
    )
    add_tokens: NewTokens = Field(
        default=(), description="New tokens: each is one id, and its rows in embedding and head are trained."
    )
    answer_schema: FilePath | None = Field(
        default=None, alias="schema", description="JSON schema that a right answer follows."
    )

    max_length: Auto | Count = Field(default="auto", description="Longest document, in tokens.")
    overlong: Literal["drop", "truncate", "refuse"] = Field(
        default="drop", description="What happens to longer documents."
    )
    pack_length: Auto | Count = Field(
        default="auto", description="Tokens computed side by side; changes speed, not results."
    )
    share_prefixes: Auto | bool = Field(
        default="auto",
        description="Compute once what documents of a step begin with alike; changes speed, not results.",
    )
    batch_size: Auto | Count = Field(default="auto", description="Data rows per optimizer step.")
    batch_tokens: Auto | Count = Field(default="auto", description="Tokens per optimizer step, with stage: cpt.")
    num_train_epochs: Auto | Positive = Field(default="auto", description="Passes over the data.")
    max_steps: Count | None = Field(default=None, description="Optimizer steps; wins over num_train_epochs.")

    learning_rate: Auto | Annotated[float, Field(gt=0, le=1), BeforeValidator(no_switch)] = Field(
        default="auto", description="Peak learning rate."
    )
    lr_scheduler_type: Auto | Literal["linear", "cosine", "constant"] = Field(
        default="auto", description="How the learning rate falls after warm-up."
    )
    warmup_ratio: Auto | Share = Field(
        default="auto", description="Share of the steps in which the learning rate rises."
    )
    optim: Auto | Annotated[Literal["adamw", "adamw_8bit"], BeforeValidator(optimizer_name)] = Field(
        default="auto", description="The optimizer: AdamW with its two moments in fp32, or in 8 bits."
    )
    weight_decay: Auto | Share = Field(
        default="auto", description="AdamW weight decay of matrices, per unit of learning rate."
    )
    max_grad_norm: Auto | NotNegative = Field(default="auto", description="Gradients are clipped to it; 0: never.")

    loss: PairLossWish = Field(
        default=PairLoss(), description="Loss of preference pairs: auto, dpo, orpo, simpo, or {name, beta, gamma, ...}."
    )

    lora_r: Auto | Count = Field(default="auto", description="LoRA rank.")
    lora_alpha: Auto | Positive = Field(
        default="auto", description="LoRA scale is alpha / rank, alpha / sqrt(rank) for rsLoRA."
    )
    lora_dropout: Auto | Share = Field(
        default="auto", description="Share of the adapter's inputs dropped while training."
    )
    lora_target_modules: (
        Auto | Literal["all-linear", "attention", "mlp"] | Regex | Annotated[tuple[Name, ...], Field(min_length=1)]
    ) = Field(default="auto", description="Layers that get an adapter; a list has names such as q_proj.")
    use_rslora: Auto | bool = Field(default="auto", description="Scale by alpha / sqrt(rank), for high ranks.")
    use_dora: Auto | bool = Field(
        default="auto", description="DoRA: the adapter also trains the length of each row of a weight."
    )

    dtype: Auto | Literal["bf16", "fp32"] = Field(
        default="auto", description="Number format of the frozen weights and products."
    )
    attention: Auto | Literal["kernel", "documents", "varlen", "mask", "reference"] = Field(
        default="auto", description="Attention backend; auto picks the fastest that is proven equal."
    )
    activations: Auto | Annotated[Literal["keep", "selective", "recompute"], BeforeValidator(as_policy)] = Field(
        default="auto",
        description="What the backward finds of the forward, and what it computes anew: memory against time.",
    )
    metrics: Auto | Metrics = Field(
        default="auto", description="Scores of the before/after; auto picks by the answers. docs/eval.md lists them."
    )
    guard: GuardWish = Field(
        default=Guard(),
        description="What happens when the model collapses or forgets: {collapse, forgetting, ...}; or off.",
    )
    save_steps: Auto | Count = Field(default="auto", description="Optimizer steps between checkpoints.")
    eval_steps: Auto | Count = Field(default="auto", description="Optimizer steps between held-out losses.")
    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(no_switch)] = Field(
        default=0, description="Fixes the order of rows, the start of the adapter and the samples."
    )
    output_dir: Auto | FilePath = Field(default="auto", description="The run folder; must be new or empty.")

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        given = {KEYS[name]: getattr(self, name) for name in self.model_fields_set}
        if problems := [message for _, message in contradictions(given)]:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class Stages:
    """Recipes that are trained one after another in one run folder; each has the keys of the whole and its own."""

    recipes: tuple[Recipe, ...]


OF_THE_WHOLE = ("model", "adapter_from", "stage", "output_dir")  # keys that a stage has not for itself
KEYS = {name: info.alias or name for name, info in Recipe.model_fields.items()}  # attribute -> recipe key

ALIASES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "finetuning_type": "method",
    "adapter": "method",
    "eval_dataset": "eval_data",
    "val_size": "eval_split",
    "val_set_size": "eval_split",
    "max_samples": "max_examples",
    "chat_template": "template",
    "new_special_tokens": "add_tokens",
    "tokens": "add_tokens",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "gradient_checkpointing": "activations",
    "gradient_clipping": "max_grad_norm",
    "pref_loss": "loss",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}

NOT_OF_TEXTS = {
    "batch_size": "which counts batch_tokens",
    "overlong": "which cuts long texts into windows",
    "metrics": "which measures bits per byte",
    "schema": "which trains no answers",
    "mixture": "whose texts are no tasks",
    "share_prefixes": "whose windows do not begin alike",
}
SOURCE_KEYS = ("data", "eval_data", "test_data")
FILE_KEYS = (*SOURCE_KEYS, "retention_data")


def contradictions(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, message) for keys that cannot both hold. Takes values as written or as validated, paths absolute."""
    found: list[tuple[str, str]] = []
    given = {key: value for key, value in values.items() if value not in (None, "auto", (), [])}
    if "eval_data" in given and "eval_split" in given:
        found.append(("eval_split", "eval_data and eval_split contradict each other: keep one"))
    if given.get("method") == "full":
        adapter_keys = [key for key in given if key.startswith("lora_") or key in ("use_rslora", "use_dora")]
        adapter_keys += ["adapter_from"] * ("adapter_from" in given)
        found += [(key, f"{key} has no effect with method: full, which trains no adapter") for key in adapter_keys]
    if given.get("template") == "none" and given.get("chat_template_kwargs"):
        found.append(("chat_template_kwargs", "chat_template_kwargs has no effect with template: none"))
    if given.get("share_prefixes") is True and given.get("lora_dropout"):
        found.append(("share_prefixes", "share_prefixes contradicts lora_dropout, which draws for each document"))
    found += _of_the_stage(given)
    if _inside(given.get("rehearsal")).get("ratio") == "adaptive" and "retention_data" not in given:
        what = "rehearsal: ratio adaptive follows what is measured on retention_data, which the recipe does not name"
        found.append(("rehearsal", what))
    found += _of_tasks(given)
    files = {key: _paths(given[key]) for key in (*FILE_KEYS, "rehearsal") if key in given}
    for position, key in enumerate(files):
        for earlier in list(files)[:position]:
            if same := files[key] & files[earlier]:
                found.append((key, f"{key} and {earlier} name the same file, {min(same)}: a score on it shows nothing"))
    longest, pack = given.get("max_length"), given.get("pack_length")
    if isinstance(longest, int) and isinstance(pack, int) and longest > pack:
        found.append(
            ("pack_length", f"pack_length {pack} is below max_length {longest}: a document must fit in a pack")
        )
    return found


def _of_the_stage(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What only pairs or only texts have, and what they cannot have."""
    stage = given.get("stage", "sft")
    found: list[tuple[str, str]] = []
    if stage != "cpt" and "batch_tokens" in given:
        found.append(("batch_tokens", "batch_tokens has no effect without stage: cpt; set batch_size"))
    if stage in ("cpt", "pt"):
        wrong = {key: why for key, why in NOT_OF_TEXTS.items() if given.get(key, False) not in (False, "drop")}
        found += [(key, f"{key} has no effect with stage: cpt, {why}") for key, why in wrong.items()]
    if stage != "sft" and "ban" in _modes(given):
        found.append(("never", f"never: mode ban has no effect with stage: {stage}; use mode: filter"))
    if stage != "preference" and "pair" in _modes(given):
        found.append(("never", f"never: mode pair has no effect with stage: {stage}; use stage: preference"))
    if stage != "preference":
        return found + [("loss", "loss has no effect without stage: preference")] * _wishes(given.get("loss"))
    return found + _of_pairs(given)


def _of_pairs(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    pairs = _inside(given.get("loss"))
    name = pairs.get("name", "auto")
    if pairs.get("gamma", "auto") != "auto" and name != "simpo":
        wanted = "" if name != "auto" else ": add name: simpo"
        what = f"loss: gamma has no effect with {'dpo' if name == 'auto' else name}, it is SimPO's{wanted}"
        found.append(("loss", what))
    if "rehearsal" in given:
        found.append(("rehearsal", "rehearsal has no effect with stage: preference, which compares answers"))
    return found


def _of_tasks(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of tasks that cannot be. Files without one have none, unless another file has, or they are mixed."""
    tasks = {key: [_task(item) for item in items(given[key])] for key in SOURCE_KEYS if key in given}
    named = [key for key, found in tasks.items() if any(says for says, _ in found)]
    found: list[tuple[str, str]] = []
    if named and given.get("stage") in ("cpt", "pt"):
        found.append(
            (named[0], f"{named[0]}: name and prompts have no effect with stage: cpt, whose texts are no tasks")
        )
    for key, members in tasks.items() if named or "mixture" in given else ():
        twice = [name for name, count in Counter(task for _, task in members).items() if name and count > 1]
        found += [(key, f"{key} has the task '{name}' twice: give each source another name") for name in twice]
        if "rehearsal" in given and "rehearsal" in {task for _, task in members}:
            found.append((key, f"{key}: the name 'rehearsal' is that of the rehearsal rows: take another one"))
    return found


def _task(item: Any) -> tuple[bool, str]:
    """(whether a source says that it is a task, what that is called), as written or as validated."""
    if isinstance(item, DataSource):
        return bool(item.name or item.prompts), item.task
    source = cast("Json", item) if isinstance(item, dict) else {"path": item}
    name, path = (value if isinstance(value, (str, Path)) else "" for value in (source.get("name"), source.get("path")))
    return bool(name or source.get("prompts")), str(name) or task_of(Path(path))


def sources_of(recipe: Recipe, key: str) -> tuple[DataSource, ...]:
    """The files of a role, by its key. If any file of the recipe has a name or prompts, or tasks are mixed, all are
    tasks; a held-out file is asked as the training rows of its task are, unless it has prompts of its own."""
    found: tuple[DataSource, ...] = getattr(recipe, key)
    named = any(source.name or source.prompts for role in SOURCE_KEYS for source in getattr(recipe, role))
    if not named and recipe.mixture is None:
        return found
    asked = {source.task: source.prompts for source in recipe.data}
    return tuple(
        source.model_copy(update={"name": source.task, "prompts": source.prompts or asked.get(source.task, ())})
        for source in found
    )


def _modes(given: Mapping[str, Any]) -> set[Any]:
    """Of the constraints, as written or as validated."""
    return {_inside(item).get("mode") for item in items(given.get("never", ()))}


def _wishes(value: Any) -> bool:
    """Something is wished for, as written or as validated."""
    inside = _inside(value)
    return any(wish != "auto" for wish in inside.values()) if inside else value is not None


def _inside(value: Any) -> Json:
    """The keys of a mapping, as written or as validated; none of anything else."""
    if isinstance(value, (Constraint, Guard, PairLoss, Rehearsal)):
        return vars(value)
    return cast("Json", value) if isinstance(value, dict) else {}


def _paths(value: Any) -> set[str]:
    paths: set[str] = set()
    if isinstance(value, Rehearsal):
        value = value.data
    elif isinstance(value, dict) and "data" in value:
        value = cast("Json", value)["data"]
    for item in items(value):
        path = item.path if isinstance(item, DataSource) else item
        if isinstance(item, dict):
            path = cast("Json", item).get("path")
        if isinstance(path, (str, Path)):
            paths.add(os.path.normpath(path))
    return paths


def recipe_schema() -> Json:
    """JSON schema (draft 2020-12) of a recipe file, aliases included, for editors and other programs."""
    schema = Recipe.model_json_schema(by_alias=True)
    properties: Json = schema["properties"]
    for key in KEYS.values():
        properties[key].pop("title", None)
    for alias, key in ALIASES.items():
        properties[alias] = {**properties[key], "description": f"Same as {key}.", "deprecated": True}
    properties["stage"] = _stage_or_list(properties["stage"])
    spellings = [[key, *(alias for alias, of in ALIASES.items() if of == key)] for key in schema.pop("required")]
    staged: Json = {"properties": {"stage": {"type": "array"}}, "required": ["stage"]}  # data may be each stage's own
    needed = [[{"required": [name]} for name in names] for names in spellings]
    schema["allOf"] = [{"anyOf": [*ways, staged] if {"required": ["data"]} in ways else ways} for ways in needed]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _stage_or_list(schema: Json) -> Json:
    """A stage, or a list of stages, each a name or a mapping from the name to the keys of its own."""
    one = {key: value for key, value in schema.items() if key in ("enum", "type")}
    own = {"type": "object", "minProperties": 1, "maxProperties": 1, "propertyNames": one}
    several: Json = {"type": "array", "minItems": 1, "items": {"anyOf": [one, own]}}
    rest = {key: value for key, value in schema.items() if key not in one}
    return {"anyOf": [one, several | {"description": "a list of stages"}], **rest}
