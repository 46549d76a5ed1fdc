"""What may stand behind a key of the recipe: kinds of values, and the mappings inside it.

Words of other tools that mean the same become ours here. Left out: the keys themselves and what cannot be together
(recipe.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from tunesmith.types import Json


def no_switch(value: Any) -> Any:
    """YAML reads on, yes, off and no as true and false, and Python counts true as 1."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


def items(value: Any) -> Iterable[Any]:
    """A list as it is; anything else as a list of one."""
    return cast("Iterable[Any]", value) if isinstance(value, (list, tuple)) else [value]


def _as_sources(value: Any) -> Any:
    if value is None:
        return ()
    return [{"path": item} if isinstance(item, (str, Path)) else item for item in items(value)]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "auto" else value


def loss_name(value: Any) -> Any:
    """`sigmoid` is what other tools call the loss of DPO."""
    return "dpo" if value == "sigmoid" else value


def stage_name(value: Any) -> Any:
    """`pt` is what LLaMA-Factory calls it."""
    return "cpt" if value == "pt" else value


def optimizer_name(value: Any) -> Any:
    """What other tools call these two: adamw_torch_fused, paged_adamw_8bit, adamw_bnb_8bit."""
    known = isinstance(value, str) and re.fullmatch(
        r"adamw(_torch|_torch_fused|_hf)?|(paged_)?adamw(_bnb)?_8bit", value
    )
    return value if not known else "adamw_8bit" if value.endswith("8bit") else "adamw"


def as_policy(value: Any) -> Any:
    """Other tools have a switch, gradient_checkpointing."""
    return {True: "recompute", False: "keep"}.get(value, value) if isinstance(value, bool) else value


def _is_template(path: Path) -> Path:
    if path.suffix != ".jinja":
        raise ValueError("not a .jinja file")
    return path


def _is_regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


def _is_pattern(pattern: str) -> str:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if compiled.search("", timeout=1):
        raise ValueError("it matches an empty answer, so it matches every one")
    return pattern


def as_constraints(value: Any) -> Any:
    if value is None:
        return ()
    return [{"match": item} if isinstance(item, str) else item for item in items(value)]


def _could_exist(value: Any) -> Any:
    if value == "" or "\0" in str(value):
        raise ValueError("not a path")
    return value


FilePath = Annotated[Path, BeforeValidator(_could_exist)]


class DataSource(BaseModel):
    """One data file of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: FilePath = Field(description="The file, or a folder of .txt and .md files.")
    format: Literal[
        "auto", "messages", "completion", "preference", "openai_preference", "sharegpt", "alpaca", "text"
    ] = Field(default="auto", description="Format of its rows; auto detects it and says why.")
    columns: dict[str, str] = Field(
        default_factory=dict[str, str], description="Which column holds what: {prompt: question, completion: answer}."
    )
    weight: Annotated[float, Field(gt=0, le=1000), BeforeValidator(no_switch)] = Field(
        default=1.0, description="The loss of everything trained in it is multiplied by this."
    )
    max_examples: Annotated[int, Field(ge=1), BeforeValidator(no_switch)] | None = Field(
        default=None, description="Read only this many rows of it."
    )


Auto = Literal["auto"]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1), BeforeValidator(no_switch)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(no_switch)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(no_switch)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(no_switch)]
Template = Annotated[
    Path, AfterValidator(_is_template), WithJsonSchema({"type": "string", "description": "the path of a .jinja file"})
]
TemplateValue = str | bool | int | float | None | list[str]
Regex = Annotated[
    Name,
    AfterValidator(_is_regex),
    WithJsonSchema({"type": "string", "description": "a regular expression for whole paths"}),
]
Sources = Annotated[
    tuple[DataSource, ...],
    BeforeValidator(_as_sources, json_schema_input_type=Path | DataSource | list[Path | DataSource]),
]


class Rehearsal(BaseModel):
    """What the model goes over again beside the new data, so that it forgets less."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Sources = Field(min_length=1, description="General rows, texts or conversations: a path or a list, as data.")
    ratio: Auto | Annotated[float, Field(ge=0, le=0.9), BeforeValidator(no_switch)] = Field(
        default="auto", description="Their share of all tokens of the run."
    )
    shift: Literal["style", "domain", "language"] = Field(
        default="domain",
        description="How far the data is from what the model knows; language: a new one, or code. Decides ratio: auto.",
    )


class Constraint(BaseModel):
    """What no answer may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Annotated[str, AfterValidator(_is_pattern)] = Field(
        description="A regular expression; an answer that it matches anywhere breaks the constraint."
    )
    name: str = Field(default="", description="What it is called in counts and measures; else the pattern itself.")
    mode: Literal["filter", "ban"] = Field(
        default="filter",
        description="Answers that break it are left out (filter), or trained away from where they match (ban).",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "match" not in values:
            return cast("Any", values)
        given = cast("Json", values)
        return {"name": given["match"], **given}
