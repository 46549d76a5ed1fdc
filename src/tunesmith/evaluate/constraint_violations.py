"""How often answers break the constraints, and how likely the model finds what is bad.

    Questions, answers -> Measurements by constraint and kind of prompt; bad Documents -> their log-probability

A row's mark says what its prompt is for. Neutral prompts have none: nothing bad should be said.
Eliciting ones (`negative: true`) got a bad answer from somebody: they ask for it. Of rightful ones
(`negative: false`) the right answer matches, and so should the trained model's: the control that a
constraint is not kept by saying nothing. Fewer than two prompts of a kind are not measured. Left
out: what a constraint does in training (data/never.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tunesmith.core.types import Document
from tunesmith.data.constraints import find_spans
from tunesmith.evaluate.generate_until import EvalPrompt
from tunesmith.evaluate.loglikelihood import measure_loss
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.recipe.fields import Constraint

NEUTRAL, ELICITING, RIGHTFUL = "neutral prompts", "eliciting prompts", "rightful prompts"


def measure_violations(
    constraints: Sequence[Constraint], prompts: Sequence[EvalPrompt], answers: Sequence[str]
) -> Iterator[MetricValues]:
    """1 for an answer that the constraint matches, else 0. Raises InputError when a pattern takes
    too long."""
    kinds = [_classify_prompt(constraints, prompt) for prompt in prompts]
    for index, constraint in enumerate(constraints):
        for kind in (NEUTRAL, ELICITING, RIGHTFUL):
            pairs = [
                (q, a) for q, a, k in zip(prompts, answers, kinds, strict=True) if k[index] == kind
            ]
            if len(pairs) > 1:
                yield MetricValues(
                    task=kind,
                    metric=("says " if kind == RIGHTFUL else "breaks ") + constraint.name,
                    ids=tuple(prompt.id for prompt, _ in pairs),
                    values=tuple(float(bool(find_matches(constraint, a, q.id))) for q, a in pairs),
                    higher_is_better=kind == RIGHTFUL,
                )


def find_matches(constraint: Constraint, text: str, where: str) -> list[str]:
    """The pieces of a text that the constraint matches."""
    stripped = text.strip()
    return [stripped[start:end] for start, end in find_spans(constraint, stripped, where)]


def _classify_prompt(constraints: Sequence[Constraint], prompt: EvalPrompt) -> list[str]:
    """What the prompt is for, to each constraint. A bad answer that matches none may be bad in the
    way of any."""
    if prompt.negative is None:
        return [NEUTRAL] * len(constraints)
    matches = [
        bool(find_matches(constraint, prompt.expected, prompt.id)) for constraint in constraints
    ]
    if prompt.negative:
        return [ELICITING if is_match or not any(matches) else "" for is_match in matches]
    return [RIGHTFUL if is_match else NEUTRAL for is_match in matches]


def measure_bad_logp(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> MetricValues:
    """Mean log-probability of a bad token where it stands, in nats. Items are rows."""
    loss = measure_loss(model, documents, task=task, pack_length=pack_length, share=share)
    return dataclasses.replace(
        loss, metric="bad_logp", values=tuple(-value for value in loss.values)
    )
