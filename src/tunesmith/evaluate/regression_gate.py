"""Decide whether a model may be released: no metric worse, no more forgetting than allowed.

In: comparisons, a forgetting margin. Out: EvalReport and Gates.
General text passes if the worst end of its interval lies within the margin that the plan set before
training (a non-inferiority test). Any other metric passes unless its interval lies on the worse
side. KL to the base is not gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.run_dir import find_weights_dir, read_run_plan
from tunesmith.core.types import Comparison
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.recipe.fields import Metrics
from tunesmith.recipe.yaml_lines import read_flag


@dataclass(frozen=True)
class Gate:
    """One gate. `bound` is the worst end of the interval of the difference, at most `margin` where
    there is one."""

    name: str
    passed: bool
    bound: float
    margin: float | None
    message: str


@dataclass(frozen=True)
class EvalReport:
    """Scores of a model and its comparisons with the model before training; a base model has only
    scores."""

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...] = ()
    margin: float | None = None  # forgetting that the plan allows, in bits per byte

    @classmethod
    def from_comparisons(cls, comparisons: tuple[Comparison, ...], run: Path | None) -> Self:
        margin = None
        if run is not None:
            margin = read_run_plan(find_weights_dir(run)).config.forgetting_margin
        scores = tuple(comparison.after for comparison in comparisons)
        return cls(scores, comparisons, margin)

    def check_gates(self) -> tuple[Gate, ...]:
        """Return the gates. Raises InputError for a base model, which is compared with nothing."""
        if not self.comparisons:
            fix = "name a run, a checkpoint or an adapter, or compare two models"
            raise InputError("a base model has no before/after to gate", where="--gate", fix=fix)
        return build_gates(self.comparisons, self.margin)


def build_gates(comparisons: Sequence[Comparison], margin: float | None) -> tuple[Gate, ...]:
    """Return a gate per comparison. Raises InputError if there is none to gate."""
    gates: list[Gate] = []
    for comparison in comparisons:
        is_general = comparison.task == GENERAL_TASK
        if is_general and comparison.metric != BITS_PER_BYTE:
            continue
        name = f"{comparison.task} {comparison.metric}"
        low = comparison.low
        high = comparison.high
        change = f"{comparison.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        if is_general and margin is not None:
            message = f"{change} bits per byte, at most {margin:+g}"
            gates.append(Gate(name, high <= margin, high, margin, message))
        else:
            verdict = judge_comparison(comparison)
            bound = low if comparison.higher_is_better else high
            message = f"{change}, n = {comparison.after.n}: {verdict}"
            gates.append(Gate(name, verdict != "worse", bound, None, message))
    if not gates:
        fix = "add test_data or retention_data to the recipe"
        raise InputError("there is no metric to gate", where="--gate", fix=fix)
    return tuple(gates)


def parse_metrics(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    """Parse metrics as in a recipe: a list, or comma-separated text. Raises InputError."""
    if metrics is None:
        return ()
    names = metrics
    if isinstance(metrics, str):
        names = read_flag(metrics if metrics.startswith("[") else f"[{metrics}]")
    try:
        return TypeAdapter(Metrics).validate_python(list(names))
    except (ValidationError, TypeError):
        message = f"invalid list of metrics: {metrics!r:.80}"
        fix = "write --metrics 'chrf, numeric: 0.1'"
        raise InputError(message, where="metrics", fix=fix) from None
