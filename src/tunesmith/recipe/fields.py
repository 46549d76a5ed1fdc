"""What may stand behind a key of the recipe: kinds of values, and the mappings inside it.

Words of other tools that mean the same become ours here. Left out: the keys themselves and what
cannot be together (recipe.py)."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from tunesmith.core.types import Json
from tunesmith.recipe.checkers import CHECKERS, Spans

MIN_NAME_SIMILARITY = 0.8  # of a word to the name of a checker: more, and it is meant as one


MAX_TOKEN_CHARS = 200  # characters of one that a recipe adds


def reject_bool(value: Any) -> Any:
    """YAML reads on, yes, off and no as true and false, and Python counts true as 1."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


def as_list(value: Any) -> Iterable[Any]:
    """A list as it is; anything else as a list of one."""
    return cast("Iterable[Any]", value) if isinstance(value, (list, tuple)) else [value]


def _as_sources(value: Any) -> Any:
    if value is None:
        return ()
    return [{"path": item} if isinstance(item, (str, Path)) else item for item in as_list(value)]


def _as_metrics(value: Any) -> Any:
    return value if value == "auto" else [_as_metric(item) for item in as_list(value)]


def _as_metric(item: Any) -> Any:
    """`{numeric: 0.01}` is a text from here on, `numeric: 0.01`."""
    pairs: list[tuple[Any, Any]] = (
        list(cast("Json", item).items()) if isinstance(item, dict) else []
    )
    if len(pairs) == 1 and type(pairs[0][1]) in (str, int, float):
        return f"{pairs[0][0]}: {pairs[0][1]}"
    return cast("Any", item)


def parse_custom_metric(metric: str) -> tuple[Path, str] | None:
    """The file and the function, if a metric is one of the user's own: `my_metrics.py:score`."""
    match = re.fullmatch(r"(.+\.py):(\w+)", metric)
    return (Path(match[1]), match[2]) if match and ": " not in metric else None


def normalize_stage(value: Any) -> Any:
    """`pt` is what LLaMA-Factory calls it."""
    return "cpt" if value == "pt" else value


def normalize_optimizer(value: Any) -> Any:
    """What other tools call these two: adamw_torch_fused, paged_adamw_8bit, adamw_bnb_8bit."""
    match = isinstance(value, str) and re.fullmatch(
        r"adamw(_torch|_torch_fused|_hf)?|(paged_)?adamw(_bnb)?_8bit", value
    )
    return value if not match else "adamw_8bit" if value.endswith("8bit") else "adamw"


def normalize_activations(value: Any) -> Any:
    """Other tools have a switch, gradient_checkpointing."""
    return (
        {True: "recompute", False: "keep"}.get(value, value) if isinstance(value, bool) else value
    )


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


def _check_pattern(pattern: str) -> str:
    if not pattern:
        return pattern
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if compiled.search("", timeout=1):
        raise ValueError("it matches an empty answer, so it matches every one")
    return pattern


def _as_constraints(value: Any) -> Any:
    if value is None:
        return ()
    return [
        {_guess_constraint_key(item): item} if isinstance(item, str) else item
        for item in as_list(value)
    ]


def _guess_constraint_key(text: str) -> str:
    """A text alone is a pattern, unless it is the name of a checker, or a slip of the pen for
    one."""
    return (
        "check"
        if re.fullmatch(r"[a-z-]+", text)
        and difflib.get_close_matches(text, CHECKERS, 1, MIN_NAME_SIMILARITY)
        else "match"
    )


def _check_checker(name: str) -> str:
    if not name or name in CHECKERS:
        return name
    close_names = difflib.get_close_matches(name.lower().replace(" ", "-"), CHECKERS, n=1)
    hint = (
        f"did you mean '{close_names[0]}'?" if close_names else f"there are {', '.join(CHECKERS)}."
    )
    raise ValueError(
        f"there is no checker '{name}'; {hint} A pattern is written {{match: '{name}'}}"
    )


def split_tokens(value: Any) -> Any:
    """A text is a list with commas, as LLaMA-Factory has it."""
    if value is None:
        return ()
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_token(text: str) -> str:
    if not 0 < len(text) <= MAX_TOKEN_CHARS:
        raise ValueError(
            f"a token has 1 to {MAX_TOKEN_CHARS} characters, {text[:20]!r} has {len(text):,}"
        )
    if any(letter.isspace() for letter in text):
        raise ValueError(
            f"{text!r} holds white space, which templates and texts trim and wrap: write it without"
        )
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a character that cannot be printed")
    return text


def _check_distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    duplicate = next((text for index, text in enumerate(texts) if text in texts[:index]), None)
    if duplicate is not None:
        raise ValueError(f"{duplicate!r} stands twice")
    return texts


def _check_path(value: Any) -> Any:
    if value == "" or "\0" in str(value):
        raise ValueError("not a path")
    return value


FilePath = Annotated[Path, BeforeValidator(_check_path)]


def _as_forms(value: Any) -> Any:
    if value is None:
        return ()
    return [{"prompt": item} if isinstance(item, str) else item for item in as_list(value)]


def parse_prompt(prompt: str) -> list[tuple[str, str | None]]:
    """(text, the column that follows it or nothing), in turn. Raises ValueError for what is no
    place of a column."""
    pieces: list[tuple[str, str | None]] = []
    for text, column, spec, conversion in string.Formatter().parse(prompt):
        if column == "" or spec or conversion:
            raise ValueError(
                "a place is {column}, nothing else; braces that are none are written twice"
            )
        pieces.append((text, column))
    return pieces


def _check_prompt(prompt: str) -> str:
    try:
        columns = [column for _, column in parse_prompt(prompt) if column is not None]
    except ValueError as error:
        raise ValueError(f"{prompt!r:.80}: {error}") from None
    if not columns:
        raise ValueError(f"{prompt!r:.80} has no {{column}}: every row would be asked the same")
    if "completion" in columns:
        raise ValueError(f"{prompt!r:.80} has a place for {{completion}}, which is the answer")
    return prompt


class PromptForm(BaseModel):
    """One way to ask for what a row answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, AfterValidator(_check_prompt)] = Field(
        description="The question; {column} stands for what the row has there, {{ and }} for braces."
    )
    shots: Annotated[int, Field(ge=0, le=32), BeforeValidator(reject_bool)] = Field(
        default=0,
        description="So many other training rows of the task come before it, asked and answered.",
    )


def make_task_name(path: Path) -> str:
    """What a task is called that has no name: its file without the suffixes."""
    return path.name.partition(".")[0]


class DataSource(BaseModel):
    """One data file of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: FilePath = Field(description="The file, or a folder of .txt and .md files.")
    format: Literal[
        "auto",
        "messages",
        "completion",
        "preference",
        "openai_preference",
        "sharegpt",
        "alpaca",
        "text",
    ] = Field(default="auto", description="Format of its rows; auto detects it and says why.")
    columns: dict[str, str] = Field(
        default_factory=dict[str, str],
        description="Which column holds what: {prompt: question, completion: answer}.",
    )
    weight: Annotated[float, Field(gt=0, le=1000), BeforeValidator(reject_bool)] = Field(
        default=1.0, description="The loss of everything trained in it is multiplied by this."
    )
    max_examples: Annotated[int, Field(ge=1), BeforeValidator(reject_bool)] | None = Field(
        default=None, description="Read only this many rows of it."
    )
    name: Annotated[str, AfterValidator(_check_name)] = Field(
        default="",
        description="The task that its rows are of: scores and tokens are counted by task.",
    )
    prompts: Annotated[
        tuple[PromptForm, ...],
        BeforeValidator(
            _as_forms, json_schema_input_type=str | PromptForm | list[str | PromptForm]
        ),
    ] = Field(
        default=(),
        description="Ways to ask for a row's `completion`; each row has one, by its content.",
    )

    @property
    def task(self) -> str:
        """What its rows are a task of."""
        return self.name or make_task_name(self.path)


Auto = Literal["auto"]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1), BeforeValidator(reject_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(reject_bool)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(reject_bool)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)]
Template = Annotated[
    Path,
    AfterValidator(_check_template),
    WithJsonSchema({"type": "string", "description": "the path of a .jinja file"}),
]
TemplateValue = str | bool | int | float | None | list[str]
Regex = Annotated[
    Name,
    AfterValidator(_check_regex),
    WithJsonSchema({"type": "string", "description": "a regular expression for whole paths"}),
]
Metrics = Annotated[
    tuple[Name, ...],
    Field(min_length=1),
    BeforeValidator(_as_metrics),
    WithJsonSchema(
        {
            "type": "array",
            "description": "a list of names, or of {name: value}",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {
                        "type": "object",
                        "minProperties": 1,
                        "maxProperties": 1,
                        "additionalProperties": {"type": ["string", "number"]},
                    },
                ]
            },
        }
    ),
]
NewTokens = Annotated[
    tuple[Annotated[str, AfterValidator(_check_token)], ...],
    AfterValidator(_check_distinct),
    BeforeValidator(split_tokens, json_schema_input_type=str | list[str]),
]
Sources = Annotated[
    tuple[DataSource, ...],
    BeforeValidator(
        _as_sources, json_schema_input_type=Path | DataSource | list[Path | DataSource]
    ),
]


SELF_GENERATED = "self"  # in the place of a path


class RehearsalConfig(BaseModel):
    """What the model goes over again beside the new data, so that it forgets less."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Sources = Field(
        min_length=1,
        description="General rows, texts or conversations: a path or a list, as data; or self, written by the model.",
    )
    ratio: (
        Auto
        | Literal["adaptive"]
        | Annotated[float, Field(ge=0, le=0.9), BeforeValidator(reject_bool)]
    ) = Field(
        default="auto",
        description="Their share of all tokens of the run; adaptive begins with auto's and follows the retention_data.",
    )
    shift: Literal["style", "domain", "language"] = Field(
        default="domain",
        description="How far the data is from what the model knows; language: a new one, or code. Decides ratio: auto.",
    )

    @property
    def is_self_generated(self) -> bool:
        """The model writes the rows itself."""
        return self.data == (DataSource(path=Path(SELF_GENERATED)),)


MATCHER_KEYS = ("match", "text", "check")


class MixtureConfig(BaseModel):
    """How much of each task an epoch holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: Positive = Field(
        default=1.0,
        description="1 takes tasks in proportion to their rows; the higher, the more alike.",
    )
    limit: Count | None = Field(
        default=None, description="A task counts as having at most this many rows."
    )


class Constraint(BaseModel):
    """What no answer may say: a pattern, a text or a checker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Annotated[str, AfterValidator(_check_pattern)] = Field(
        default="",
        description="A regular expression; an answer that it matches anywhere breaks the constraint.",
    )
    text: str = Field(
        default="", description="Instead of match: exactly these characters, anywhere."
    )
    check: Annotated[str, AfterValidator(_check_checker)] = Field(
        default="", description=f"Instead of match: a checker by its name, {', '.join(CHECKERS)}."
    )
    name: str = Field(
        default="", description="What it is called in counts and measures; else what it looks for."
    )
    mode: Literal["filter", "ban", "pair"] = Field(
        default="filter",
        description="Answers that break it are left out (filter), trained away from where they match (ban), or, with "
        "stage: preference, are the worse side of a pair, made by the base model where a row has none (pair).",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_default_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        raw_values = cast("Json", values)
        patterns = [
            raw_values[kind] for kind in MATCHER_KEYS if isinstance(raw_values.get(kind), str)
        ]
        return {"name": patterns[0], **raw_values} if patterns else raw_values

    @model_validator(mode="after")
    def _check_single_matcher(self) -> Constraint:
        kinds = [kind for kind in MATCHER_KEYS if getattr(self, kind)]
        if len(kinds) != 1:
            raise ValueError(
                f"give one of {', '.join(MATCHER_KEYS)}, not {' and '.join(kinds) or 'none of them'}"
            )
        return self

    @property
    def matcher(self) -> str | Callable[[str], Spans]:
        """The pattern, or the function that finds the bad places."""
        return (
            CHECKERS[self.check].matcher
            if self.check
            else self.match or regex.escape(self.text, literal_spaces=True)
        )

    @property
    def instruction(self) -> str:
        """In words, as a prompt would have it after "Never"."""
        return (
            CHECKERS[self.check].instruction if self.check else f'write "{self.text or self.name}"'
        )


def _check_distinct_names(constraints: tuple[Constraint, ...]) -> tuple[Constraint, ...]:
    names = [constraint.name for constraint in constraints]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two constraints are called '{duplicates[0]}': give one of them another name"
        )
    return constraints


Constraints = Annotated[
    tuple[Constraint, ...],
    BeforeValidator(
        _as_constraints, json_schema_input_type=str | Constraint | list[str | Constraint]
    ),
    AfterValidator(_check_distinct_names),
]
