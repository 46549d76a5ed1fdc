"""What measuring came to, and whether it may be released.

Comparisons and the run that they are of -> Evaluated -> Gates
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.core.run_dir import plan_in, trained_in
from tunesmith.core.types import Comparison
from tunesmith.evaluate.regression_gate import Gate, gates
from tunesmith.recipe.fields import Metrics
from tunesmith.recipe.yaml_lines import read_flag

MARGIN = "forgetting_margin"  # of the plan: bits per byte of general text


@dataclass(frozen=True)
class Evaluated:
    """Scores of the model, and how it differs from what it began with; a model alone has no comparisons."""

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...] = ()
    margin: float | None = None  # what the plan allows to be forgotten

    @classmethod
    def of(cls, comparisons: tuple[Comparison, ...], run: Path | None) -> Self:
        margin = None
        if run is not None:
            plan = plan_in(trained_in(run))
            margin = plan[MARGIN] if MARGIN in plan.choices else None
        return cls(tuple(one.after for one in comparisons), comparisons, margin)

    def gates(self) -> tuple[Gate, ...]:
        """Raises InputError for a model alone, which is worse than nothing."""
        if not self.comparisons:
            fix = "name a run, a checkpoint or an adapter, or compare two models"
            raise InputError("a model alone is compared with nothing", where="--gate", fix=fix)
        return gates(self.comparisons, self.margin)


def metrics_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Metrics as a recipe has them: a list, or one text with commas between them. Raises InputError for others."""
    written = read_flag(given if given.startswith("[") else f"[{given}]") if isinstance(given, str) else given
    try:
        return () if written is None else TypeAdapter(Metrics).validate_python(list(written))
    except (ValidationError, TypeError):
        fix = "write --metrics 'chrf, numeric: 0.1'"
        raise InputError(f"not a list of metrics: {given!r:.80}", where="metrics", fix=fix) from None
