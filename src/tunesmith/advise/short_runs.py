"""Short trainings from the same start, compared on the same held-out rows.

    runs = ShortRuns(plan, inputs)                        loads the model once
    runs.measure_start()                                  the untrained model
    runs.train(name, config, load_documents, steps)       -> ShortRun
    build_table(plan, untrained, trained, reference)      -> ShortRunTable

`tune lr` trains at several rates (lr_finder.py), `data curate --ablate` on several sets of rows
(data_ablation.py). They are no `tunesmith train` processes: each would load the model and prove
masks and packing again, which takes longer than its few steps. `test_data` is not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.types import Comparison, Document, Plan, PlanConfig, PlanValue
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.measure import measure_eval_loss
from tunesmith.evaluate.results import (
    MetricValues,
    average_measurements,
    compare_measurements,
    compute_score,
)
from tunesmith.evaluate.seed_noise import SeedSpread, add_seed_noise, compute_spread
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import open_session
from tunesmith.train.loop import TrainingLoop

HELD_OUT_TOKENS = 16_000


@dataclass(frozen=True, eq=False)
class ShortRun:
    """One training; without a name, the untrained model. `problem` says how it collapsed."""

    name: str
    held_out: MetricValues | None  # None if the weights are unusable
    problem: str = ""
    seed: int = 0
    rows: int = 0  # that it was trained on, where runs differ in them
    tokens: int = 0  # supervised

    @property
    def loss(self) -> float:
        return math.inf if self.held_out is None else compute_score(self.held_out).value


@dataclass(frozen=True)
class ShortRunRow:
    """The runs of one name, over all seeds."""

    name: str
    rows: int
    tokens: int  # of a run, on average
    loss: float | None
    low: float | None
    high: float | None
    comparison: Comparison | None  # before: the reference, after: this one
    seed_differences: tuple[float, ...]
    problem: str

    @property
    def verdict(self) -> str:
        """Compare with the reference: better, worse, or no difference shown."""
        return "" if self.comparison is None else judge_comparison(self.comparison)


@dataclass(frozen=True)
class ShortRunTable:
    metric: str
    steps: int
    batch_size: int | None
    seeds: int
    items: int  # held-out rows
    base_loss: float  # before any training
    reference: str | None  # the run that the others are compared with
    rows: tuple[ShortRunRow, ...]
    notes: tuple[str, ...] = ()


def select_held_out(plan: Plan, inputs: RunInputs) -> EvalItems:
    """Return the first held-out rows, without metrics, since no answers are generated.

    Raises InputError if there are none."""
    no_metrics = PlanValue((), "rule", "no answers are graded")
    items = build_eval_items(plan.with_settings(metrics=no_metrics), inputs)
    if not items.has_training_eval:
        message = "no held-out rows: test_data is reserved for the final result"
        raise InputError(message, where="eval_data", fix="set eval_data, or --eval-split 0.1")
    tokens = end = 0
    while end < len(items.eval_documents) and tokens < HELD_OUT_TOKENS:
        tokens += len(items.eval_documents[end])
        end += 1
    return dataclasses.replace(items, eval_documents=items.eval_documents[:end])


class ShortRuns:
    """A model, the weights that every run starts from, and the held-out rows."""

    def __init__(self, plan: Plan, inputs: RunInputs) -> None:
        self._items = select_held_out(plan, inputs)
        self.session = open_session(plan, inputs, with_samples=False)
        self._start = copy_weights(self.session.model.network)

    def measure_start(self) -> ShortRun:
        return ShortRun("", measure_eval_loss(self.session, self._items))

    def train(
        self,
        name: str,
        config: PlanConfig,
        load_documents: Callable[[int], Sequence[Document]],
        steps: int,
    ) -> ShortRun:
        """Train from the start, and measure the held-out loss."""
        model = self.session.model
        restore_weights(model.network, self._start)
        warmup_steps = steps // 10
        training = TrainingLoop(
            model, load_documents, config, steps=steps, warmup_steps=warmup_steps
        )
        tokens = 0
        problem = ""
        try:
            for event in training:
                if isinstance(event, TrainStep):
                    tokens += event.supervised_tokens
                elif isinstance(event, CheckResult) and event.kind == "non-finite":
                    problem = f"non-finite loss or gradient at step {event.step}"
        except GateError:
            return ShortRun(name, None, "non-finite loss or gradient", tokens=tokens)
        held_out = measure_eval_loss(self.session, self._items)
        if not all(map(math.isfinite, held_out.values)):
            return ShortRun(name, None, problem or "non-finite held-out loss", tokens=tokens)
        return ShortRun(name, held_out, problem, tokens=tokens)


def build_table(
    plan: Plan,
    untrained: ShortRun,
    trained: Sequence[ShortRun],
    reference: str | None,
    steps: int,
    notes: Sequence[str] = (),
) -> ShortRunTable:
    """Compare the runs of each name with those of the reference, paired by held-out row."""
    assert untrained.held_out is not None
    base_score = compute_score(untrained.held_out)
    by_name: dict[str, list[ShortRun]] = {}
    for run in trained:
        by_name.setdefault(run.name, []).append(run)
    reference_runs = by_name.get(reference or "", [])
    losses: list[list[float]] = []
    for runs in by_name.values():
        losses.append([run.loss for run in runs if run.held_out])
    spread = compute_spread(losses)
    return ShortRunTable(
        metric=untrained.held_out.metric,
        steps=steps,
        batch_size=plan.config.batch_size,
        seeds=max(map(len, by_name.values())),
        items=base_score.n,
        base_loss=base_score.value,
        reference=reference,
        rows=tuple(_build_row(runs, reference_runs, spread) for runs in by_name.values()),
        notes=tuple(notes),
    )


def _build_row(
    runs: Sequence[ShortRun], reference_runs: Sequence[ShortRun], spread: SeedSpread | None
) -> ShortRunRow:
    row = ShortRunRow(
        name=runs[0].name,
        rows=runs[0].rows,
        tokens=round(sum(run.tokens for run in runs) / len(runs)),
        loss=None,
        low=None,
        high=None,
        comparison=None,
        seed_differences=(),
        problem=runs[0].problem,
    )
    measured = _list_measured(runs)
    if not measured:
        return row
    mean = average_measurements(measured)
    score = compute_score(mean)
    row = dataclasses.replace(row, loss=score.value, low=score.low, high=score.high)
    if row.problem or not reference_runs or runs[0] is reference_runs[0]:
        return row
    reference = _list_measured(reference_runs)
    by_seed = [compare_measurements(*pair) for pair in zip(reference, measured, strict=True)]
    differences = tuple(comparison.difference for comparison in by_seed)
    comparison = compare_measurements(average_measurements(reference), mean)
    comparison = add_seed_noise(comparison, spread, (len(reference), len(measured)))
    return dataclasses.replace(row, comparison=comparison, seed_differences=differences)


def _list_measured(runs: Sequence[ShortRun]) -> list[MetricValues]:
    return [run.held_out for run in runs if run.held_out is not None]
