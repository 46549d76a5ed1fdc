"""Generate answers to held-out prompts, and grade them without a judge.

    Examples -> EvalPrompts -> (answers) -> MetricValues per metric, and GenerationSamples

A prompt is an example up to its last trained turn, exactly as it is served; the content of that
turn is the expected answer. Left out: the metrics themselves (metrics.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GenerationSample
from tunesmith.core.types import Example, GenerationOutput, GenerationRequest, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.json_schema import make_validator
from tunesmith.evaluate.class_scores import compute_macro_f1_values, pair_labels
from tunesmith.evaluate.custom_metric import format_metric_name, score_answers
from tunesmith.evaluate.metrics import LIKELIHOODS, MACRO_F1, grade_answer, parse_metric_arg
from tunesmith.evaluate.results import MetricValues
from tunesmith.plan.memory import compute_answer_limit
from tunesmith.recipe.fields import parse_custom_metric

if TYPE_CHECKING:
    from tunesmith.model.causal_lm import PackedCausalLM
    from tunesmith.model.generation.grammar import Grammar

MAX_CONTEXT_CHARS = 4_000

# ---------------------------------------------------------------- prompts and answers


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out prompt: its tokens, the last message as text, and the expected answer.

    negative: the row's mark of its answer; a bad answer is what the prompt elicits and should not
    get.
    """

    id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    expected: str
    num_expected_tokens: int
    negative: bool | Literal["whole"] | None = None
    context: str = ""  # messages before the last one, for the reader


def build_prompts(examples: Sequence[Example], renderer: Renderer) -> tuple[EvalPrompt, ...]:
    """Return the prompts. Raises InputError with the row's id for an example without a prompt."""
    return tuple(_build_prompt(example, renderer) for example in examples)


def _build_prompt(example: Example, renderer: Renderer) -> EvalPrompt:
    plain_example = dataclasses.replace(example, rejected=None, banned_spans=())
    documents = renderer.render(plain_example).documents
    if not documents or (example.text is not None and not example.prompt):
        fix = "give rows with messages, or with a prompt and a completion"
        raise InputError("the row has no prompt", where=example.id, fix=fix)
    tokens_L = documents[-1].tokens_L
    weights_L = documents[-1].weights_L
    # The answer is the last run of supervised tokens.
    end = int(np.flatnonzero(weights_L)[-1]) + 1
    start = int(np.flatnonzero(weights_L[:end] == 0)[-1]) + 1
    answer = [token for token in tokens_L[start:end].tolist() if token not in renderer.end_ids]
    prompt_text = example.prompt or ""
    context = ""
    if example.messages:
        trained_turns = [i for i, weight in enumerate(example.turn_weights) if weight > 0]
        last = max(trained_turns, default=0) - 1
        prompt_text = example.messages[last]["content"]
        context = _format_messages(example.messages[:last])
    return EvalPrompt(
        id=example.id,
        prompt_ids=tuple(tokens_L[:start].tolist()),
        prompt_text=prompt_text,
        expected=renderer.decode(answer),
        num_expected_tokens=end - start,
        negative=True if example.label is False else example.negative,
        context=context,
    )


def _format_messages(messages: Sequence[Json]) -> str:
    """Return messages as text, each after its role; cut, as every answer keeps it."""
    parts = [f"{message['role']}: {message.get('content') or ''}" for message in messages]
    text = "\n\n".join(parts)
    return text if len(text) <= MAX_CONTEXT_CHARS else f"{text[:MAX_CONTEXT_CHARS]} …"


def compute_max_new_tokens(prompts: Sequence[EvalPrompt], *, needs_end: bool) -> int:
    """Return the limit of every answer, by the longest expected one (plan/memory.py)."""
    longest = max(prompt.num_expected_tokens for prompt in prompts)
    return compute_answer_limit(longest, needs_end=needs_end)


def iter_answers(
    model: PackedCausalLM,
    prompts: Sequence[EvalPrompt],
    renderer: Renderer,
    *,
    max_new_tokens: int,
    grammar: Grammar | None = None,
) -> Iterator[tuple[int, GenerationOutput]]:
    """Yield (prompt index, greedy answer) as they finish. Every answer follows `grammar`."""
    from tunesmith.evaluate.shared_items import generate_shared  # loads torch: not for `verify`

    requests = build_requests(prompts, max_new_tokens)
    return generate_shared(
        model,
        requests,
        decode=renderer.decode,
        end_ids=renderer.end_ids,
        grammar=grammar,
    )


def build_requests(
    prompts: Sequence[EvalPrompt],
    max_new_tokens: int,
    bad_words_ids: tuple[tuple[int, ...], ...] = (),
) -> list[GenerationRequest]:
    """Return a request for greedy decoding per prompt."""
    return [
        GenerationRequest(prompt.prompt_ids, max_new_tokens, bad_words_ids=bad_words_ids)
        for prompt in prompts
    ]


# ---------------------------------------------------------------- grades


def check_prompts(
    prompts: Sequence[EvalPrompt], metrics: Sequence[str], schema: Json | None
) -> None:
    """Check that every metric can be used, before anything is computed.

    Raises InputError for a metric that is unknown, named twice or incomplete, and for an expected
    answer that fails a metric itself.
    """
    counts = Counter(format_metric_name(metric) for metric in metrics)
    for name, count in counts.items():
        if count > 1:
            raise InputError(f"duplicate metric {name}", where="metrics", fix="name it once")
    if schema is not None:
        make_validator(schema)
    expected_answers = [prompt.expected for prompt in prompts]
    for metric in metrics:
        values = _compute_values(metric, prompts, expected_answers, schema)
        if parse_custom_metric(metric) or not values:
            continue
        for prompt, value in zip(prompts, values, strict=True):
            if value < 1:
                message = f"the expected answer itself fails {metric}: {prompt.expected[:60]!r}"
                fix = "correct the row, or leave the metric out"
                raise InputError(message, where=prompt.id, fix=fix)


def apply_metrics(
    prompts: Sequence[EvalPrompt],
    answers: Sequence[str],
    *,
    task: str,
    metrics: Sequence[str],
    schema: Json | None,
) -> tuple[MetricValues, ...]:
    """Return the values of each metric that grades answers."""
    ids = tuple(prompt.id for prompt in prompts)
    measurements: list[MetricValues] = []
    for metric in metrics:
        if metric == MACRO_F1:
            classes = pair_labels([prompt.expected for prompt in prompts], answers)
            values = compute_macro_f1_values(classes)
            measurements.append(MetricValues(task, metric, ids, values, classes=classes))
        elif metric not in LIKELIHOODS:
            values = _compute_values(metric, prompts, answers, schema)
            measurements.append(MetricValues(task, format_metric_name(metric), ids, values))
    return tuple(measurements)


def _compute_values(
    metric: str, prompts: Sequence[EvalPrompt], answers: Sequence[str], schema: Json | None
) -> tuple[float, ...]:
    """Return the value of each answer; empty for a metric that grades no single one."""
    pairs = [(answer, prompt.expected) for prompt, answer in zip(prompts, answers, strict=True)]
    if parse_custom_metric(metric):
        return score_answers(metric, pairs, [prompt.id for prompt in prompts])
    arg = parse_metric_arg(metric, schema)
    if metric in (MACRO_F1, *LIKELIHOODS):
        return ()
    return tuple(grade_answer(metric, answer, expected, arg) for answer, expected in pairs)


def build_samples(
    prompts: Sequence[EvalPrompt], answers: Sequence[str], *, step: int
) -> tuple[GenerationSample, ...]:
    """Return the answers as samples; a row with a bad answer has no expected one."""
    samples: list[GenerationSample] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = "" if prompt.negative else prompt.expected
        sample = GenerationSample(
            step, prompt.id, prompt.prompt_text, answer, expected, context=prompt.context
        )
        samples.append(sample)
    return tuple(samples)
