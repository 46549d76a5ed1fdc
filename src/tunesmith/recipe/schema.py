"""The recipe: what the user wishes for, under the names that people already know from Hugging Face.

In: plain values (from a file and flags by recipefile.py, or keyword arguments). Out: a frozen
`Recipe`, and its JSON schema for editors. Values left at "auto" are decided later, in the plan;
nothing here looks at the machine, the model or the data. A key exists only when it changes what a
run does."""

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
    MixtureConfig,
    Name,
    NewTokens,
    NotNegative,
    Positive,
    Regex,
    RehearsalConfig,
    Share,
    Sources,
    Template,
    TemplateValue,
    as_list,
    make_task_name,
    normalize_activations,
    normalize_optimizer,
    normalize_stage,
    reject_bool,
)
from tunesmith.recipe.mappings import GuardConfig, GuardField, PairLoss, PairLossField


class Recipe(BaseModel):
    """One fine-tuning run, as wished for. Only `model` and `data` are needed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Name = Field(
        description="Base model: a built-in name, a local folder, a GGUF file or a hub id."
    )
    method: Auto | Literal["lora", "qlora", "full"] = Field(
        default="auto",
        description="What is trained: an adapter, an adapter on 4-bit weights, or all weights.",
    )
    adapter_from: FilePath | None = Field(
        default=None,
        description="Go on with this LoRA adapter: an adapter folder, ours or PEFT's, or a run folder.",
    )
    stage: Annotated[Literal["sft", "cpt", "preference"], BeforeValidator(normalize_stage)] = Field(
        default="sft",
        description="sft trains on answers, cpt on plain texts (continued pretraining), preference on pairs.",
    )

    data: Sources = Field(
        min_length=1,
        description="Training rows: a path, or a list of {path, format, columns, ...}.",
    )
    eval_data: Sources = Field(
        default=(),
        description="Held-out rows that select (checkpoints, settings); never trained on.",
    )
    eval_split: Annotated[float, Field(gt=0, lt=1), BeforeValidator(reject_bool)] | None = Field(
        default=None,
        description="Instead of eval_data: this share of data, chosen by hash, is held out.",
    )
    test_data: Sources = Field(
        default=(),
        description="Rows read once, for the before/after; else half of the held-out rows.",
    )
    retention_data: FilePath | None = Field(
        default=None, description="General text; its bits per byte show what was forgotten."
    )
    rehearsal: RehearsalConfig | None = Field(
        default=None,
        description="General rows trained beside the data against forgetting: {data, ratio, shift}.",
    )
    mixture: MixtureConfig | None = Field(
        default=None,
        description="How much of each task of data an epoch holds: {temperature, limit}.",
    )
    never: Constraints = Field(
        default=(),
        description="What no answer may say: patterns, names of checkers, or {match, mode, ...}.",
    )
    max_examples: Count | None = Field(
        default=None, description="Train on at most this many rows, the first ones."
    )
    skip_bad: bool = Field(
        default=False,
        description="Leave out rows that cannot be used, instead of stopping; all are counted.",
    )
    template: Auto | Literal["none"] | Template = Field(
        default="auto",
        description="Chat template: the model's own (auto), none for plain text, or the path of a .jinja file.",
    )
    chat_template_kwargs: dict[Name, TemplateValue] = Field(
        default={}, description="What the chat template is told: {enable_thinking: false}."
    )
    add_tokens: NewTokens = Field(
        default=(),
        description="New tokens: each is one id, and its rows in embedding and head are trained.",
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
    batch_tokens: Auto | Count = Field(
        default="auto", description="Tokens per optimizer step, with stage: cpt."
    )
    num_train_epochs: Auto | Positive = Field(default="auto", description="Passes over the data.")
    max_steps: Count | None = Field(
        default=None, description="Optimizer steps; wins over num_train_epochs."
    )

    learning_rate: Auto | Annotated[float, Field(gt=0, le=1), BeforeValidator(reject_bool)] = Field(
        default="auto", description="Peak learning rate."
    )
    lr_scheduler_type: Auto | Literal["linear", "cosine", "constant"] = Field(
        default="auto", description="How the learning rate falls after warm-up."
    )
    warmup_ratio: Auto | Share = Field(
        default="auto", description="Share of the steps in which the learning rate rises."
    )
    optim: (
        Auto | Annotated[Literal["adamw", "adamw_8bit"], BeforeValidator(normalize_optimizer)]
    ) = Field(
        default="auto",
        description="The optimizer: AdamW with its two moments in fp32, or in 8 bits.",
    )
    weight_decay: Auto | Share = Field(
        default="auto", description="AdamW weight decay of matrices, per unit of learning rate."
    )
    max_grad_norm: Auto | NotNegative = Field(
        default="auto", description="Gradients are clipped to it; 0: never."
    )

    loss: PairLossField = Field(
        default=PairLoss(),
        description="Loss of preference pairs: auto, dpo, orpo, simpo, or {name, beta, gamma, ...}.",
    )

    lora_r: Auto | Count = Field(default="auto", description="LoRA rank.")
    lora_alpha: Auto | Positive = Field(
        default="auto", description="LoRA scale is alpha / rank, alpha / sqrt(rank) for rsLoRA."
    )
    lora_dropout: Auto | Share = Field(
        default="auto", description="Share of the adapter's inputs dropped while training."
    )
    lora_target_modules: (
        Auto
        | Literal["all-linear", "attention", "mlp"]
        | Regex
        | Annotated[tuple[Name, ...], Field(min_length=1)]
    ) = Field(
        default="auto", description="Layers that get an adapter; a list has names such as q_proj."
    )
    use_rslora: Auto | bool = Field(
        default="auto", description="Scale by alpha / sqrt(rank), for high ranks."
    )
    use_dora: Auto | bool = Field(
        default="auto",
        description="DoRA: the adapter also trains the length of each row of a weight.",
    )

    dtype: Auto | Literal["bf16", "fp32"] = Field(
        default="auto", description="Number format of the frozen weights and products."
    )
    attention: Auto | Literal["kernel", "documents", "varlen", "mask", "reference"] = Field(
        default="auto",
        description="Attention backend; auto picks the fastest that is proven equal.",
    )
    activations: (
        Auto
        | Annotated[
            Literal["keep", "selective", "recompute"], BeforeValidator(normalize_activations)
        ]
    ) = Field(
        default="auto",
        description="What the backward finds of the forward, and what it computes anew: memory against time.",
    )
    metrics: Auto | Metrics = Field(
        default="auto",
        description="Scores of the before/after; auto picks by the answers. docs/guides/evaluate.md lists them.",
    )
    guard: GuardField = Field(
        default=GuardConfig(),
        description="What happens when the model collapses or forgets: {collapse, forgetting, ...}; or off.",
    )
    save_steps: Auto | Count = Field(
        default="auto", description="Optimizer steps between checkpoints."
    )
    eval_steps: Auto | Count = Field(
        default="auto", description="Optimizer steps between held-out losses."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(reject_bool)] = Field(
        default=0, description="Fixes the order of rows, the start of the adapter and the samples."
    )
    output_dir: Auto | FilePath = Field(
        default="auto", description="The run folder; must be new or empty."
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        settings = {KEYS[name]: getattr(self, name) for name in self.model_fields_set}
        if problems := [message for _, message in find_contradictions(settings)]:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class Stages:
    """Recipes that are trained one after another in one run folder; each has the keys of the whole
    and its own."""

    recipes: tuple[Recipe, ...]


RUN_LEVEL_KEYS = (
    "model",
    "adapter_from",
    "stage",
    "output_dir",
)  # keys that a stage has not for itself
KEYS = {
    name: info.alias or name for name, info in Recipe.model_fields.items()
}  # attribute -> recipe key

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

UNUSED_CPT_KEYS = {
    "batch_size": "which counts batch_tokens",
    "overlong": "which cuts long texts into windows",
    "metrics": "which measures bits per byte",
    "schema": "which trains no answers",
    "mixture": "whose texts are no tasks",
    "share_prefixes": "whose windows do not begin alike",
}
SOURCE_KEYS = ("data", "eval_data", "test_data")
FILE_KEYS = (*SOURCE_KEYS, "retention_data")


def find_contradictions(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, message) for keys that cannot both hold. Takes values as written or as validated, paths
    absolute."""
    problems: list[tuple[str, str]] = []
    settings = {key: value for key, value in values.items() if value not in (None, "auto", (), [])}
    if "eval_data" in settings and "eval_split" in settings:
        problems.append(("eval_split", "eval_data and eval_split contradict each other: keep one"))
    if settings.get("method") == "full":
        adapter_keys = [
            key for key in settings if key.startswith("lora_") or key in ("use_rslora", "use_dora")
        ]
        adapter_keys += ["adapter_from"] * ("adapter_from" in settings)
        problems += [
            (key, f"{key} has no effect with method: full, which trains no adapter")
            for key in adapter_keys
        ]
    if settings.get("template") == "none" and settings.get("chat_template_kwargs"):
        problems.append(
            ("chat_template_kwargs", "chat_template_kwargs has no effect with template: none")
        )
    if settings.get("share_prefixes") is True and settings.get("lora_dropout"):
        problems.append(
            (
                "share_prefixes",
                "share_prefixes contradicts lora_dropout, which draws for each document",
            )
        )
    problems += _find_stage_contradictions(settings)
    if (
        _to_mapping(settings.get("rehearsal")).get("ratio") == "adaptive"
        and "retention_data" not in settings
    ):
        message = "rehearsal: ratio adaptive follows what is measured on retention_data, which the recipe does not name"
        problems.append(("rehearsal", message))
    problems += _find_task_contradictions(settings)
    files = {
        key: _collect_paths(settings[key]) for key in (*FILE_KEYS, "rehearsal") if key in settings
    }
    for position, key in enumerate(files):
        for earlier_key in list(files)[:position]:
            if shared_paths := files[key] & files[earlier_key]:
                problems.append(
                    (
                        key,
                        f"{key} and {earlier_key} name the same file, {min(shared_paths)}: a score on it shows nothing",
                    )
                )
    max_length, pack_length = settings.get("max_length"), settings.get("pack_length")
    if isinstance(max_length, int) and isinstance(pack_length, int) and max_length > pack_length:
        problems.append(
            (
                "pack_length",
                f"pack_length {pack_length} is below max_length {max_length}: a document must fit in a pack",
            )
        )
    return problems


def _find_stage_contradictions(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What only pairs or only texts have, and what they cannot have."""
    stage = settings.get("stage", "sft")
    problems: list[tuple[str, str]] = []
    if stage != "cpt" and "batch_tokens" in settings:
        problems.append(
            ("batch_tokens", "batch_tokens has no effect without stage: cpt; set batch_size")
        )
    if stage in ("cpt", "pt"):
        unused = {
            key: reason
            for key, reason in UNUSED_CPT_KEYS.items()
            if settings.get(key, False) not in (False, "drop")
        }
        problems += [
            (key, f"{key} has no effect with stage: cpt, {reason}")
            for key, reason in unused.items()
        ]
    if stage != "sft" and "ban" in _collect_modes(settings):
        problems.append(
            ("never", f"never: mode ban has no effect with stage: {stage}; use mode: filter")
        )
    if stage != "preference" and "pair" in _collect_modes(settings):
        problems.append(
            ("never", f"never: mode pair has no effect with stage: {stage}; use stage: preference")
        )
    if stage != "preference":
        return problems + [("loss", "loss has no effect without stage: preference")] * _is_set(
            settings.get("loss")
        )
    return problems + _find_loss_contradictions(settings)


def _find_loss_contradictions(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    loss = _to_mapping(settings.get("loss"))
    name = loss.get("name", "auto")
    if loss.get("gamma", "auto") != "auto" and name != "simpo":
        hint = "" if name != "auto" else ": add name: simpo"
        message = f"loss: gamma has no effect with {'dpo' if name == 'auto' else name}, it is SimPO's{hint}"
        problems.append(("loss", message))
    if "rehearsal" in settings:
        problems.append(
            ("rehearsal", "rehearsal has no effect with stage: preference, which compares answers")
        )
    return problems


def _find_task_contradictions(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of tasks that cannot be. Files without one have none, unless another file has, or they
    are mixed."""
    tasks = {
        key: [_parse_task(item) for item in as_list(settings[key])]
        for key in SOURCE_KEYS
        if key in settings
    }
    named_keys = [key for key, members in tasks.items() if any(is_named for is_named, _ in members)]
    problems: list[tuple[str, str]] = []
    if named_keys and settings.get("stage") in ("cpt", "pt"):
        problems.append(
            (
                named_keys[0],
                f"{named_keys[0]}: name and prompts have no effect with stage: cpt, whose texts are no tasks",
            )
        )
    for key, members in tasks.items() if named_keys or "mixture" in settings else ():
        duplicates = [
            name
            for name, count in Counter(task for _, task in members).items()
            if name and count > 1
        ]
        problems += [
            (key, f"{key} has the task '{name}' twice: give each source another name")
            for name in duplicates
        ]
        if "rehearsal" in settings and "rehearsal" in {task for _, task in members}:
            problems.append(
                (
                    key,
                    f"{key}: the name 'rehearsal' is that of the rehearsal rows: take another one",
                )
            )
    return problems


def _parse_task(item: Any) -> tuple[bool, str]:
    """(whether a source says that it is a task, what that is called), as written or as
    validated."""
    if isinstance(item, DataSource):
        return bool(item.name or item.prompts), item.task
    source = cast("Json", item) if isinstance(item, dict) else {"path": item}
    name, path = (
        value if isinstance(value, (str, Path)) else ""
        for value in (source.get("name"), source.get("path"))
    )
    return bool(name or source.get("prompts")), str(name) or make_task_name(Path(path))


def select_sources(recipe: Recipe, key: str) -> tuple[DataSource, ...]:
    """The files of a role, by its key. If any file of the recipe has a name or prompts, or tasks
    are mixed, all are tasks; a held-out file is asked as the training rows of its task are, unless
    it has prompts of its own."""
    sources: tuple[DataSource, ...] = getattr(recipe, key)
    has_tasks = any(
        source.name or source.prompts for role in SOURCE_KEYS for source in getattr(recipe, role)
    )
    if not has_tasks and recipe.mixture is None:
        return sources
    prompts_by_task = {source.task: source.prompts for source in recipe.data}
    return tuple(
        source.model_copy(
            update={
                "name": source.task,
                "prompts": source.prompts or prompts_by_task.get(source.task, ()),
            }
        )
        for source in sources
    )


def _collect_modes(settings: Mapping[str, Any]) -> set[Any]:
    """Of the constraints, as written or as validated."""
    return {_to_mapping(item).get("mode") for item in as_list(settings.get("never", ()))}


def _is_set(value: Any) -> bool:
    """Something is wished for, as written or as validated."""
    fields = _to_mapping(value)
    return any(setting != "auto" for setting in fields.values()) if fields else value is not None


def _to_mapping(value: Any) -> Json:
    """The keys of a mapping, as written or as validated; none of anything else."""
    if isinstance(value, (Constraint, GuardConfig, PairLoss, RehearsalConfig)):
        return vars(value)
    return cast("Json", value) if isinstance(value, dict) else {}


def _collect_paths(value: Any) -> set[str]:
    paths: set[str] = set()
    if isinstance(value, RehearsalConfig):
        value = value.data
    elif isinstance(value, dict) and "data" in value:
        value = cast("Json", value)["data"]
    for item in as_list(value):
        path = item.path if isinstance(item, DataSource) else item
        if isinstance(item, dict):
            path = cast("Json", item).get("path")
        if isinstance(path, (str, Path)):
            paths.add(os.path.normpath(path))
    return paths


def build_recipe_schema() -> Json:
    """JSON schema (draft 2020-12) of a recipe file, aliases included, for editors and other
    programs."""
    schema = Recipe.model_json_schema(by_alias=True)
    properties: Json = schema["properties"]
    for key in KEYS.values():
        properties[key].pop("title", None)
    for alias, key in ALIASES.items():
        properties[alias] = {
            **properties[key],
            "description": f"Same as {key}.",
            "deprecated": True,
        }
    properties["stage"] = _allow_stage_list(properties["stage"])
    spellings = [
        [key, *(alias for alias, target in ALIASES.items() if target == key)]
        for key in schema.pop("required")
    ]
    staged_schema: Json = {
        "properties": {"stage": {"type": "array"}},
        "required": ["stage"],
    }  # data may be each stage's own
    required = [[{"required": [name]} for name in names] for names in spellings]
    schema["allOf"] = [
        {
            "anyOf": [*alternatives, staged_schema]
            if {"required": ["data"]} in alternatives
            else alternatives
        }
        for alternatives in required
    ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_stage_list(schema: Json) -> Json:
    """A stage, or a list of stages, each a name or a mapping from the name to the keys of its
    own."""
    stage_schema = {key: value for key, value in schema.items() if key in ("enum", "type")}
    stage_mapping = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "propertyNames": stage_schema,
    }
    stage_list: Json = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [stage_schema, stage_mapping]},
    }
    rest = {key: value for key, value in schema.items() if key not in stage_schema}
    return {"anyOf": [stage_schema, stage_list | {"description": "a list of stages"}], **rest}
