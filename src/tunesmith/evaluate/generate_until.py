"""Held-out questions, answered by the model and graded without a judge.

    Examples -> Questions -> (answers) -> Measurements, one a metric, and Samples to look at

A question is an example up to its last trained turn, exactly as it is served; what that turn holds
is the expected answer. Left out: the metrics themselves (metrics.py)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GenerationSample
from tunesmith.core.types import Example, GenerationOutput, GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.custom_metric import format_metric_name, score_answers
from tunesmith.evaluate.json_metrics import check_schema
from tunesmith.evaluate.metrics import LIKELIHOODS, grade_answer, parse_metric_arg
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import AllowedTokensFn, generate
from tunesmith.recipe.fields import parse_custom_metric

# ---------------------------------------------------------------- questions and answers


@dataclass(frozen=True)
class EvalPrompt:
    """`prompt` is what the model is given, `shown` the part of it that people want to see.
    `negative`: what the row says of its answer; a bad one is what the prompt asked for and should
    not get."""

    id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    expected: str
    num_expected_tokens: int
    negative: bool | Literal["whole"] | None = None


def build_prompts(examples: Sequence[Example], renderer: Renderer) -> tuple[EvalPrompt, ...]:
    """Raises InputError with the row's id for an example that asks nothing."""
    return tuple(_build_prompt(example, renderer) for example in examples)


def _build_prompt(example: Example, renderer: Renderer) -> EvalPrompt:
    documents = renderer.render(
        dataclasses.replace(example, rejected=None, banned_spans=())
    ).documents
    if not documents or (example.text is not None and not example.prompt):
        fix = "give rows with messages, or with a prompt and a completion"
        raise InputError("the row asks nothing", where=example.id, fix=fix)
    tokens, weights = documents[-1].tokens_L, documents[-1].weights_L
    (targets,) = np.nonzero(weights)
    end = int(targets[-1]) + 1
    untrained = np.flatnonzero(weights[:end] == 0)
    begin = int(untrained[-1]) + 1
    answer = [token for token in tokens[begin:end].tolist() if token not in renderer.end_ids]
    target_index = max(
        (i for i, weight in enumerate(example.turn_weights) if weight > 0), default=0
    )
    prompt_text = (
        example.messages[target_index - 1]["content"] if example.messages else example.prompt or ""
    )
    expected = renderer.decode(answer)
    return EvalPrompt(
        example.id,
        tuple(tokens[:begin].tolist()),
        prompt_text,
        expected,
        end - begin,
        example.negative,
    )


def compute_max_new_tokens(prompts: Sequence[EvalPrompt]) -> int:
    """Room for an answer: half as much again as the longest expected one. Who needs more is wrong
    anyway."""
    return math.ceil(1.5 * max(prompt.num_expected_tokens for prompt in prompts)) + 16


def iter_answers(
    model: PackedCausalLM,
    prompts: Sequence[EvalPrompt],
    renderer: Renderer,
    *,
    max_new_tokens: int,
    banned: tuple[tuple[int, ...], ...] = (),
    allowed: AllowedTokensFn | None = None,
) -> Iterator[tuple[int, GenerationOutput]]:
    """(index of the question, greedy answer), as they finish. `banned`: token sequences that no
    answer may hold; `allowed`: a grammar that every answer follows."""
    requests = build_requests(prompts, max_new_tokens, banned)
    return generate(
        model, requests, decode=renderer.decode, end_ids=renderer.end_ids, allowed_tokens_fn=allowed
    )


def build_requests(
    prompts: Sequence[EvalPrompt], max_new_tokens: int, banned: tuple[tuple[int, ...], ...] = ()
) -> list[GenerationRequest]:
    """Each to be answered greedily."""
    return [
        GenerationRequest(prompt.prompt_ids, max_new_tokens, bad_words_ids=banned)
        for prompt in prompts
    ]


# ---------------------------------------------------------------- grades


def check_prompts(
    prompts: Sequence[EvalPrompt], metrics: Sequence[str], schema: Json | None
) -> None:
    """Raises InputError if a metric cannot be used: unknown, without what it needs, or not met by
    an expected answer itself. Costs no model: call it before anything is computed."""
    if duplicates := [
        metric for metric, count in Counter(map(format_metric_name, metrics)).items() if count > 1
    ]:
        raise InputError(f"{duplicates[0]} stands twice", where="metrics", fix="name it once")
    if schema is not None:
        check_schema(schema)
    for metric in metrics:
        expected_scores = _compute_values(
            metric, prompts, [prompt.expected for prompt in prompts], schema
        )
        failing = (
            []
            if parse_custom_metric(metric)
            else [q for q, value in zip(prompts, expected_scores, strict=False) if value < 1]
        )
        for prompt in failing:
            message = f"the expected answer itself fails {metric}: {prompt.expected[:60]!r}"
            raise InputError(
                message, where=prompt.id, fix="correct the row, or leave the metric out"
            )


def apply_metrics(
    prompts: Sequence[EvalPrompt],
    answers: Sequence[str],
    *,
    task: str,
    metrics: Sequence[str],
    schema: Json | None,
) -> tuple[MetricValues, ...]:
    """One Measurement a metric that looks at answers, with a value for every question."""
    ids = tuple(prompt.id for prompt in prompts)
    return tuple(
        MetricValues(
            task, format_metric_name(metric), ids, _compute_values(metric, prompts, answers, schema)
        )
        for metric in metrics
        if metric not in LIKELIHOODS
    )


def _compute_values(
    metric: str, prompts: Sequence[EvalPrompt], answers: Sequence[str], schema: Json | None
) -> tuple[float, ...]:
    """Of each answer; nothing for a metric that looks at none."""
    pairs = [(answer, prompt.expected) for prompt, answer in zip(prompts, answers, strict=True)]
    if parse_custom_metric(metric):
        return score_answers(metric, pairs, [prompt.id for prompt in prompts])
    arg = parse_metric_arg(metric, schema)
    return (
        () if metric in LIKELIHOODS else tuple(grade_answer(metric, *pair, arg) for pair in pairs)
    )


def build_samples(
    prompts: Sequence[EvalPrompt], answers: Sequence[str], *, step: int
) -> tuple[GenerationSample, ...]:
    """A bad answer is not what is expected."""
    return tuple(
        GenerationSample(step, q.id, q.prompt_text, a, "" if q.negative else q.expected)
        for q, a in zip(prompts, answers, strict=True)
    )
