"""The measured half of `advise` as a function, beside those of verbs.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api import ONE_STAGE, AnyPath, Wish, gather
from tunesmith.core.errors import InputError

if TYPE_CHECKING:
    from tunesmith.advise.measured.experiment import Begun, MeasuredAdvice
    from tunesmith.advise.measured.run_arm import Outcome
    from tunesmith.api import Known


def advise_measured(
    recipe: Wish | Known = None,
    *,
    documents: AnyPath | None = None,
    minutes: float = 10.0,
    target: float | None = None,
    metric: str | None = None,
    folder: AnyPath = "runs/advise",
    **changes: Any,
) -> Iterator[Begun | Outcome | MeasuredAdvice]:
    """Whether to fine-tune, measured on `eval_data`: prompts, retrieval over `documents`, a schema that is enforced and
    short trainings, as many as fit into the minutes. What begins, each `Outcome` as it ends, the `MeasuredAdvice` last;
    what is in `folder` already is not done again. `metric` decides, else the first that looks at what answers hold."""
    from tunesmith.advise.measured.experiment import Wanted, advise_measured
    from tunesmith.advise.measured.retrieval import open_passages
    from tunesmith.plan.build import refuse_without_room
    from tunesmith.session.inputs import make_plan

    passages = None if documents is None else open_passages(Path(documents))
    known = gather(recipe, **changes)
    if isinstance(known, tuple):
        raise InputError("one stage is measured, and the recipe has several", where="stage", fix=ONE_STAGE)
    decided = make_plan(known)
    refuse_without_room(decided)
    yield from advise_measured(decided, known, passages, Wanted(minutes, target, metric, Path(folder)))
