"""Evaluate multiple choice by likelihood: is the correct answer the most likely of the choices?

    Examples -> Documents, one per choice, the correct one first -> MetricValues of 0 and 1

Nothing is generated. A choice is rendered like the answer, EOS included, so its likelihood is
that of exactly this answer; lengths are not normalized. A row has `"choices": ["yes", "no"]`; where
no row has, the choices are the labels of the training rows (data/labels.py) or else the distinct
answers of all rows. A tie counts as wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_count
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.labels import MAX_LABELS
from tunesmith.data.sampler import permute_rows
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.metrics import MULTIPLE_CHOICE
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM

MAX_DOCUMENTS = 4_000  # of rows and their labels; of more, random rows are scored


def build_choices(
    examples: Sequence[Example], renderer: Renderer, training_labels: Collection[str] = ()
) -> dict[str, tuple[Document, ...]]:
    """Return row id -> a document per choice, the correct one first.

    Raises InputError for a row with fewer than two choices, or without the correct one.
    """
    answers = {_get_answer(example).strip(): None for example in examples}
    labels = tuple(training_labels or answers)
    has_choices = any(example.choices for example in examples)
    if not has_choices and not 2 <= len(labels) <= MAX_LABELS:
        count = format_count(len(labels), "distinct answer")
        message = f"no row has `choices`, and {count} cannot be labels"
        fix = f'add "choices": ["yes", "no"] to the rows, or leave {MULTIPLE_CHOICE} out'
        raise InputError(message, where=f"metrics: {MULTIPLE_CHOICE}", fix=fix)
    if not has_choices:
        scored = permute_rows(0, 0, len(examples))[: MAX_DOCUMENTS // len(labels)]
        examples = [examples[row] for row in sorted(scored.tolist())]
    return {
        example.id: _build_documents(example, example.choices or labels, renderer)
        for example in examples
    }


def _build_documents(
    example: Example, choices: Sequence[str], renderer: Renderer
) -> tuple[Document, ...]:
    correct = _get_answer(example)
    label = correct.strip()
    distinct = dict.fromkeys(choices)
    others = [choice for choice in distinct if choice.strip() != label]
    if not example.choices:  # labels are without the white space that answers may begin with
        others = [correct.replace(label, choice) for choice in others]
    elif len(others) == len(distinct):
        message = f"the expected answer {correct[:60]!r} is not among the row's `choices`"
        raise InputError(message, where=example.id, fix="correct the row")
    if not others:
        message = "the row's `choices` are all the same"
        raise InputError(message, where=example.id, fix="give at least two")
    documents: list[Document] = []
    for choice in (correct, *others):
        rendered = renderer.render(_replace_answer(example, choice))
        documents.append(rendered.documents[-1])
    return tuple(documents)


def _find_answer_index(example: Example) -> int:
    """Return the index of the message with the expected answer."""
    return max(i for i, weight in enumerate(example.turn_weights) if weight > 0)


def _get_answer(example: Example) -> str:
    if not example.messages:
        return example.text or ""
    return example.messages[_find_answer_index(example)]["content"]


def _replace_answer(example: Example, choice: str) -> Example:
    """Return the example up to its answer, with the choice as the answer and only target."""
    plain = dataclasses.replace(example, rejected=None, banned_spans=())
    if not example.messages:
        return dataclasses.replace(plain, text=choice)
    index = _find_answer_index(example)
    messages = (*example.messages[:index], {**example.messages[index], "content": choice})
    return dataclasses.replace(plain, messages=messages, turn_weights=(*[0.0] * index, 1.0))


def measure_multiple_choice(
    model: PackedCausalLM,
    choices: Mapping[str, Sequence[Document]],
    *,
    task: str,
    pack_length: int,
    share: bool = True,
) -> MetricValues:
    """Return 1 per row if the correct choice is more likely than any other, else 0. What choices
    of a row begin with is computed once."""
    documents = [document for row in choices.values() for document in row]
    nats = dict.fromkeys(range(len(documents)), 0.0)
    nats |= {i: nat for i, nat, _ in compute_nll(model, documents, pack_length, share=share)}
    values: list[float] = []
    start = 0
    for row in choices.values():
        correct, *others = [nats[i] for i in range(start, start + len(row))]
        values.append(float(correct < min(others)))
        start += len(row)
    return MetricValues(task, MULTIPLE_CHOICE, tuple(choices), tuple(values))
