"""Value types of the recipe's keys, and the mappings inside a recipe.

In: a value as YAML holds it. Out: a validated value; former names and other tools' names of a
value are accepted. Left out: the keys themselves, and which of them contradict each other
(schema.py)."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tunesmith.core.formatting import suggest_name
from tunesmith.core.hub_names import format_path, is_hub_path, split_hub_path
from tunesmith.core.types import Json
from tunesmith.recipe.checkers import CHECKERS, Spans

MIN_NAME_SIMILARITY = 0.8  # a word this close to a checker's name is taken for it
MAX_TOKEN_CHARS = 200
MAX_PATTERN_CHARS = 10_000
SELF_CALL = re.compile(r"\(\?(?:R|[+-]?\d+|&\w+|P>\w+)\)")
SELF_GENERATED = "self-generated"  # in place of a path: rehearsal rows that the model writes
NO_DATA = "none"  # in place of a path: nothing is measured
BUILT_IN = "built-in"  # in place of a path: the general texts that ship
MATCHER_KEYS = ("match", "text", "check")
FORMER_METRICS = {"normalised_match": "normalized_match"}
HUB_SOURCE_KEYS = ("revision", "config", "split", "data_files")

# Errors of this type are reported as "expected ..., found ..."; a ValueError is reported as it is.
UNEXPECTED_VALUE = "unexpected_value"


class RecipeMapping(BaseModel):
    """A mapping inside of a recipe, or the recipe: frozen, and without other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def setting(default: Any, description: str) -> Any:
    """Declare a key with its default."""
    return Field(default=default, description=description)


# ---------------------------------------------------------------- normalizing values


def wrap_list(value: Any) -> Iterable[Any]:
    """Return a list or tuple as it is, anything else as a list of one item."""
    return cast("Iterable[Any]", value) if isinstance(value, (list, tuple)) else [value]


def accept_names(names: Mapping[Any, str]) -> BeforeValidator:
    """Make a validator that replaces other names of a value by ours."""

    def replace_name(value: Any) -> Any:
        return names.get(value, value) if isinstance(value, (str, bool)) else value

    return BeforeValidator(replace_name)


def reject_bool(value: Any) -> Any:
    """Refuse booleans as numbers: YAML reads on, yes, off and no as true and false."""
    if isinstance(value, bool):
        raise PydanticCustomError(UNEXPECTED_VALUE, "true and false are not numbers")
    return value


def _check_path(value: Any) -> Any:
    if value == "" or "\0" in str(value):
        raise PydanticCustomError(UNEXPECTED_VALUE, "not a path")
    return value


def accept_texts(key: str) -> Callable[[Any], Any]:
    """Make a parser of a list of mappings, in which a text is the value of one key."""

    def wrap_texts(value: Any) -> Any:
        items = wrap_list(() if value is None else value)
        return [{key: item} if isinstance(item, (str, Path)) else item for item in items]

    return wrap_texts


def _parse_rehearsal_sources(value: Any) -> Any:
    return SELF_GENERATED if is_self_generated(value) else value


def is_self_generated(value: Any) -> bool:
    """Return whether rehearsal data, as written, is generated; `self` is the former name."""
    (first, *others) = wrap_list(value) or [None]
    if isinstance(first, dict):
        source = cast("Json", first)
        # a stored recipe has all keys, those that were not given with their defaults
        defaults = DataSource(path=Path(SELF_GENERATED)).model_dump(mode="json")
        has_more = any(
            key not in defaults or defaults[key] != (list(value) if value == () else value)
            for key, value in source.items()
            if key != "path"
        )
        path = None if has_more else source.get("path")
    else:
        path = first
    return not others and path in ("self", SELF_GENERATED)


def _parse_metrics(value: Any) -> Any:
    return value if value == "auto" else [_parse_metric(item) for item in wrap_list(value)]


def _parse_metric(item: Any) -> Any:
    """Write `{numeric: 0.01}` as the text `numeric: 0.01`."""
    if isinstance(item, dict) and len(cast("Json", item)) == 1:
        ((name, argument),) = cast("Json", item).items()
        if type(argument) in (str, int, float):
            return f"{name}: {argument}"
    return FORMER_METRICS.get(item, item) if isinstance(item, str) else cast("Any", item)


def _parse_constraints(value: Any) -> Any:
    items = wrap_list(() if value is None else value)
    return [{_guess_matcher_key(item): item} if isinstance(item, str) else item for item in items]


def _guess_matcher_key(text: str) -> str:
    """Take a text for a pattern, unless it is a checker's name or close to one."""
    is_name = re.fullmatch(r"[a-z-]+", text)
    if is_name and difflib.get_close_matches(text, CHECKERS, 1, MIN_NAME_SIMILARITY):
        return "check"
    return "match"


def split_tokens(value: Any) -> Any:
    """Split a comma-separated text, as LLaMA-Factory writes it."""
    if value is None:
        return ()
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _parse_guard(value: Any) -> Any:
    if value in (False, "false", "off"):
        return {"collapse": "off", "forgetting": "off"}
    return {} if value == "auto" else value


# ---------------------------------------------------------------- checking values


def _check_template(path: Path) -> Path:
    if path.suffix != ".jinja":
        raise ValueError("not a .jinja file")
    return path


def _check_regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[\w .-]*", name):
        raise ValueError("a name has letters, digits, spaces, dots and dashes")
    return name


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Return a compiled pattern. Raises ValueError unless it is one that ends: a pattern that calls
    itself fills the memory."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"a pattern of more than {MAX_PATTERN_CHARS:,} characters")
    if SELF_CALL.search(pattern):
        raise ValueError("patterns that call themselves, as (?R) or (?1), are not supported")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None


def _check_pattern(pattern: str) -> str:
    if pattern and compile_pattern(pattern).search("", timeout=1):
        raise ValueError("the pattern matches an empty answer, so it matches every answer")
    return pattern


def _check_checker(name: str) -> str:
    if not name or name in CHECKERS:
        return name
    checker_name = name.lower().replace(" ", "-")
    hint = suggest_name(checker_name, CHECKERS, default=f"use {', '.join(CHECKERS)}.", quote="'")
    raise ValueError(f"unknown checker '{name}'; {hint} A pattern is written {{match: '{name}'}}")


def _check_token(text: str) -> str:
    if not 0 < len(text) <= MAX_TOKEN_CHARS:
        message = f"a token has 1 to {MAX_TOKEN_CHARS} characters, {text[:20]!r} has {len(text):,}"
        raise ValueError(message)
    if any(letter.isspace() for letter in text):
        raise ValueError(f"{text!r} contains white space, which templates trim; remove it")
    if not text.isprintable():
        raise ValueError(f"{text!r} contains an unprintable character")
    return text


def _check_distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise ValueError(f"{text!r} is repeated")
    return texts


def parse_prompt(prompt: str) -> list[tuple[str, str | None]]:
    """Split a prompt template into (text, name of the column after it, or None at the end).

    Raises ValueError for a placeholder that is not {column}."""
    pieces: list[tuple[str, str | None]] = []
    for text, column, spec, conversion in string.Formatter().parse(prompt):
        if column == "" or spec or conversion:
            raise ValueError("a placeholder is {column}; double other braces: {{ and }}")
        pieces.append((text, column))
    return pieces


def _check_prompt(prompt: str) -> str:
    try:
        columns = [column for _, column in parse_prompt(prompt) if column is not None]
    except ValueError as error:
        raise ValueError(f"{prompt!r:.80}: {error}") from None
    if not columns:
        raise ValueError(f"{prompt!r:.80} has no {{column}}: every row would get the same prompt")
    if "completion" in columns:
        raise ValueError(f"{prompt!r:.80} has a placeholder {{completion}}, which is the answer")
    return prompt


def parse_custom_metric(metric: str) -> tuple[Path, str] | None:
    """Return (file, function) of a custom metric, `my_metrics.py:score`; None for others."""
    match = re.fullmatch(r"(.+\.py):(\w+)", metric)
    return (Path(match[1]), match[2]) if match and ": " not in metric else None


# ---------------------------------------------------------------- types of plain values

Auto = Literal["auto"]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1), BeforeValidator(reject_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(reject_bool)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(reject_bool)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)]
FilePath = Annotated[Path, BeforeValidator(_check_path)]
GeneralTexts = Annotated[
    Literal["built-in", "none"] | FilePath,
    BeforeValidator(lambda value: NO_DATA if value in (None, [], ()) else value),
]
SourcePath = Annotated[
    Path,
    BeforeValidator(_check_path),
    PlainSerializer(format_path, return_type=str, when_used="json"),
]
Template = Annotated[
    Path,
    AfterValidator(_check_template),
    WithJsonSchema({"type": "string", "description": "the path of a .jinja file"}),
]
TemplateValue = str | bool | int | float | None | list[str]
Regex = Annotated[
    Name,
    AfterValidator(_check_regex),
    WithJsonSchema({"type": "string", "description": "a regular expression for full paths"}),
]
Stage = Annotated[Literal["sft", "cpt", "preference"], accept_names({"pt": "cpt"})]
Optimizer = Annotated[
    Literal["adamw", "adamw_8bit"],
    accept_names(
        dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
        | dict.fromkeys(
            ("paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_bnb_8bit"), "adamw_8bit"
        )
    ),
]
Attention = Annotated[
    Literal["cpu_kernel", "sdpa", "varlen", "dense_mask", "reference"],
    accept_names({"kernel": "cpu_kernel", "documents": "sdpa", "mask": "dense_mask"}),
]
GradientCheckpointing = Annotated[
    Literal["none", "selective", "full"],
    accept_names(
        dict.fromkeys((True, "true", "recompute"), "full")
        | dict.fromkeys((False, "false", "keep"), "none")
    ),
]
METRIC_ITEM_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": ["string", "number"]},
        },
    ]
}
Metrics = Annotated[
    tuple[Name, ...],
    Field(min_length=1),
    BeforeValidator(_parse_metrics),
    WithJsonSchema(
        {
            "type": "array",
            "description": "a list of names, or of {name: value}",
            "minItems": 1,
            "items": METRIC_ITEM_SCHEMA,
        }
    ),
]
SplitTokens = BeforeValidator(split_tokens, json_schema_input_type=str | list[str])
ModuleNames = Annotated[tuple[Name, ...], AfterValidator(_check_distinct), SplitTokens]
NewTokens = Annotated[
    tuple[Annotated[str, AfterValidator(_check_token)], ...],
    AfterValidator(_check_distinct),
    SplitTokens,
]


# ---------------------------------------------------------------- data sources


class PromptForm(RecipeMapping):
    """One way to ask for the completion of a row."""

    prompt: Annotated[str, AfterValidator(_check_prompt)] = Field(
        description="The question, with {column} for a row's value; {{ and }} are braces."
    )
    shots: Annotated[int, Field(ge=0, le=32), BeforeValidator(reject_bool)] = setting(
        0, "Number of other training rows shown first as examples."
    )


def make_task_name(path: Path) -> str:
    """Return the default name of a task: its file name without suffixes."""
    return path.name.partition(".")[0]


class DataSource(RecipeMapping):
    """One data file of the recipe, or one data set of the hub."""

    path: SourcePath = Field(
        description="The file, a folder of .txt and .md files, or hf://org/name of the hub."
    )
    format: Literal[
        "auto",
        "messages",
        "completion",
        "preference",
        "sharegpt",
        "alpaca",
        "text",
    ] = setting("auto", "Format of its rows; auto detects it.")
    columns: dict[str, str] = Field(
        default_factory=dict[str, str],
        description="Columns by role: {prompt: question, completion: answer}.",
    )
    weight: Annotated[float, Field(gt=0, le=1000), BeforeValidator(reject_bool)] = setting(
        1.0, "Factor on the loss of its rows."
    )
    max_examples: Count | None = setting(None, "Read only this many rows.")
    name: Annotated[str, AfterValidator(_check_name)] = setting(
        "", "Task of its rows; scores and tokens are counted per task."
    )
    prompts: Annotated[
        tuple[PromptForm, ...],
        BeforeValidator(
            accept_texts("prompt"), json_schema_input_type=str | PromptForm | list[str | PromptForm]
        ),
    ] = setting((), "Ways to ask for a row's `completion`; a hash of the row picks one.")
    revision: Name | None = setting(None, "Branch, tag or commit of a data set of the hub.")
    config: Name | None = setting(None, "Config (subset) of it.")
    split: Name | None = setting(
        None, "Split of it; by default train, validation or test by the key."
    )
    data_files: Annotated[tuple[Name, ...], SplitTokens] = setting(
        (), "Files or patterns of it, instead of config and split."
    )

    @model_validator(mode="after")
    def _check_hub_keys(self) -> DataSource:
        hub_keys = [key for key in HUB_SOURCE_KEYS if getattr(self, key)]
        if not self.is_on_hub and hub_keys:
            raise ValueError(
                f"{hub_keys[0]} is for data sets of the hub, but {self.path} is on this machine; "
                "write hf://org/name for the hub"
            )
        if self.is_on_hub and split_hub_path(self.path)[1] and self.revision:
            raise ValueError("the revision is set twice: in path and in revision")
        if self.data_files and (self.split or self.config):
            raise ValueError("data_files names the files: leave config and split out")
        return self

    @property
    def task(self) -> str:
        """The name of the task that its rows belong to."""
        return self.name or make_task_name(Path(self.repo_id) if self.is_on_hub else self.path)

    @property
    def is_on_hub(self) -> bool:
        """Whether the rows are in a data set of the hub."""
        return is_hub_path(self.path)

    @property
    def repo_id(self) -> str:
        """The repository of a data set of the hub."""
        return split_hub_path(self.path)[0]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files to read, of a data set of the hub in its snapshot."""
        return tuple(self.path / name for name in self.data_files) or (self.path,)


Sources = Annotated[
    tuple[DataSource, ...],
    BeforeValidator(
        accept_texts("path"), json_schema_input_type=Path | DataSource | list[Path | DataSource]
    ),
]


class RehearsalConfig(RecipeMapping):
    """General rows mixed into training to reduce forgetting."""

    data: Annotated[Sources, BeforeValidator(_parse_rehearsal_sources)] = Field(
        min_length=1,
        description="General rows, as for data; or self-generated, written by the model.",
    )
    ratio: (
        Auto
        | Literal["adaptive"]
        | Annotated[float, Field(ge=0, le=0.9), BeforeValidator(reject_bool)]
    ) = setting(
        "auto", "Fraction of all tokens; adaptive starts at auto and follows retention_data."
    )
    shift: Literal["style", "domain", "language"] = setting(
        "domain", "How new the data is (language: also code); decides ratio: auto."
    )

    @property
    def is_self_generated(self) -> bool:
        """Whether the model writes the rows itself."""
        return self.data == (DataSource(path=Path(SELF_GENERATED)),)


class MixtureConfig(RecipeMapping):
    """Proportions of the tasks in an epoch."""

    temperature: Positive = setting(1.0, "1 is proportional to rows; higher is more uniform.")
    limit: Count | None = setting(None, "A task counts as having at most this many rows.")


# ---------------------------------------------------------------- constraints


class Constraint(RecipeMapping):
    """A pattern, a text or a checker that no answer may match."""

    match: Annotated[str, AfterValidator(_check_pattern)] = setting(
        "", "Regular expression that no answer may match anywhere."
    )
    text: str = setting("", "Instead of match: a literal text.")
    check: Annotated[str, AfterValidator(_check_checker)] = setting(
        "", f"Instead of match: a checker, {', '.join(CHECKERS)}."
    )
    name: str = setting("", "Name in counts and metrics; else the pattern.")
    mode: Literal["filter", "ban", "pair"] = setting(
        "filter",
        "filter drops violating answers, ban trains away from the match, pair makes "
        "them (or the base model's) the rejected side, with stage: preference.",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_default_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        raw_values = cast("Json", values)
        for key in MATCHER_KEYS:
            if isinstance(raw_values.get(key), str):
                return {"name": raw_values[key], **raw_values}
        return raw_values

    @model_validator(mode="after")
    def _check_single_matcher(self) -> Constraint:
        keys = [key for key in MATCHER_KEYS if getattr(self, key)]
        if len(keys) != 1:
            names = " and ".join(keys) or "none of them"
            raise ValueError(f"set exactly one of {', '.join(MATCHER_KEYS)}, not {names}")
        return self

    @property
    def matcher(self) -> str | Callable[[str], Spans]:
        """The pattern, or the function that returns the violating spans."""
        if self.check:
            return CHECKERS[self.check].matcher
        return self.match or regex.escape(self.text, literal_spaces=True)

    @property
    def instruction(self) -> str:
        """The constraint in words that follow "Never" in a prompt."""
        if self.check:
            return CHECKERS[self.check].instruction
        return f'write "{self.text or self.name}"'


def _check_distinct_names(constraints: tuple[Constraint, ...]) -> tuple[Constraint, ...]:
    names = [constraint.name for constraint in constraints]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two constraints are named '{name}': rename one")
    return constraints


Constraints = Annotated[
    tuple[Constraint, ...],
    BeforeValidator(
        _parse_constraints, json_schema_input_type=str | Constraint | list[str | Constraint]
    ),
    AfterValidator(_check_distinct_names),
]


# ---------------------------------------------------------------- guard

# YAML reads off as false.
GuardAction = (
    Auto
    | Annotated[
        Literal["off", "warn", "rollback", "stop"], accept_names({False: "off", "false": "off"})
    ]
)


class GuardConfig(RecipeMapping):
    """Reactions to collapse and forgetting during training."""

    collapse: GuardAction = setting("auto", "If answers repeat, break or turn into noise.")
    forgetting: GuardAction = setting("auto", "If retention_data loses more than the margin.")
    margin: Auto | Positive = setting("auto", "Allowed loss on retention_data, in bits per byte.")
    patience: Auto | Count = setting("auto", "Evaluations without improvement before stopping.")
    probe_steps: Auto | Annotated[int, Field(ge=0), BeforeValidator(reject_bool)] = setting(
        "auto", "Steps between generation probes; auto: 5% of the time; 0: none."
    )


GuardField = Annotated[
    GuardConfig,
    BeforeValidator(_parse_guard, json_schema_input_type=Literal["auto", "off"] | GuardConfig),
]
