"""The metrics of a recipe by name, and what a recipe may give them.

    "exact_match", "numeric: 0.01" -> named -> (its function, what it is given)

A metric is a function (answer, expected, given) -> [0, 1]; a new one is a function and a line in
METRICS. `given` is the recipe's schema for schema_valid, what stands behind the colon for those of
GIVEN, else None. Those of LIKELIHOODS look at no answer but at how likely the model finds texts
(choices.py, likelihood.py); a user's own metric is a function in a file (ownmetric.py)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.readers.local_file import check_path
from tunesmith.evaluate.json_metrics import check_schema, field_f1, json_valid, schema_valid
from tunesmith.evaluate.text_metrics import (
    chrf,
    contains,
    exact_match,
    normalised_match,
    numeric,
    parse_pattern,
    parse_text,
    parse_tolerance,
    regex_match,
    rouge_l,
    token_f1,
)
from tunesmith.recipe.fields import parse_custom_metric

if TYPE_CHECKING:
    from tunesmith.session.inputs import RunInputs

SETTING = "metrics"


def split_metric(metric: str) -> tuple[str, str]:
    """(name, what stands behind the colon), or (name, nothing)."""
    name, _, arg = metric.partition(": ")
    return name, arg


def parse_metric_arg(metric: str, schema: Json | None) -> Any:
    """What a metric is given. Raises InputError for a name that there is not, and for what it
    cannot take."""
    name, text = split_metric(metric)
    if name not in (metric_names := (*METRICS, *LIKELIHOODS)):
        close_matches = difflib.get_close_matches(name, metric_names, n=1)
        fix = (
            f"did you mean {close_matches[0]}?"
            if close_matches
            else f"use {', '.join(metric_names)}, or FILE.py:FUNCTION"
        )
        raise InputError(f"there is no metric {name!r}", where=SETTING, fix=fix)
    if name == "schema_valid":
        if schema is None:
            raise InputError(
                "schema_valid needs a schema",
                where=SETTING,
                fix="give `schema`, or leave the metric out",
            )
        check_schema(schema)
        return schema
    if text and name not in ARG_PARSERS:
        raise InputError(
            f"{name} takes nothing, and is given {text:.80}",
            where=SETTING,
            fix=f"write {name} alone",
        )
    if name == "regex" and not text:
        raise InputError("regex needs a pattern", where=SETTING, fix="write {regex: PATTERN}")
    try:
        return ARG_PARSERS[name](text) if text else None
    except ValueError as error:
        raise InputError(str(error), where=f"{SETTING}: {name}") from None


def refuse_invalid_metrics(inputs: RunInputs) -> None:
    """InputError for a metric of the recipe that is none, whether there are rows to measure or not,
    and for general text that is not there."""
    recipe = inputs.recipe
    if recipe.retention_data is not None:
        check_path(recipe.retention_data)
    for metric in () if recipe.metrics == "auto" else recipe.metrics:
        if not parse_custom_metric(metric):
            parse_metric_arg(metric, inputs.response_schema)


def grade_answer(metric: str, answer: str, expected: str, arg: Any) -> float:
    """One answer by one metric."""
    try:
        return METRICS[split_metric(metric)[0]](answer, expected, arg)
    except RecursionError:  # a model that loops on "[" nests deeper than Python can walk
        return 0.0


Metric = Callable[[str, str, Any], float]
METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "contains": contains,
    "regex": regex_match,
    "numeric": numeric,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "chrf": chrf,
    "json_valid": json_valid,
    "schema_valid": schema_valid,
    "field_f1": field_f1,
}
MULTIPLE_CHOICE, BITS_PER_BYTE = LIKELIHOODS = ("multiple_choice", "bits_per_byte")
ARG_PARSERS: dict[str, Callable[[str], Any]] = {
    "contains": parse_text,
    "regex": parse_pattern,
    "numeric": parse_tolerance,
}
