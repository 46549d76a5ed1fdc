"""The recipe: what the user asked for, under the names of Hugging Face's libraries.

In: plain values, from a file and flags (load.py) or keyword arguments. Out: a frozen `Recipe`, and
its JSON schema for editors. A key exists only if it changes what a run does. Left out: deciding the
values that are "auto" (plan/), and looking at the machine, the model or the data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tunesmith.core.hub_names import format_path
from tunesmith.core.types import Json
from tunesmith.recipe.demo import GENERAL_TEXTS
from tunesmith.recipe.fields import (
    BUILT_IN,
    NO_DATA,
    Attention,
    Auto,
    Constraints,
    Count,
    DataSource,
    FilePath,
    GeneralTexts,
    GradientCheckpointing,
    GuardConfig,
    GuardField,
    Metrics,
    MixtureConfig,
    ModuleNames,
    Name,
    NewTokens,
    NotNegative,
    Optimizer,
    Positive,
    RecipeMapping,
    Regex,
    RehearsalConfig,
    Share,
    Sources,
    Stage,
    Template,
    TemplateValue,
    reject_bool,
    setting,
)
from tunesmith.recipe.metric_limits import GateLimits
from tunesmith.recipe.objectives import (
    PairLoss,
    PairLossField,
    Problem,
    Problems,
    ScheduleName,
    SchedulerKwargs,
    SchedulerKwargsField,
    TrainOn,
    find_loss_contradictions,
    find_objective_contradictions,
)
from tunesmith.recipe.sweep import Scalar, SweepConfig, ValueRange


def _parse_swept_values(sweep: SweepConfig | None) -> SweepConfig | None:
    """Return a sweep with its values as their keys read them: "1e-3", a text in YAML, is 0.001."""
    if sweep is None:
        return None
    parsed = {
        key: values if isinstance(values, ValueRange) else _parse_swept_list(key, values)
        for key, values in sweep.space.items()
    }
    return sweep.model_copy(update=parsed)


def _parse_swept_list(key: str, values: Sequence[Scalar]) -> tuple[Scalar, ...]:
    parsed: list[Scalar] = []
    for value in values:
        item = validate_keys({key: value}).get(key)
        item = item if isinstance(item, Scalar) else value  # lists stay the text that names them
        if item in parsed:
            raise ValueError(f"{key}: {item} is repeated")
        parsed.append(item)
    return tuple(parsed)


class Recipe(RecipeMapping):
    """One fine-tuning run. Only `model` and `data` are required."""

    model: Name = Field(description="Base model: a hub id, folder, GGUF file or built-in name.")
    method: Auto | Literal["lora", "qlora", "full"] = setting(
        "auto", "lora, qlora (4-bit base) or full."
    )
    adapter_from: FilePath | None = setting(
        None, "Continue training this adapter: a PEFT folder or a run."
    )
    stage: Stage = setting("sft", "sft: answers; cpt: plain text; preference: pairs.")

    data: Sources = Field(
        min_length=1,
        description="Training rows: a path, hf://org/name, or a list of {path, format, ...}.",
    )
    eval_data: Sources = setting((), "Held-out rows that select checkpoints and settings.")
    eval_split: Annotated[float, Field(gt=0, lt=1), BeforeValidator(reject_bool)] | None = setting(
        None, "Instead of eval_data: fraction of data held out by hash, groups whole."
    )
    test_data: Sources = setting(
        (), "Rows for the final evaluation; default: half of the held-out rows."
    )
    retention_data: GeneralTexts = setting(
        BUILT_IN, "General text; its bits per byte measure forgetting."
    )
    rehearsal: RehearsalConfig | None = setting(
        None, "General rows against forgetting: {data, ratio, shift}."
    )
    mixture: MixtureConfig | None = setting(
        None, "Proportions of the tasks of data: {temperature, limit}."
    )
    never: Constraints = setting(
        (), "Forbidden in answers: patterns, checkers or {match, mode, ...}."
    )
    max_examples: Count | None = setting(None, "Train on the first rows only, at most this many.")
    skip_invalid: bool = setting(False, "Skip invalid rows instead of stopping; all are counted.")
    chat_template: Auto | Literal["none"] | Template = setting(
        "auto", "auto: the model's own; none: plain text; or a .jinja file."
    )
    chat_template_kwargs: dict[Name, TemplateValue] = setting(
        {}, "Template variables: {enable_thinking: false}."
    )
    add_tokens: NewTokens = setting((), "New tokens; their embedding and head rows are trained.")
    response_schema: FilePath | None = setting(None, "JSON schema of a correct answer.")
    group: Auto | Literal["none"] | Name = setting(
        "auto", "Row key whose rows are not independent: package, author; auto: by ids."
    )

    train_on: TrainOn = setting(
        "answers", "Trained text: answers, all, or the messages of these roles."
    )
    max_length: Auto | Count = setting("auto", "Maximum document length in tokens.")
    on_overlong: Literal["drop", "truncate", "refuse"] = setting(
        "drop", "What to do with longer documents: drop, truncate or refuse."
    )
    pack_length: Auto | Count = setting("auto", "Tokens per pack; changes speed, not results.")
    share_prefixes: Auto | bool = setting(
        "auto", "Compute shared prefixes once; changes speed, not results."
    )
    batch_size: Auto | Count = setting("auto", "Data rows per optimizer step.")
    batch_tokens: Auto | Count = setting("auto", "Tokens per optimizer step, with stage: cpt.")
    num_train_epochs: Auto | Annotated[Positive, Field(le=1_000_000)] = setting(
        "auto", "Passes over the data."
    )
    max_steps: Count | None = setting(None, "Optimizer steps; overrides num_train_epochs.")

    learning_rate: Auto | Annotated[float, Field(gt=0, le=1), BeforeValidator(reject_bool)] = (
        setting("auto", "Peak learning rate.")
    )
    lr_scheduler_type: Auto | ScheduleName = setting(
        "auto", "Shape of the learning rate after warm-up."
    )
    lr_scheduler_kwargs: SchedulerKwargsField = setting(
        SchedulerKwargs(), "Arguments of inverse_sqrt and warmup_stable_decay."
    )
    warmup_ratio: Auto | Share = setting("auto", "Fraction of steps in warm-up.")
    optim: Auto | Optimizer = setting("auto", "AdamW, with moments in fp32 or in 8 bits.")
    weight_decay: Auto | Share = setting("auto", "AdamW weight decay; applied to matrices only.")
    max_grad_norm: Auto | NotNegative = setting("auto", "Gradient clipping; 0 turns it off.")

    loss: PairLossField = setting(
        PairLoss(), "Preference loss: dpo, orpo, simpo, kto, or {name, beta, gamma, ...}."
    )
    label_smoothing: Share = setting(
        0.0, "Share of each label that goes to all tokens, or to the rejected."
    )
    neftune_noise_alpha: NotNegative | None = setting(
        None, "NEFTune: uniform noise on embeddings during training."
    )

    lora_r: Auto | Count = setting("auto", "LoRA rank.")
    lora_alpha: Auto | Positive = setting(
        "auto", "LoRA scale is alpha / rank, or alpha / sqrt(rank) in rsLoRA."
    )
    lora_dropout: Auto | Share = setting("auto", "Dropout on the inputs of the adapter.")
    lora_target_modules: (
        Auto
        | Literal["all-linear", "attention", "mlp", "recurrent", "experts"]
        | Regex
        | Annotated[tuple[Name, ...], Field(min_length=1)]
    ) = setting("auto", "Layers with an adapter; names such as q_proj.")
    use_rslora: Auto | bool = setting("auto", "Scale by alpha / sqrt(rank), for high ranks.")
    use_dora: Auto | bool = setting("auto", "DoRA: also train the magnitude of each weight row.")
    modules_to_save: Auto | ModuleNames = setting(
        "auto", "Modules trained in full with the adapter: embed_tokens, lm_head, norm."
    )

    dtype: Auto | Literal["bf16", "fp16", "fp32"] = setting(
        "auto", "Number format of frozen weights and matrix products."
    )
    attention: Auto | Attention = setting(
        "auto", "Attention backend; auto picks the fastest verified one."
    )
    gradient_checkpointing: Auto | GradientCheckpointing = setting(
        "auto", "Activations recomputed in backward: none, selective or full; true is full."
    )
    deterministic: Auto | bool = setting(
        "auto", "Use deterministic algorithms: reruns are bitwise equal."
    )
    context_parallel_size: Auto | Count = setting(
        "auto", "Ranks that split each document (context parallelism)."
    )
    dp_shard_size: Auto | Count = setting(
        "auto", "Ranks that shard one copy of the weights (as FSDP)."
    )
    metrics: Auto | Metrics = setting(
        "auto", "Metrics of the before/after; see docs/reference/metrics.md."
    )
    gates: GateLimits = setting({}, 'Limits for release, by metric: {exact_match: ">= 0.8"}.')
    guard: GuardField = setting(
        GuardConfig(), "Reaction to collapse: {collapse, forgetting, ...}, or off."
    )
    save_steps: Auto | Count = setting("auto", "Steps between checkpoints.")
    eval_steps: Auto | Count = setting("auto", "Steps between evaluations.")
    sweep: Annotated[SweepConfig | None, AfterValidator(_parse_swept_values)] = setting(
        None, "Values to try with `tunesmith tune sweep`: {key: [values], ...}."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(reject_bool)] = setting(
        0, "Seed of row order, adapter initialization and sampling."
    )
    output_dir: Auto | FilePath = setting("auto", "Run folder; must be new or empty.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        settings = {key: getattr(self, key) for key in self.model_fields_set}
        if problems := [message for _, message in find_contradictions(settings)]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def has_no_test(self) -> bool:
        """Whether nothing is held out for a final result: before and after are of eval_data."""
        return self.test_data == (DataSource(path=Path(NO_DATA)),)

    @property
    def general_texts(self) -> Path | None:
        """The file of retention_data; None if forgetting is not measured."""
        if self.retention_data == NO_DATA:
            return None
        return GENERAL_TEXTS if self.retention_data == BUILT_IN else Path(self.retention_data)


@dataclass(frozen=True)
class Stages:
    """Recipes that are trained one after another in one run folder."""

    recipes: tuple[Recipe, ...]


KEYS = tuple(Recipe.model_fields)
RUN_LEVEL_KEYS = ("model", "adapter_from", "stage", "output_dir")  # the same for all stages
SOURCE_KEYS = ("data", "eval_data", "test_data")
FILE_KEYS = (*SOURCE_KEYS, "retention_data")

# Other names of keys and values, and what to do instead of those that a recipe does not have.
NAMES: Json = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
ALIASES: dict[str, str] = {
    alias: key for key, aliases in NAMES["aliases"].items() for alias in aliases.split()
}
UNUSED_FULL_KEYS = ("use_rslora", "use_dora", "modules_to_save", "adapter_from")
UNUSED_CPT_KEYS = {
    "batch_size": "set batch_tokens",
    "on_overlong": "long texts are cut into windows",
    "metrics": "bits per byte is measured",
    "response_schema": "no answers are trained",
    "mixture": "texts are not tasks",
    "share_prefixes": "windows share no prefixes",
}


# ---------------------------------------------------------------- contradictions


def validate_keys(values: Mapping[str, Any]) -> Json:
    """Return the validated values of the keys whose value is valid, contradictions aside."""
    valid: Json = {}
    for key, value in values.items():
        try:
            valid[key] = _make_key_validator(key).validate_python(value)
        except ValidationError:
            continue
    return valid


@cache
def _make_key_validator(key: str) -> TypeAdapter[Any]:
    field = Recipe.model_fields[key]
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    return TypeAdapter(annotation)


def find_contradictions(values: Mapping[str, Any], invalid_keys: Sequence[str] = ()) -> Problems:
    """Return (key, message) for keys that contradict each other.

    Takes validated values, with absolute paths, and the keys whose value is invalid: a rule may
    depend on the presence of these."""
    settings = {key: value for key, value in values.items() if value not in (None, "auto", (), [])}
    return [
        *_find_plain_contradictions(settings, (*settings, *invalid_keys)),
        *find_objective_contradictions(settings),
        *_find_stage_contradictions(settings),
        *_find_task_contradictions(settings),
        *_find_shared_files(settings),
        *_find_sweep_problems(settings),
    ]


def _find_plain_contradictions(
    settings: Mapping[str, Any], keys: Sequence[str]
) -> Iterator[Problem]:
    if "eval_data" in keys and "eval_split" in keys:
        yield "eval_split", "eval_data and eval_split contradict each other: keep one"
    if settings.get("method") == "full":
        for key in keys:
            if key.startswith("lora_") or key in UNUSED_FULL_KEYS:
                yield key, f"{key} has no effect with method: full, which trains no adapter"
    modules: tuple[str, ...] = settings.get("modules_to_save", ())
    is_embedding = any(matrix.endswith(modules) for matrix in ("embed_tokens", "lm_head"))
    if settings.get("add_tokens") and is_embedding:
        message = (
            "modules_to_save: embed_tokens and lm_head contradict add_tokens, which trains and "
            "saves the rows of the new tokens; leave them out"
        )
        yield "modules_to_save", message
    if settings.get("chat_template") == "none" and settings.get("chat_template_kwargs"):
        message = "chat_template_kwargs has no effect with chat_template: none"
        yield "chat_template_kwargs", message
    if settings.get("share_prefixes") is True and settings.get("lora_dropout"):
        message = "share_prefixes contradicts lora_dropout, which is drawn per document"
        yield "share_prefixes", message
    rehearsal: RehearsalConfig | None = settings.get("rehearsal")
    is_adaptive = rehearsal is not None and rehearsal.ratio == "adaptive"
    if is_adaptive and settings.get("retention_data") == NO_DATA:
        yield "rehearsal", "rehearsal: ratio: adaptive needs retention_data, which it follows"
    max_length = settings.get("max_length")
    pack_length = settings.get("pack_length")
    if max_length and pack_length and max_length > pack_length:
        message = f"pack_length {pack_length} is below max_length {max_length}"
        yield "pack_length", f"{message}: a document must fit in a pack"


def _find_stage_contradictions(settings: Mapping[str, Any]) -> Iterator[Problem]:
    stage = settings.get("stage", "sft")
    if stage != "cpt" and "batch_tokens" in settings:
        message = "batch_tokens has no effect without stage: cpt; set batch_size"
        yield "batch_tokens", message
    if stage == "cpt":
        for key, reason in UNUSED_CPT_KEYS.items():
            if settings.get(key, False) not in (False, "drop"):
                yield key, f"{key} has no effect with stage: cpt; {reason}"
    modes = {constraint.mode for constraint in settings.get("never", ())}
    if stage != "sft" and "ban" in modes:
        message = f"never: mode ban has no effect with stage: {stage}; use mode: filter"
        yield "never", message
    if stage != "preference" and "pair" in modes:
        message = f"never: mode pair has no effect with stage: {stage}; use stage: preference"
        yield "never", message
    if stage == "preference":
        yield from find_loss_contradictions(settings)
        if "rehearsal" in settings:
            message = "rehearsal has no effect with stage: preference, which trains on pairs"
            yield "rehearsal", message
    elif settings.get("loss", PairLoss()) != PairLoss():
        yield "loss", "loss has no effect without stage: preference"


def _find_task_contradictions(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Check task names. Sources have tasks if any source is named, or if tasks are mixed."""
    tasks: dict[str, list[str]] = {}
    named_keys: list[str] = []
    for key in SOURCE_KEYS:
        sources: tuple[DataSource, ...] = settings.get(key, ())
        tasks[key] = [source.task for source in sources]
        if any(source.name or source.prompts for source in sources):
            named_keys.append(key)
    if named_keys and settings.get("stage") == "cpt":
        message = f"{named_keys[0]}: name and prompts have no effect with stage: cpt"
        yield named_keys[0], message
    if not named_keys and "mixture" not in settings:
        return
    for key, names in tasks.items():
        for name, count in Counter(names).items():
            if name and count > 1:
                yield key, f"{key} has the task '{name}' twice: rename one source"
        if "rehearsal" in settings and "rehearsal" in names:
            message = f"{key}: the name 'rehearsal' is reserved for rehearsal rows: use another"
            yield key, message


def _find_sweep_problems(settings: Mapping[str, Any]) -> Problems:
    """Check each swept value as a value of its key, alone beside the other keys."""
    sweep: SweepConfig | None = settings.get("sweep")
    if sweep is None:
        return []
    others = {key: value for key, value in settings.items() if key != "sweep"}
    fixed_problems = find_contradictions(others)
    messages: dict[str, None] = {}  # ordered, without duplicates
    for key, values in sweep.space.items():
        bounds = (values.min, values.max) if isinstance(values, ValueRange) else values
        for value in bounds:
            valid = validate_keys({key: value})
            if key not in valid or valid[key] == "auto":
                messages[f"{key}: {value!r} is not a value of {key}"] = None
                continue
            for problem in find_contradictions(others | valid):
                if problem not in fixed_problems:
                    messages[problem[1]] = None
    return [("sweep", f"sweep: {message}") for message in messages]


def _find_shared_files(settings: Mapping[str, Any]) -> Iterator[Problem]:
    paths_by_key: dict[str, set[str]] = {}
    for key in (*FILE_KEYS, "rehearsal"):
        paths = _collect_paths(settings.get(key, BUILT_IN if key == "retention_data" else ()))
        for earlier_key, earlier_paths in paths_by_key.items():
            if shared_paths := paths & earlier_paths:
                message = f"{key} and {earlier_key} name the same file, {min(shared_paths)}"
                setting = key if key in settings else earlier_key
                yield setting, f"{message}: a score on it shows nothing"
        paths_by_key[key] = paths


def _collect_paths(value: RehearsalConfig | tuple[DataSource, ...] | Path | str) -> set[str]:
    """Return the files of a key. Those of the hub are known once a plan has named them."""
    sources = value.data if isinstance(value, RehearsalConfig) else value
    if isinstance(sources, str):
        sources = GENERAL_TEXTS if sources == BUILT_IN else ()
    if isinstance(sources, Path):
        return {os.path.normpath(sources)}
    paths: set[str] = set()
    for source in sources:
        if not source.is_on_hub or source.data_files:
            paths |= {format_path(Path(os.path.normpath(file))) for file in source.files}
    return paths


# ---------------------------------------------------------------- sources


def select_sources(recipe: Recipe, key: str) -> tuple[DataSource, ...]:
    """Return the sources of a data role, with task names and prompts filled in.

    If any source has a name or prompts, or tasks are mixed, every source is a task; a held-out
    source without prompts takes those of the training source of its task."""
    sources: tuple[DataSource, ...] = getattr(recipe, key)
    all_sources = [source for role in SOURCE_KEYS for source in getattr(recipe, role)]
    has_tasks = any(source.name or source.prompts for source in all_sources)
    if not has_tasks and recipe.mixture is None:
        return sources
    prompts_by_task = {source.task: source.prompts for source in recipe.data}
    named_sources: list[DataSource] = []
    for source in sources:
        prompts = source.prompts or prompts_by_task.get(source.task, ())
        named_sources.append(source.model_copy(update={"name": source.task, "prompts": prompts}))
    return tuple(named_sources)


# ---------------------------------------------------------------- JSON schema


def build_recipe_schema() -> Json:
    """Build the JSON schema (draft 2020-12) of a recipe file, aliases included."""
    schema = Recipe.model_json_schema()
    properties: Json = schema["properties"]
    for key in KEYS:
        properties[key].pop("title", None)
    for alias, key in ALIASES.items():
        description = f"Same as {key}."
        properties[alias] = {**properties[key], "description": description, "deprecated": True}
    properties["stage"] = _allow_stage_list(properties["stage"])
    # With a list of stages, `data` may be set per stage.
    staged_schema: Json = {"properties": {"stage": {"type": "array"}}, "required": ["stage"]}
    conditions: list[Json] = []
    for key in schema.pop("required"):
        names = [key, *(alias for alias, target in ALIASES.items() if target == key)]
        alternatives: list[Json] = [{"required": [name]} for name in names]
        if key == "data":
            alternatives.append(staged_schema)
        conditions.append({"anyOf": alternatives})
    schema["allOf"] = conditions
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_stage_list(schema: Json) -> Json:
    """Allow a list of stages, each a name or a mapping from the name to its keys."""
    stage_schema = {key: value for key, value in schema.items() if key in ("enum", "type")}
    rest = {key: value for key, value in schema.items() if key not in stage_schema}
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
        "description": "a list of stages",
    }
    return {"anyOf": [stage_schema, stage_list], **rest}
