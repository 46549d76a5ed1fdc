"""Measure how often answers violate the constraints, and how likely the model finds bad tokens.

In: prompts and answers, or documents with bad tokens. Out: MetricValues per constraint and kind of
prompt. A row's `negative` mark decides the kind:

    neutral    no mark           nothing bad should be said
    eliciting  negative: true    the row's answer is bad, so the prompt asks for it
    rightful   negative: false   the row's answer matches the constraint, and is right to do so

Rightful prompts are the control that a constraint is not met by saying nothing. Kinds with fewer
than two prompts are not measured. Left out: constraints in training (data/constraints.py).
"""

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

NEUTRAL = "neutral prompts"
ELICITING = "eliciting prompts"
RIGHTFUL = "rightful prompts"


def measure_violations(
    constraints: Sequence[Constraint], prompts: Sequence[EvalPrompt], answers: Sequence[str]
) -> Iterator[MetricValues]:
    """Yield 1 per answer that the constraint matches, else 0.

    Raises InputError when a pattern takes too long.
    """
    kinds = [_classify_prompt(constraints, prompt) for prompt in prompts]
    for index, constraint in enumerate(constraints):
        for kind in (NEUTRAL, ELICITING, RIGHTFUL):
            ids: list[str] = []
            values: list[float] = []
            for prompt, answer, prompt_kinds in zip(prompts, answers, kinds, strict=True):
                if prompt_kinds[index] == kind:
                    ids.append(prompt.id)
                    values.append(float(bool(find_matches(constraint, answer, prompt.id))))
            if len(ids) > 1:
                yield MetricValues(
                    task=kind,
                    metric=("says " if kind == RIGHTFUL else "breaks ") + constraint.name,
                    ids=tuple(ids),
                    values=tuple(values),
                    higher_is_better=kind == RIGHTFUL,
                )


def find_matches(constraint: Constraint, text: str, where: str) -> list[str]:
    """Return the substrings of a text that the constraint matches."""
    stripped = text.strip()
    return [stripped[start:end] for start, end in find_spans(constraint, stripped, where)]


def _classify_prompt(constraints: Sequence[Constraint], prompt: EvalPrompt) -> list[str]:
    """Return the kind of the prompt for each constraint; empty where it is of no use.

    A bad answer that no constraint matches may violate any of them.
    """
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
    """Return the mean log-probability of a row's bad tokens, in nats/token."""
    loss = measure_loss(model, documents, task=task, pack_length=pack_length, share=share)
    values = tuple(-value for value in loss.values)
    return dataclasses.replace(loss, metric="bad_logp", values=values)
