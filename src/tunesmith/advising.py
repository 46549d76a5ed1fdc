"""The measured half of `advise` as a function, beside those of verbs.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api import SINGLE_STAGE_FIX, AnyPath, RecipeLike, load_inputs
from tunesmith.core.errors import InputError

if TYPE_CHECKING:
    from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice
    from tunesmith.advise.measured.run_arm import ArmResult
    from tunesmith.api import AnyInputs


def advise_measured(
    recipe: RecipeLike | AnyInputs = None,
    *,
    documents: AnyPath | None = None,
    minutes: float = 10.0,
    target: float | None = None,
    metric: str | None = None,
    folder: AnyPath = "runs/advise",
    **changes: Any,
) -> Iterator[ExperimentStart | ArmResult | MeasuredAdvice]:
    """Whether to fine-tune, measured on `eval_data`: prompts, retrieval over `documents`, a schema
    that is enforced and short trainings, as many as fit into the minutes. What begins, each
    `Outcome` as it ends, the `MeasuredAdvice` last; what is in `folder` already is not done again.
    `metric` decides, else the first that looks at what answers hold."""
    from tunesmith.advise.measured.experiment import ExperimentConfig, advise_measured
    from tunesmith.advise.measured.retrieval import open_passages
    from tunesmith.plan.build import refuse_if_too_large
    from tunesmith.session.inputs import make_plan

    passages = None if documents is None else open_passages(Path(documents))
    inputs = load_inputs(recipe, **changes)
    if isinstance(inputs, tuple):
        raise InputError(
            "one stage is measured, and the recipe has several", where="stage", fix=SINGLE_STAGE_FIX
        )
    plan = make_plan(inputs)
    refuse_if_too_large(plan)
    yield from advise_measured(
        plan, inputs, passages, ExperimentConfig(minutes, target, metric, Path(folder))
    )
