"""Test whether the selected rows train better: short runs on each subset from the same start.

    plan, inputs, the folder of `data curate` -> train_subsets -> SubsetRuns
    summarize_ablation(plan, runs, steps) -> AblationResult

The selected rows, random ones and the longest, equally many, and all rows: one base model, equally
many steps and rows per step, with the settings of the plan. A second seed draws other random rows
and another order; values of a held-out row are then means over the seeds. `test_data` is not read,
and there is no rehearsal. Intervals are over held-out rows; the differences by seed are reported
next to them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tunesmith.advise.curate import SCORES_FILE, SELECTED
from tunesmith.advise.lr_finder import limit_items, select_eval_items
from tunesmith.core.atomic import read_manifest
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import TrainStep
from tunesmith.core.json_io import describe_json_error, parse_as
from tunesmith.core.types import Comparison, Document, Plan, require
from tunesmith.data.sampler import StepSampler
from tunesmith.data.selection import ROLE, sample_rows
from tunesmith.evaluate.items import EvalItems
from tunesmith.evaluate.measure import measure_eval_loss
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.plan.build import refuse_if_too_large
from tunesmith.session.inputs import RunInputs, make_plan
from tunesmith.session.session import Session, open_session
from tunesmith.train.loop import TrainingLoop

STEPS = 30
HELD_OUT_TOKENS = 16_000
ALL_ROWS = "all"
AGAIN_FIX = "run `tunesmith data curate` again"
_FileName = Literal["selected", "random", "longest"]


@dataclass(frozen=True)
class _ScoreLine:
    """Hold what is read of a line of scores.jsonl."""

    id: str
    files: tuple[_FileName, ...]
    perplexity: float | None


@dataclass(frozen=True, eq=False)
class SubsetRun:
    """One short run; without a name, the untrained model."""

    name: str
    seed: int
    rows: int
    tokens: int  # supervised
    held_out: MetricValues


@dataclass(frozen=True)
class SubsetArm:
    """One subset, over all seeds."""

    name: str
    rows: int
    tokens: int  # of a run
    loss: float
    low: float
    high: float
    comparison: Comparison | None  # before: this subset, after: the selection, whose own is None
    seed_differences: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Compare the selection with this subset: better, worse, or no difference shown."""
        return "" if self.comparison is None else judge_comparison(self.comparison)


@dataclass(frozen=True)
class AblationResult:
    steps: int
    batch_size: int
    seeds: int
    items: int  # held-out rows
    metric: str
    base_loss: float  # before any training
    arms: tuple[SubsetArm, ...]


def train_subsets(
    plan: Plan, inputs: RunInputs, folder: Path, *, steps: int = STEPS, seeds: int = 1
) -> Iterator[SubsetRun]:
    """Yield the untrained model, then every subset with every seed.

    Raises InputError without held-out rows, and for a folder made from other rows.
    """
    items = select_held_out_items(plan, inputs)
    subsets = read_subsets(inputs, folder)
    session = open_session(plan, inputs, with_samples=False)
    start_weights = copy_weights(session.model.network)
    yield SubsetRun("", 0, 0, 0, measure_eval_loss(session, items))
    for seed in range(plan.config.seed, plan.config.seed + seeds):
        for name, rows in subsets.items():
            if name == "random" and seed > plan.config.seed:
                rows = sample_rows(subsets[ALL_ROWS], len(rows), seed)
            restore_weights(session.model.network, start_weights)
            training = TrainingLoop(
                session.model,
                _make_document_loader(session, rows, steps, seed),
                plan.config,
                steps=steps,
                warmup_steps=steps // 10,
            )
            tokens = _train_subset(training, name)
            yield SubsetRun(name, seed, len(rows), tokens, measure_eval_loss(session, items))


def plan_ablation(inputs: RunInputs) -> Plan:
    """Plan the short runs, raising what they would before any row is scored."""
    plan = make_plan(inputs)
    select_held_out_items(plan, inputs)
    refuse_if_too_large(plan)
    return plan


def select_held_out_items(plan: Plan, inputs: RunInputs) -> EvalItems:
    """Raises InputError without held-out rows."""
    items = select_eval_items(plan, inputs)
    if not items.eval_documents:
        message = "no held-out rows: test_data is reserved for the final result"
        fix = "set eval_data, or --eval-split 0.1"
        raise InputError(message, where="data curate --ablate", fix=fix)
    return limit_items(items, HELD_OUT_TOKENS)


def read_subsets(inputs: RunInputs, folder: Path) -> dict[str, np.ndarray]:
    """Return the trainable rows of each file that `data curate` wrote, and of all data."""
    data = inputs.datasets[ROLE]
    if read_manifest(folder).get("source") != data.fingerprint:
        message = "the folder was made from other rows"
        raise InputError(message, where=str(folder), fix=AGAIN_FIX)
    subsets: dict[str, list[int]] = {name: [] for name in (*get_args(_FileName), ALL_ROWS)}
    rows_by_id = {data.get_id(row): row for row in range(len(data))}
    for where, line in _iter_score_lines(folder / SCORES_FILE):
        row = rows_by_id.get(line.id)
        if row is None:
            raise InputError(f"{line.id:.80} is not in the data", where=where, fix=AGAIN_FIX)
        for name in line.files:
            subsets[name].append(row)
        if line.perplexity is not None:
            subsets[ALL_ROWS].append(row)
    return {name: np.array(rows, dtype=np.int64) for name, rows in subsets.items()}


def _iter_score_lines(file: Path) -> Iterator[tuple[str, _ScoreLine]]:
    """Yield (file:line, its values). Raises InputError for a damaged line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                message = describe_json_error(error)
                raise InputError(message, where=where, fix=AGAIN_FIX) from None
            yield where, parse_as(_ScoreLine, content, where=where, fix=AGAIN_FIX)


def _make_document_loader(
    session: Session, rows: np.ndarray, steps: int, seed: int
) -> Callable[[int], Sequence[Document]]:
    batch_size = require(session.plan.config.batch_size)
    epochs = math.ceil(steps * batch_size / len(rows))
    sampler = StepSampler(
        num_rows=len(rows), batch_size=batch_size, epochs=epochs, seed=seed, max_steps=steps
    )

    def load_documents(step: int) -> list[Document]:
        documents: list[Document] = []
        for index in sampler.get_rows(step):
            documents += session.rows.render_documents(int(rows[index]))
        return documents

    return load_documents


def _train_subset(training: TrainingLoop, name: str) -> int:
    """Return the supervised tokens. Raises GateError for a non-finite loss."""
    try:
        return sum(event.supervised_tokens for event in training if isinstance(event, TrainStep))
    except GateError as error:
        where = f"data curate --ablate, {name}"
        fix = "lower learning_rate: `tunesmith tune lr` tests five"
        raise GateError(error.message, where=where, fix=fix) from error


# ---------------------------------------------------------------- result


def summarize_ablation(plan: Plan, subset_runs: Sequence[SubsetRun], steps: int) -> AblationResult:
    """Summarize the runs of train_subsets, each of so many steps."""
    untrained, *runs = subset_runs
    runs_by_subset: dict[str, list[SubsetRun]] = {}
    for run in runs:
        runs_by_subset.setdefault(run.name, []).append(run)
    base_score = compute_score(untrained.held_out)
    selected_runs = runs_by_subset[SELECTED]
    return AblationResult(
        steps=steps,
        batch_size=require(plan.config.batch_size),
        seeds=len(selected_runs),
        items=base_score.n,
        metric=untrained.held_out.metric,
        base_loss=base_score.value,
        arms=tuple(_build_arm(arm_runs, selected_runs) for arm_runs in runs_by_subset.values()),
    )


def _build_arm(runs: Sequence[SubsetRun], selected_runs: Sequence[SubsetRun]) -> SubsetArm:
    mean = average_measurements([run.held_out for run in runs])
    score = compute_score(mean)
    comparison: Comparison | None = None
    seed_differences: list[float] = []
    if runs[0].name != SELECTED:
        selected_mean = average_measurements([run.held_out for run in selected_runs])
        comparison = compare_measurements(mean, selected_mean)
        for run, selected_run in zip(runs, selected_runs, strict=True):
            by_seed = compare_measurements(run.held_out, selected_run.held_out)
            seed_differences.append(by_seed.difference)
    return SubsetArm(
        name=runs[0].name,
        rows=runs[0].rows,
        tokens=round(sum(run.tokens for run in runs) / len(runs)),
        loss=score.value,
        low=score.low,
        high=score.high,
        comparison=comparison,
        seed_differences=tuple(seed_differences),
    )


def average_measurements(measurements: Sequence[MetricValues]) -> MetricValues:
    """Average measurements of one metric on the same items, item by item."""
    values = np.mean([measurement.values for measurement in measurements], axis=0)
    return dataclasses.replace(measurements[0], values=tuple(values.tolist()))
