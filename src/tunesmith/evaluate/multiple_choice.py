"""Multiple choice by likelihood: of the answers that a row offers, which one is the model most likely to give?

    Examples -> Documents, one a choice, the right one first -> a Measurement of 0 and 1

Nothing is generated. A choice is rendered as the answer would be, its end token included, so its likelihood is that of
this answer and no longer one; lengths are not evened out. A row says `"choices": ["yes", "no"]`; where none does, the
choices are the different answers of all rows, as for labels. Equally likely choices are a wrong answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.evaluate.metrics import MULTIPLE_CHOICE
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel

MOST_LABELS = 32  # different answers of rows that offer no choices; more are no labels


def choices_of(examples: Sequence[Example], renderer: Renderer) -> dict[str, tuple[Document, ...]]:
    """Row -> its choices. Raises InputError for a row that offers less than two, or not the right one."""
    offered = tuple(dict.fromkeys(_answer(example).strip() for example in examples))
    if not any(example.choices for example in examples) and not 2 <= len(offered) <= MOST_LABELS:
        what = f"no row has `choices`, and the {len(offered):,} different answers are no labels to choose from"
        fix = f'write "choices": ["one", "another"] into the rows, or leave {MULTIPLE_CHOICE} out'
        raise InputError(what, where=f"metrics: {MULTIPLE_CHOICE}", fix=fix)
    return {example.id: _documents(example, example.choices or offered, renderer) for example in examples}


def _documents(example: Example, choices: Sequence[str], renderer: Renderer) -> tuple[Document, ...]:
    right = _answer(example)
    others = [choice for choice in dict.fromkeys(choices) if choice.strip() != right.strip()]
    if len(others) == len(dict.fromkeys(choices)):
        what = f"the expected answer {right[:60]!r} is none of the row's `choices`"
        raise InputError(what, where=example.id, fix="correct the row")
    if not others:
        raise InputError("the row's `choices` offer nothing else", where=example.id, fix="give at least two")
    return tuple(_document(_answering(example, choice), renderer) for choice in (right, *others))


def _asked(example: Example) -> int:
    """The message that holds the expected answer."""
    return max(i for i, weight in enumerate(example.turn_weights) if weight > 0)


def _answer(example: Example) -> str:
    return example.messages[_asked(example)]["content"] if example.messages else example.text or ""


def _answering(example: Example, choice: str) -> Example:
    """The example up to its answer, which is the choice and alone is a target."""
    plain = dataclasses.replace(example, rejected=None, banned=())
    if not example.messages:
        return dataclasses.replace(plain, text=choice)
    place = _asked(example)
    messages = (*example.messages[:place], {**example.messages[place], "content": choice})
    return dataclasses.replace(plain, messages=messages, turn_weights=(*[0.0] * place, 1.0))


def _document(example: Example, renderer: Renderer) -> Document:
    return renderer.documents(example).documents[-1]


def multiple_choice(
    model: LanguageModel,
    choices: Mapping[str, Sequence[Document]],
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> Measurement:
    """1 where the right choice is likelier than any other."""
    documents = [document for row in choices.values() for document in row]
    nats = dict.fromkeys(range(len(documents)), 0.0)
    nats |= {i: nat for i, nat, _ in negative_log_likelihoods(model, documents, pack_length, share=share)}
    values: list[float] = []
    start = 0
    for row in choices.values():
        right, *others = (nats[i] for i in range(start, start + len(row)))
        values.append(float(right < min(others)))
        start += len(row)
    return Measurement(task, MULTIPLE_CHOICE, tuple(choices), tuple(values))
