"""The table of metrics, and the arguments that they take.

    "exact_match", "numeric: 0.01" -> the function of METRICS, its argument

A metric is a function (answer, expected, arg) -> [0, 1]; a new one is a function and a line in
METRICS. `arg` is the response schema for schema_valid, the text after the colon for the metrics of
ARG_PARSERS, else None. The LIKELIHOODS grade no answer (multiple_choice.py, loglikelihood.py); a
custom metric is a function in the user's file (custom_metric.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import suggest_name
from tunesmith.core.types import Json
from tunesmith.data.json_schema import make_validator
from tunesmith.data.readers.local_file import check_path
from tunesmith.evaluate.json_metrics import field_f1, json_valid, schema_valid
from tunesmith.evaluate.text_metrics import (
    chrf,
    contains,
    exact_match,
    normalized_match,
    numeric,
    parse_text,
    parse_tolerance,
    regex_match,
    rouge_l,
    token_f1,
)
from tunesmith.recipe.fields import compile_pattern, parse_custom_metric

if TYPE_CHECKING:
    from tunesmith.session.inputs import RunInputs

SETTING = "metrics"


def split_metric(metric: str) -> tuple[str, str]:
    """Return (name, text after the colon); the text is empty without a colon."""
    name, _, arg = metric.partition(": ")
    return name, arg


def parse_metric_arg(metric: str, schema: Json | None) -> Any:
    """Return the parsed argument of a metric.

    Raises InputError for an unknown metric, and for a missing, unexpected or invalid argument.
    """
    name, text = split_metric(metric)
    names = (*METRICS, MACRO_F1, *LIKELIHOODS)
    if name not in names:
        fix = f"use {', '.join(names)}, or FILE.py:FUNCTION"
        fix = suggest_name(name, names, default=fix)
        raise InputError(f"unknown metric {name!r}", where=SETTING, fix=fix)
    if name == "schema_valid":
        if schema is None:
            fix = "set `response_schema`, or leave the metric out"
            raise InputError("schema_valid needs a schema", where=SETTING, fix=fix)
        make_validator(schema)
        return schema
    if text and name not in ARG_PARSERS:
        message = f"{name} takes no argument, got {text:.80}"
        raise InputError(message, where=SETTING, fix=f"write only {name}")
    if name == "regex" and not text:
        raise InputError("regex needs a pattern", where=SETTING, fix="write {regex: PATTERN}")
    try:
        return ARG_PARSERS[name](text) if text else None
    except ValueError as error:
        raise InputError(str(error), where=f"{SETTING}: {name}") from None


def refuse_invalid_metrics(inputs: RunInputs) -> None:
    """Raise InputError for an invalid metric of the recipe, even without rows to evaluate, and for
    a missing file of general text."""
    recipe = inputs.recipe
    if recipe.general_texts is not None:
        check_path(recipe.general_texts)
    if recipe.metrics == "auto":
        return
    for metric in recipe.metrics:
        if not parse_custom_metric(metric):
            parse_metric_arg(metric, inputs.response_schema)


def grade_answer(metric: str, answer: str, expected: str, arg: Any) -> float:
    """Return the value of one answer."""
    try:
        return METRICS[split_metric(metric)[0]](answer, expected, arg)
    except RecursionError:
        # A model that loops on "[" nests deeper than Python can walk.
        return 0.0


Metric = Callable[[str, str, Any], float]
METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "accuracy": exact_match,
    "normalized_match": normalized_match,
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
# They show the form of an answer and not whether it is right.
FORM_METRICS = ("schema_valid", "json_valid")
MACRO_F1 = "macro_f1"  # of all answers together (class_scores.py)
MULTIPLE_CHOICE = "multiple_choice"
BITS_PER_BYTE = "bits_per_byte"
LIKELIHOODS = (MULTIPLE_CHOICE, BITS_PER_BYTE)
ARG_PARSERS: dict[str, Callable[[str], Any]] = {
    "contains": parse_text,
    "regex": compile_pattern,
    "numeric": parse_tolerance,
}
