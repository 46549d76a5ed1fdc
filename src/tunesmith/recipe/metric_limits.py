"""Absolute limits of metrics, `gates` of a recipe: what a model must reach to be released.

    gates: {exact_match: ">= 0.8", general text/bits_per_byte: "<= 1.2"}

In: the mapping as written. Out: MetricLimits. A name is a metric, for every task that has it, or
TASK/METRIC. Left out: judging them (evaluate/regression_gate.py).
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
        *("chosen_logp", "rejected_logp"),
    ),
}


@dataclass(frozen=True)
class MetricLimit:
    """A metric, with or without its task, and the values that it may have."""

    name: str
    comparator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {self.comparator} {self.limit:g}"

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


def refuse_unmeasured_limits(
    gates: Mapping[str, str], *, stage: str, metrics: Iterable[str], constraints: Iterable[str]
) -> None:
    """Raise InputError for a limit on a metric that a run does not measure.

    constraints: the names of those in `never`."""
    names = [_format_metric(metric) for metric in metrics]
    for constraint in constraints:
        names += [f"breaks {constraint}", f"says {constraint}", "bad_logp"]
    names += LIKELIHOOD_METRICS[stage]
    for limit in parse_limits(gates):
        name = limit.name.replace("/", " ")
        if not any(name == metric or name.endswith(f" {metric}") for metric in names):
            listed = ", ".join(dict.fromkeys(names))
            fix = suggest_name(limit.name.rsplit("/", 1)[-1], names, default=f"use {listed}")
            message = f"{limit.name!r:.60} is not measured by this run"
            raise InputError(message, where=SETTING, fix=f"{fix}; metrics are named in `metrics`")


def _format_metric(metric: str) -> str:
    """Return the name of a metric in results: that of a function, without its folder."""
    custom_metric = parse_custom_metric(metric)
    return metric if custom_metric is None else f"{custom_metric[0].name}:{custom_metric[1]}"


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
        renamed[f"{task}{separator}{FORMER_METRICS.get(metric, metric)}"] = text
    return renamed


GateLimits = Annotated[
    dict[str, str], BeforeValidator(_refuse_numbers), AfterValidator(_check_limits)
]
