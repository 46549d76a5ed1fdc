"""Absolute limits of metrics, `gates` of a recipe: what a model must reach to be released.

    gates: {exact_match: ">= 0.8", general text/bits_per_byte: "<= 1.2"}

In: the mapping as written. Out: MetricLimits; a grade in percent is refused. A name is a metric,
for every task that has it, or TASK/METRIC. Left out: judging them (evaluate/regression_gate.py).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.recipe.fields import FORMER_METRICS, parse_custom_metric

SETTING = "gates"
COMPARATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
LIMIT_PATTERN = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
EXAMPLE = 'exact_match: ">= 0.8"'
# what a stage measures beside `metrics`
LIKELIHOOD_METRICS = {
    "sft": ("loss", "bits_per_byte"),
    "cpt": ("bits_per_byte",),
    "preference": (
        *("loss", "bits_per_byte", "preference_accuracy", "margin"),
        "length_controlled_accuracy",
        *("chosen_logp", "rejected_logp", "desirable_logp", "undesirable_logp"),
    ),
}
BAD_LOGP = "bad_logp"
LOWER_IS_BETTER = ("loss", "bits_per_byte", "rejected_logp", "undesirable_logp", BAD_LOGP)
# these are no grades, which lie from 0 to 1
UNBOUNDED_METRICS = (*LOWER_IS_BETTER, "margin", "chosen_logp", "desirable_logp")


@dataclass(frozen=True)
class MetricLimit:
    """A metric, with or without its task, and the values that it may have."""

    name: str
    comparator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {self.comparator} {self.limit:g}"

    @property
    def is_least(self) -> bool:
        """Whether greater values hold the limit."""
        return self.comparator.startswith(">")

    def is_met_by(self, value: float) -> bool:
        return COMPARATORS[self.comparator](value, self.limit)

    def is_limit_of(self, task: str, metric: str) -> bool:
        """Return whether a score of this task and metric must hold the limit.

        The task of a stage begins with the name of the stage."""
        name = self.name.replace("/", " ")
        title = f"{task} {metric}"
        return name == metric or (
            name.endswith(f" {metric}") and (title == name or title.endswith(f" {name}"))
        )


def parse_limits(gates: Mapping[str, str]) -> tuple[MetricLimit, ...]:
    """Return the limits of a recipe. Raises ValueError for one that is no comparison."""
    return tuple(_parse_limit(name, text) for name, text in gates.items())


def _parse_limit(name: str, text: str) -> MetricLimit:
    match = LIMIT_PATTERN.fullmatch(text)
    if match is None or not math.isfinite(float(match[2])):
        raise ValueError(f"{name}: {text!r:.40} is not a comparison with a number; write {EXAMPLE}")
    return MetricLimit(name, match[1], float(match[2]))


def refuse_useless_limits(
    gates: Mapping[str, str], *, stage: str, metrics: Iterable[str], constraints: Iterable[str]
) -> None:
    """Raise InputError for a limit on a metric that a run does not measure, and for one of a grade
    in percent.

    constraints: the names of those in `never`."""
    measured = [*map(_get_result_name, metrics), *LIKELIHOOD_METRICS[stage]]
    for constraint in constraints:
        measured += [f"breaks {constraint}", f"says {constraint}", BAD_LOGP]
    for limit in parse_limits(gates):
        name = limit.name.replace("/", " ")
        matching = [metric for metric in measured if f" {name}".endswith(f" {metric}")]
        if not matching:
            listed = ", ".join(measured)
            fix = suggest_name(limit.name.rsplit("/", 1)[-1], measured, default=f"use {listed}")
            message = f"{limit.name!r:.60} is not measured by this run"
            raise InputError(message, where=SETTING, fix=f"{fix}; metrics are named in `metrics`")
        metric = max(matching, key=len)
        is_grade = ".py:" not in metric and metric not in UNBOUNDED_METRICS
        if is_grade and not 0 <= limit.limit <= 1:
            meant = f"{limit.comparator} {limit.limit / 100:g}"
            message = f"{limit.name:.60} lies from 0 to 1, so {limit.limit:g} decides nothing"
            raise InputError(message, where=SETTING, fix=f'write {limit.name}: "{meant}"')


def _get_result_name(metric: str) -> str:
    """Return the name of a metric in results: a function is named without its folder."""
    custom_metric = parse_custom_metric(metric)
    return metric if custom_metric is None else f"{custom_metric[0].name}:{custom_metric[1]}"


def list_reversed_limits(gates: Mapping[str, str]) -> list[str]:
    """Return a warning for each limit that a worse model holds more easily: `loss: ">= 0.8"`. Of
    a function in a file it is not known which values are better."""
    warnings: list[str] = []
    for limit in parse_limits(gates):
        name = f" {limit.name.replace('/', ' ')}"
        is_better_low = " breaks " in name or name.endswith(tuple(f" {m}" for m in LOWER_IS_BETTER))
        if ".py:" in name or limit.is_least != is_better_low:
            continue
        opposite = limit.comparator.translate(str.maketrans("<>", "><"))
        warnings.append(
            f"gates: {limit} passes worse models: {'lower' if is_better_low else 'higher'} values "
            f'are better; did you mean "{opposite} {limit.limit:g}"?'
        )
    return warnings


def _refuse_numbers(value: Any) -> Any:
    """A number alone does not say which side is allowed."""
    for name, text in value.items() if isinstance(value, dict) else ():
        if not isinstance(text, str):
            raise ValueError(f"{name}: {text!r:.40} is not a comparison; write {EXAMPLE}")
    return value


def _check_limits(gates: dict[str, str]) -> dict[str, str]:
    parse_limits(gates)
    renamed: dict[str, str] = {}
    for name, text in gates.items():
        task, separator, metric = name.rpartition("/")
        current_name = f"{task}{separator}{FORMER_METRICS.get(metric, metric)}"
        if current_name in renamed:
            raise ValueError(f"two limits are for {current_name}; remove one of them")
        renamed[current_name] = text
    return renamed


GateLimits = Annotated[
    dict[str, str], BeforeValidator(_refuse_numbers), AfterValidator(_check_limits)
]
