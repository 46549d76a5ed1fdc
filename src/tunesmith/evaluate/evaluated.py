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
from tunesmith.core.run_dir import find_weights_dir, read_run_plan
from tunesmith.core.types import Comparison
from tunesmith.evaluate.regression_gate import Gate, build_gates
from tunesmith.recipe.fields import Metrics
from tunesmith.recipe.yaml_lines import read_flag

FORGETTING_MARGIN = "forgetting_margin"  # of the plan: bits per byte of general text


@dataclass(frozen=True)
class EvalReport:
    """Scores of the model, and how it differs from what it began with; a model alone has no
    comparisons."""

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...] = ()
    margin: float | None = None  # what the plan allows to be forgotten

    @classmethod
    def from_comparisons(cls, comparisons: tuple[Comparison, ...], run: Path | None) -> Self:
        margin = None
        if run is not None:
            plan = read_run_plan(find_weights_dir(run))
            margin = plan.config.forgetting_margin
        return cls(tuple(comparison.after for comparison in comparisons), comparisons, margin)

    def check_gates(self) -> tuple[Gate, ...]:
        """Raises InputError for a model alone, which is worse than nothing."""
        if not self.comparisons:
            fix = "name a run, a checkpoint or an adapter, or compare two models"
            raise InputError("a model alone is compared with nothing", where="--gate", fix=fix)
        return build_gates(self.comparisons, self.margin)


def parse_metrics(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    """Metrics as a recipe has them: a list, or one text with commas between them. Raises InputError
    for others."""
    names = (
        read_flag(metrics if metrics.startswith("[") else f"[{metrics}]")
        if isinstance(metrics, str)
        else metrics
    )
    try:
        return () if names is None else TypeAdapter(Metrics).validate_python(list(names))
    except (ValidationError, TypeError):
        fix = "write --metrics 'chrf, numeric: 0.1'"
        raise InputError(
            f"not a list of metrics: {metrics!r:.80}", where="metrics", fix=fix
        ) from None
