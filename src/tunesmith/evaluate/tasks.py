"""Held-out questions, answered by the model and graded without a judge.

    Examples -> Questions -> (answers) -> Measurements, one a metric, and Samples to look at

A question is an example up to its last trained turn, exactly as it is served; what that turn holds is the expected
answer. A metric is a function (answer, expected, schema) -> [0, 1]; a new one is a function and a line in METRICS.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jsonschema
import numpy as np
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from tunesmith.data.render import Renderer
from tunesmith.errors import InputError
from tunesmith.evaluate.compare import Measurement
from tunesmith.infer.engine import Allowed, generate
from tunesmith.model.load import LanguageModel
from tunesmith.types import Example, Generation, Json, Request, Sample

# ---------------------------------------------------------------- questions and answers


@dataclass(frozen=True)
class Question:
    """`prompt` is what the model is given, `shown` the part of it that people want to see. `negative`: what the row
    says of its answer; a bad one is what the prompt asked for and should not get."""

    id: str
    prompt: tuple[int, ...]
    shown: str
    expected: str
    expected_tokens: int
    negative: bool | Literal["whole"] | None = None


def questions_of(examples: Sequence[Example], renderer: Renderer) -> tuple[Question, ...]:
    """Raises InputError with the row's id for an example that asks nothing."""
    return tuple(_question(example, renderer) for example in examples)


def _question(example: Example, renderer: Renderer) -> Question:
    documents = renderer.documents(dataclasses.replace(example, rejected=None, banned=())).documents
    if not documents or (example.text is not None and not example.prompt):
        fix = "give rows with messages, or with a prompt and a completion"
        raise InputError("the row asks nothing", where=example.id, fix=fix)
    tokens, weights = documents[-1].tokens_L, documents[-1].weights_L
    (targets,) = np.nonzero(weights)
    end = int(targets[-1]) + 1
    untrained = np.flatnonzero(weights[:end] == 0)
    begin = int(untrained[-1]) + 1
    answer = [token for token in tokens[begin:end].tolist() if token not in renderer.end_ids]
    asked = max((i for i, weight in enumerate(example.turn_weights) if weight > 0), default=0)
    shown = example.messages[asked - 1]["content"] if example.messages else example.prompt or ""
    expected = renderer.decode(answer)
    return Question(example.id, tuple(tokens[:begin].tolist()), shown, expected, end - begin, example.negative)


def answer_length(questions: Sequence[Question]) -> int:
    """Room for an answer: half as much again as the longest expected one. Who needs more is wrong anyway."""
    return math.ceil(1.5 * max(question.expected_tokens for question in questions)) + 16


def ask(
    model: LanguageModel,
    questions: Sequence[Question],
    renderer: Renderer,
    *,
    max_new_tokens: int,
    banned: tuple[tuple[int, ...], ...] = (),
    allowed: Allowed | None = None,
) -> Iterator[tuple[int, Generation]]:
    """(index of the question, greedy answer), as they finish. `banned`: token sequences that no answer may hold;
    `allowed`: a grammar that every answer follows."""
    requests = requests_of(questions, max_new_tokens, banned)
    return generate(model, requests, decode=renderer.decode, end_ids=renderer.end_ids, allowed=allowed)


def requests_of(
    questions: Sequence[Question], max_new_tokens: int, banned: tuple[tuple[int, ...], ...] = ()
) -> list[Request]:
    """Each to be answered greedily."""
    return [Request(question.prompt, max_new_tokens, banned=banned) for question in questions]


# ---------------------------------------------------------------- grades


def check_questions(questions: Sequence[Question], metrics: Sequence[str], schema: Json | None) -> None:
    """Raises InputError if a metric cannot be used: unknown, without the schema it needs, or not met by an expected
    answer itself. Costs no model: call it before anything is computed."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise InputError(f"there is no metric {unknown[0]!r}", where="metrics", fix=f"use {', '.join(METRICS)}")
    if schema is None and "schema_valid" in metrics:
        raise InputError("schema_valid needs a schema", where="metrics", fix="give `schema`, or leave the metric out")
    if schema is not None:
        _check_schema(schema)
    for question in questions:
        for name in metrics:
            if _apply(name, question.expected, question.expected, schema) < 1:
                what = f"the expected answer itself fails {name}: {question.expected[:60]!r}"
                raise InputError(what, where=question.id, fix="correct the row, or leave the metric out")


def grade(
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    task: str,
    metrics: Sequence[str],
    schema: Json | None,
) -> tuple[Measurement, ...]:
    """One Measurement a metric, with a value for every question."""
    return tuple(
        Measurement(
            task=task,
            metric=name,
            ids=tuple(question.id for question in questions),
            values=tuple(_apply(name, a, q.expected, schema) for q, a in zip(questions, answers, strict=True)),
        )
        for name in metrics
    )


def _apply(metric: str, answer: str, expected: str, schema: Json | None) -> float:
    try:
        return METRICS[metric](answer, expected, schema)
    except RecursionError:  # a model that loops on "[" nests deeper than Python can walk
        return 0.0


def samples_of(questions: Sequence[Question], answers: Sequence[str], *, step: int) -> tuple[Sample, ...]:
    """A bad answer is not what is expected."""
    return tuple(
        Sample(step, q.id, q.shown, a, "" if q.negative else q.expected)
        for q, a in zip(questions, answers, strict=True)
    )


# ---------------------------------------------------------------- metrics


def exact_match(answer: str, expected: str, schema: Json | None) -> float:
    """The same text, white space at the ends aside."""
    del schema
    return float(answer.strip() == expected.strip())


def contains(answer: str, expected: str, schema: Json | None) -> float:
    """The expected text stands in the answer, whatever is said around it; by its words, in any case."""
    del schema
    return float(evened(expected) in evened(answer))


def evened(text: str) -> str:
    """Words in small letters with one blank between them, so that "in" does not find a part of a word."""
    return " " + " ".join(re.findall(r"\w+", text.casefold())) + " "


def json_valid(answer: str, expected: str, schema: Json | None) -> float:
    """The whole answer is JSON: no fence, no sentence around it."""
    del expected, schema
    return float(_parse(answer) is not NOT_JSON)


def schema_valid(answer: str, expected: str, schema: Json | None) -> float:
    """The whole answer is JSON that follows the schema. Nothing is fetched for a `$ref`."""
    del expected
    value = _parse(answer)
    if value is NOT_JSON or schema is None:
        return 0.0
    try:
        return float(validator_for(schema)(schema, registry=Registry()).is_valid(value))
    except Unresolvable as error:
        raise InputError(f"the schema refers to {error.ref!r}, which it does not hold", where="schema") from error


def field_f1(answer: str, expected: str, schema: Json | None) -> float:
    """F1 over the (path, value) pairs of the expected and the given JSON; a list's places are part of the path, an
    empty object or list is a value. 0 for an answer that is not JSON; 1 only for the same JSON, key order aside."""
    del schema
    wanted, given = _parse(expected), _parse(answer)
    if wanted is NOT_JSON or given is NOT_JSON:
        return 0.0
    wanted_pairs, given_pairs = set(_fields(wanted)), set(_fields(given))
    return 2 * len(wanted_pairs & given_pairs) / (len(wanted_pairs) + len(given_pairs))


NOT_JSON = object()  # None is JSON


def _parse(text: str) -> Any:
    """The JSON value of a text, or NOT_JSON; strict: Python also reads NaN, which is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str, Any]]:
    """(path, kind, value) of every leaf. The kind keeps true apart from 1, which Python holds to be equal."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, (*path, key))
    elif isinstance(value, list) and value:
        for place, item in enumerate(value):
            yield from _fields(item, (*path, place))
    elif isinstance(value, bool | dict | list):
        yield path, type(value).__name__, str(value)
    else:
        yield path, "", value


def _check_schema(schema: Json) -> None:
    try:
        validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"not a JSON schema: {error.message}", where=f"schema: {error.json_path}") from error


Metric = Callable[[str, str, Json | None], float]
METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "contains": contains,
    "json_valid": json_valid,
    "schema_valid": schema_valid,
    "field_f1": field_f1,
}
