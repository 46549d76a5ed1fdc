"""How often answers break the constraints, and how likely the model finds what is bad.

    Questions, answers -> Measurements by constraint and kind of prompt; bad Documents -> their log-probability

A row's mark says what its prompt is for. Neutral prompts have none: nothing bad should be said. Eliciting ones
(`negative: true`) got a bad answer from somebody: they ask for it. Of rightful ones (`negative: false`) the right
answer matches, and so should the trained model's: the control that a constraint is not kept by saying nothing.
Fewer than two prompts of a kind are not measured. Left out: what a constraint does in training (data/never.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tunesmith.core.types import Document
from tunesmith.data.constraints import spans
from tunesmith.evaluate.generate_until import Question
from tunesmith.evaluate.loglikelihood import held_out_loss
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.recipe.fields import Constraint

NEUTRAL, ELICITING, RIGHTFUL = "neutral prompts", "eliciting prompts", "rightful prompts"


def violations(
    constraints: Sequence[Constraint], questions: Sequence[Question], answers: Sequence[str]
) -> Iterator[Measurement]:
    """1 for an answer that the constraint matches, else 0. Raises InputError when a pattern takes too long."""
    kinds = [_kinds(constraints, question) for question in questions]
    for place, constraint in enumerate(constraints):
        for kind in (NEUTRAL, ELICITING, RIGHTFUL):
            found = [(q, a) for q, a, k in zip(questions, answers, kinds, strict=True) if k[place] == kind]
            if len(found) > 1:
                yield Measurement(
                    task=kind,
                    metric=("says " if kind == RIGHTFUL else "breaks ") + constraint.name,
                    ids=tuple(question.id for question, _ in found),
                    values=tuple(float(bool(matched(constraint, a, q.id))) for q, a in found),
                    higher_is_better=kind == RIGHTFUL,
                )


def matched(constraint: Constraint, text: str, where: str) -> list[str]:
    """The pieces of a text that the constraint matches."""
    said = text.strip()
    return [said[start:end] for start, end in spans(constraint, said, where)]


def _kinds(constraints: Sequence[Constraint], question: Question) -> list[str]:
    """What the prompt is for, to each constraint. A bad answer that matches none may be bad in the way of any."""
    if question.negative is None:
        return [NEUTRAL] * len(constraints)
    own = [bool(matched(one, question.expected, question.id)) for one in constraints]
    if question.negative:
        return [ELICITING if mine or not any(own) else "" for mine in own]
    return [RIGHTFUL if mine else NEUTRAL for mine in own]


def bad_logp(
    model: LanguageModel, documents: Sequence[Document], *, task: str, pack_length: int, share: bool = False
) -> Measurement:
    """Mean log-probability of a bad token where it stands, in nats. Items are rows."""
    loss = held_out_loss(model, documents, task=task, pack_length=pack_length, share=share)
    return dataclasses.replace(loss, metric="bad_logp", values=tuple(-value for value in loss.values))
