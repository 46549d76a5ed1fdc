"""Multiple choice by likelihood: of the answers that a row offers, which one is the model most
likely to give?

    Examples -> Documents, one a choice, the right one first -> a Measurement of 0 and 1

Nothing is generated. A choice is rendered as the answer would be, its end token included, so its
likelihood is that of this answer and no longer one; lengths are not evened out. A row says
`"choices": ["yes", "no"]`; where none does, the choices are the different answers of all rows, as
for labels. Equally likely choices are a wrong answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.metrics import MULTIPLE_CHOICE
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM

MAX_LABELS = 32  # different answers of rows that offer no choices; more are no labels


def build_choices(
    examples: Sequence[Example], renderer: Renderer
) -> dict[str, tuple[Document, ...]]:
    """Row -> its choices. Raises InputError for a row that offers less than two, or not the right
    one."""
    labels = tuple(dict.fromkeys(_get_answer(example).strip() for example in examples))
    if not any(example.choices for example in examples) and not 2 <= len(labels) <= MAX_LABELS:
        message = f"no row has `choices`, and the {len(labels):,} different answers are no labels to choose from"
        fix = f'write "choices": ["one", "another"] into the rows, or leave {MULTIPLE_CHOICE} out'
        raise InputError(message, where=f"metrics: {MULTIPLE_CHOICE}", fix=fix)
    return {
        example.id: _build_documents(example, example.choices or labels, renderer)
        for example in examples
    }


def _build_documents(
    example: Example, choices: Sequence[str], renderer: Renderer
) -> tuple[Document, ...]:
    right = _get_answer(example)
    others = [choice for choice in dict.fromkeys(choices) if choice.strip() != right.strip()]
    if len(others) == len(dict.fromkeys(choices)):
        message = f"the expected answer {right[:60]!r} is none of the row's `choices`"
        raise InputError(message, where=example.id, fix="correct the row")
    if not others:
        raise InputError(
            "the row's `choices` offer nothing else", where=example.id, fix="give at least two"
        )
    return tuple(
        _render_document(_replace_answer(example, choice), renderer) for choice in (right, *others)
    )


def _find_answer_index(example: Example) -> int:
    """The message that holds the expected answer."""
    return max(i for i, weight in enumerate(example.turn_weights) if weight > 0)


def _get_answer(example: Example) -> str:
    return (
        example.messages[_find_answer_index(example)]["content"]
        if example.messages
        else example.text or ""
    )


def _replace_answer(example: Example, choice: str) -> Example:
    """The example up to its answer, which is the choice and alone is a target."""
    plain = dataclasses.replace(example, rejected=None, banned_spans=())
    if not example.messages:
        return dataclasses.replace(plain, text=choice)
    index = _find_answer_index(example)
    messages = (*example.messages[:index], {**example.messages[index], "content": choice})
    return dataclasses.replace(plain, messages=messages, turn_weights=(*[0.0] * index, 1.0))


def _render_document(example: Example, renderer: Renderer) -> Document:
    return renderer.render(example).documents[-1]


def measure_multiple_choice(
    model: PackedCausalLM,
    choices: Mapping[str, Sequence[Document]],
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> MetricValues:
    """1 where the right choice is likelier than any other."""
    documents = [document for row in choices.values() for document in row]
    nats = dict.fromkeys(range(len(documents)), 0.0)
    nats |= {i: nat for i, nat, _ in compute_nll(model, documents, pack_length, share=share)}
    values: list[float] = []
    start = 0
    for row in choices.values():
        right, *others = (nats[i] for i in range(start, start + len(row)))
        values.append(float(right < min(others)))
        start += len(row)
    return MetricValues(task, MULTIPLE_CHOICE, tuple(choices), tuple(values))
