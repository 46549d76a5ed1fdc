"""The `sweep` mapping of a recipe: which keys vary, over which values, and how trials are chosen.

    sweep: {learning_rate: [1e-4, 3e-4, 1e-3], lora_r: [8, 64], seeds: 3}
    sweep: {learning_rate: {min: 1e-5, max: 1e-2, log: true}, search: tpe, trials: 12}
    sweep: {seeds: 3}    measures what seeds alone change

In: a value as YAML holds it. Out: SweepConfig. Left out: reading each value as one of its key
(schema.py), and the trials themselves (advise/sweep/)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from tunesmith.core.formatting import suggest_name
from tunesmith.core.types import Json
from tunesmith.recipe.fields import Auto, Count, Name, reject_bool

# Settings of training and how many rows there are. Everything else would change what trials are
# compared on: the model, rendering, and the measures.
SWEPT_KEYS = (
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("optim", "num_train_epochs", "max_steps", "batch_size", "batch_tokens", "method"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"),
    *("label_smoothing", "neftune_noise_alpha", "max_examples"),
)
# Of these, a range has whole numbers.
INTEGER_KEYS = ("max_steps", "batch_size", "batch_tokens", "lora_r", "max_examples")
RANGE_KEYS = (
    *INTEGER_KEYS,
    *("learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm", "num_train_epochs"),
    *("lora_alpha", "lora_dropout", "label_smoothing", "neftune_noise_alpha"),
)
MAX_SEED = 2**32


class ValueRange(BaseModel):
    """A distribution over the numbers from `min` to `max`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Annotated[float, Field(allow_inf_nan=False), BeforeValidator(reject_bool)]
    max: Annotated[float, Field(allow_inf_nan=False), BeforeValidator(reject_bool)]
    log: bool = False


Scalar = bool | int | float | str
SweptValues = Annotated[ValueRange | tuple[Scalar, ...], Field(union_mode="left_to_right")]
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED), BeforeValidator(reject_bool)]


class SweepConfig(BaseModel):
    """Keys that vary between trials, each a list of values or a range, and how they are tried."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, SweptValues] = Field(init=False)  # type: ignore[assignment]

    seeds: Count | Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=1, description="Seeds per configuration: a number of them, or a list."
    )
    search: Literal["grid", "random", "tpe"] = Field(
        default="grid", description="grid: every combination; random; tpe: from earlier trials."
    )
    trials: Count | None = Field(
        default=None, description="Configurations to try, with search: random or tpe."
    )
    pruner: Literal["median", "halving", "none"] = Field(
        default="median", description="Which trials stop early, by eval_data at evaluations."
    )
    metric: Auto | Name = Field(
        default="auto", description="Metric on eval_data that selects; auto is its loss."
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        settings = cast("Json", values)
        swept = [key for key in settings if key not in cls.model_fields]
        for key in swept:
            _check_key(str(key))
            _check_values(str(key), settings[key])
        seeds = settings.get("seeds", 1)
        if not swept and (seeds == 1 or (isinstance(seeds, (list, tuple)) and len(seeds) == 1)):
            keys = ", ".join(SWEPT_KEYS)
            raise ValueError(f"no key varies: list values of one of {keys}; or set seeds, as 3")
        ranges = [key for key in swept if isinstance(settings[key], dict)]
        search = settings.get("search", "grid")
        if search == "grid":
            if ranges:
                raise ValueError(f"{ranges[0]} is a range: list values, or set search and trials")
            if settings.get("trials") is not None:
                raise ValueError("trials has no effect with search: grid, which tries them all")
        elif not swept:
            raise ValueError(f"search: {search} has no key to vary: leave it out with seeds alone")
        elif search in ("random", "tpe") and settings.get("trials") is None:
            raise ValueError(f"search: {search} needs trials, the number to try")
        return values

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(seeds, tuple):
            for index, seed in enumerate(seeds):
                if seed in seeds[:index]:
                    raise ValueError(f"{seed} is repeated: its trial would be the same again")
        return seeds

    @property
    def space(self) -> dict[str, SweptValues]:
        """The values or the range of each key that varies, in the order of the recipe."""
        return self.__pydantic_extra__

    def list_seeds(self, first: int) -> tuple[int, ...]:
        """Return the seeds; a number of them counts from `first`, the recipe's seed."""
        if isinstance(self.seeds, int):
            return tuple(range(first, first + self.seeds))
        return self.seeds


def _check_key(key: str) -> None:
    if key in SWEPT_KEYS:
        return
    if key == "seed":
        raise ValueError("seed is swept by seeds: a number of them, or a list")
    hint = suggest_name(key, SWEPT_KEYS, default=f"use {', '.join(SWEPT_KEYS)}")
    message = "trials share model, rows and measures"
    raise ValueError(f"'{key:.60}' cannot be swept: {message}; {hint}")


def _check_values(key: str, values: Any) -> None:
    """Raise ValueError for a list or a range that is empty."""
    if isinstance(values, (list, tuple)):
        items = cast("Sequence[Any]", values)
        if not items:
            raise ValueError(f"{key}: an empty list has no value to try")
        for item in items:
            if not isinstance(item, (bool, int, float, str)):
                raise ValueError(f"{key}: expected single values, found {item!r:.60}")
    elif isinstance(values, dict):
        _check_range(key, cast("Json", values))
    else:
        raise ValueError(f"{key}: expected a list or {{min, max, log}}, found {values!r:.60}")


def _check_range(key: str, values: Json) -> None:
    if key not in RANGE_KEYS:
        raise ValueError(f"{key}: no range of numbers; list its values")
    if unknown := [name for name in values if name not in ValueRange.model_fields]:
        raise ValueError(f"{key}: unknown key '{unknown[0]}'; a range is {{min, max, log}}")
    low, high = (_check_bound(key, name, values.get(name)) for name in ("min", "max"))
    if low >= high:
        raise ValueError(f"{key}: an empty range, min {low:g} is not below max {high:g}")
    if values.get("log") and low <= 0:
        raise ValueError(f"{key}: a logarithmic range starts above 0, not at {low:g}")


def _check_bound(key: str, name: str, bound: Any) -> float:
    try:
        number = math.nan if isinstance(bound, bool) else float(bound)  # YAML reads 1e-5 as text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key}: {name} is not a number")
    if key in INTEGER_KEYS and number != int(number):
        raise ValueError(f"{key}: {name} is not a whole number")
    return number
