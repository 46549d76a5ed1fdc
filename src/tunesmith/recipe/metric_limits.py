"""Absolute limits of metrics, `gates` of a recipe: what a model must reach to be released.

    gates: {exact_match: ">= 0.8", general text/bits_per_byte: "<= 1.2"}

In: the mapping as written. Out: MetricLimits; one that all values of its metric hold, or none, is
refused. A name is a metric, for every task that has it, or TASK/METRIC. Left out: judging them
(evaluate/regression_gate.py).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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
        *("chosen_logp", "rejected_logp", "desirable_logp", "undesirable_logp"),
    ),
}
BAD_LOGP = "bad_logp"
# the least and the greatest value of metrics that are no grades
RANGES = {
    "loss": (0.0, math.inf),
    "bits_per_byte": (0.0, math.inf),
    "margin": (-math.inf, math.inf),
    **dict.fromkeys(("chosen_logp", "rejected_logp", BAD_LOGP), (-math.inf, 0.0)),
    **dict.fromkeys(("desirable_logp", "undesirable_logp"), (-math.inf, 0.0)),
}
LOWER_IS_BETTER = ("loss", "bits_per_byte", "rejected_logp", "undesirable_logp", BAD_LOGP)
GRADE_RANGE = (0.0, 1.0)
ANY_NUMBER = (-math.inf, math.inf)


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
    """Raise InputError for a limit on a metric that a run does not measure, and for one that no
    value of its metric holds, or every value.

    constraints: the names of those in `never`."""
    ranges = dict(_find_range(metric) for metric in metrics)
    for constraint in constraints:
        names = (f"breaks {constraint}", f"says {constraint}", BAD_LOGP)
        ranges |= {name: RANGES.get(name, GRADE_RANGE) for name in names}
    ranges |= {name: RANGES.get(name, GRADE_RANGE) for name in LIKELIHOOD_METRICS[stage]}
    for limit in parse_limits(gates):
        name = limit.name.replace("/", " ")
        matching = [metric for metric in ranges if name == metric or name.endswith(f" {metric}")]
        if not matching:
            listed = ", ".join(ranges)
            fix = suggest_name(limit.name.rsplit("/", 1)[-1], ranges, default=f"use {listed}")
            message = f"{limit.name!r:.60} is not measured by this run"
            raise InputError(message, where=SETTING, fix=f"{fix}; metrics are named in `metrics`")
        _refuse_empty_limit(limit, ranges[max(matching, key=len)])


def _find_range(metric: str) -> tuple[str, tuple[float, float]]:
    """Return the name of a metric in results, and the range of its values. A function is named
    without its folder, and returns any number."""
    custom_metric = parse_custom_metric(metric)
    if custom_metric is not None:
        return f"{custom_metric[0].name}:{custom_metric[1]}", ANY_NUMBER
    return metric, RANGES.get(metric, GRADE_RANGE)


def _refuse_empty_limit(limit: MetricLimit, bounds: tuple[float, float]) -> None:
    """Raise InputError for a limit that all values within the bounds hold, or none."""
    verdict = _find_only_verdict(limit, bounds)
    if verdict is None:
        return
    low, high = bounds
    if math.isinf(high):
        described = f"is at least {low:g}"
    else:
        described = f"is at most {high:g}" if math.isinf(low) else f"lies from {low:g} to {high:g}"
    fix = f"set a limit that some values hold and others do not, such as {EXAMPLE}"
    fraction = replace(limit, limit=limit.limit / 100)
    is_percent = bounds == GRADE_RANGE and abs(limit.limit) > 1
    if is_percent and _find_only_verdict(fraction, bounds) is None:
        fix = f'write {limit.name}: "{limit.comparator} {fraction.limit:g}"'
    message = f"{limit.name:.60} {described}: `{limit.comparator} {limit.limit:g}` {verdict}"
    raise InputError(message, where=SETTING, fix=fix)


def _find_only_verdict(limit: MetricLimit, bounds: tuple[float, float]) -> str | None:
    """Return the verdict on all values within the bounds, None if it depends on the value."""
    worst, best = bounds if limit.is_least else bounds[::-1]
    if not limit.is_met_by(best):
        return "can never be held"
    return "always holds, which checks nothing" if limit.is_met_by(worst) else None


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
