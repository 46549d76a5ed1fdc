"""Held-out questions, answered by the model and graded without a judge.

    Examples -> Questions -> (answers) -> Measurements, one a metric, and Samples to look at

A question is an example up to its last trained turn, exactly as it is served; what that turn holds is the expected
answer. Left out: the metrics themselves (metrics.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import Sample
from tunesmith.core.types import Example, Generation, Json, Request
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.custom_metric import scored, shown
from tunesmith.evaluate.json_metrics import check_schema
from tunesmith.evaluate.metrics import LIKELIHOODS, given_to, graded
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.generation.engine import Allowed, generate
from tunesmith.recipe.fields import own_metric

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
    """Raises InputError if a metric cannot be used: unknown, without what it needs, or not met by an expected answer
    itself. Costs no model: call it before anything is computed."""
    if twice := [metric for metric, count in Counter(map(shown, metrics)).items() if count > 1]:
        raise InputError(f"{twice[0]} stands twice", where="metrics", fix="name it once")
    if schema is not None:
        check_schema(schema)
    for metric in metrics:
        best = _values(metric, questions, [question.expected for question in questions], schema)
        failing = [] if own_metric(metric) else [q for q, value in zip(questions, best, strict=False) if value < 1]
        for question in failing:
            what = f"the expected answer itself fails {metric}: {question.expected[:60]!r}"
            raise InputError(what, where=question.id, fix="correct the row, or leave the metric out")


def grade(
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    task: str,
    metrics: Sequence[str],
    schema: Json | None,
) -> tuple[Measurement, ...]:
    """One Measurement a metric that looks at answers, with a value for every question."""
    ids = tuple(question.id for question in questions)
    return tuple(
        Measurement(task, shown(metric), ids, _values(metric, questions, answers, schema))
        for metric in metrics
        if metric not in LIKELIHOODS
    )


def _values(
    metric: str, questions: Sequence[Question], answers: Sequence[str], schema: Json | None
) -> tuple[float, ...]:
    """Of each answer; nothing for a metric that looks at none."""
    pairs = [(answer, question.expected) for question, answer in zip(questions, answers, strict=True)]
    if own_metric(metric):
        return scored(metric, pairs, [question.id for question in questions])
    given = given_to(metric, schema)
    return () if metric in LIKELIHOODS else tuple(graded(metric, *pair, given) for pair in pairs)


def samples_of(questions: Sequence[Question], answers: Sequence[str], *, step: int) -> tuple[Sample, ...]:
    """A bad answer is not what is expected."""
    return tuple(
        Sample(step, q.id, q.shown, a, "" if q.negative else q.expected)
        for q, a in zip(questions, answers, strict=True)
    )
