"""Does the choice train better? Short runs on each subset from the same start, told apart on
held-out rows.

    Plan, Facts, the folder of `data curate` -> try_subsets -> Trained ...; conclude -> Proof

The kept rows, random ones and the longest, of one size, and the whole: one base load, as many steps
of as many rows each, with the plan's values. A second seed draws other random rows and takes all in
another order; values of a held-out row are then means over the seeds. Nothing is measured on
`test_data`, and rehearsal is left out. Intervals are of held-out rows; how far seeds differ is told
beside them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.advise.curate import SCORES_FILE
from tunesmith.advise.lr_finder import limit_items, select_eval_items
from tunesmith.core.atomic import read_manifest
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import TrainStep
from tunesmith.core.types import Comparison, Document, Plan, require
from tunesmith.data.sampler import StepSampler
from tunesmith.data.selection import ROLE, sample_rows
from tunesmith.evaluate.items import EvalItems
from tunesmith.evaluate.measure import measure_eval_loss
from tunesmith.evaluate.results import MetricValues, compare_measurements, compute_score
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.model.adapters import copy_weights, restore_weights
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, open_session
from tunesmith.train.loop import TrainingLoop

STEPS = 30
HELD_OUT_TOKENS = 16_000
SELECTED, ALL_ROWS = "kept", "whole"


@dataclass(frozen=True, eq=False)
class SubsetRun:
    """One short run; `name` is empty for the model before any."""

    name: str
    seed: int
    rows: int
    tokens: int  # that were trained on, answers alone
    held_out: MetricValues


@dataclass(frozen=True)
class SubsetArm:
    """One subset, over all seeds. `against`: the kept rows beside it, by held-out row (`after` is
    the kept rows); `by_seed` their difference in each seed. None and empty for the kept rows
    themselves."""

    name: str
    rows: int
    tokens: int  # in a run
    loss: float
    low: float
    high: float
    comparison: Comparison | None
    seed_differences: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Of the kept rows against these: better, worse, or no difference shown."""
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
    """The untrained model first, then every subset with every seed. Raises InputError without
    held-out rows, and for a folder of other rows."""
    items = select_held_out_items(plan, inputs)
    subsets = read_subsets(inputs, folder)
    session = open_session(plan, inputs)
    start_weights = copy_weights(session.model.network)
    yield SubsetRun("", 0, 0, 0, measure_eval_loss(session, items))
    for seed in range(plan.config.seed, plan.config.seed + seeds):
        for name, rows in subsets.items():
            if name == "random" and seed > plan.config.seed:
                rows = sample_rows(subsets[ALL_ROWS], len(rows), seed)
            restore_weights(session.model.network, start_weights)
            documents_of = _make_document_loader(session, rows, steps, seed)
            training = TrainingLoop(
                session.model, documents_of, plan.config, steps=steps, warmup_steps=steps // 10
            )
            tokens = _train_subset(training, name)
            yield SubsetRun(name, seed, len(rows), tokens, measure_eval_loss(session, items))


def select_held_out_items(plan: Plan, inputs: RunInputs) -> EvalItems:
    """Raises InputError without any."""
    items = select_eval_items(plan, inputs)
    if not items.eval_documents:
        message = "no held-out rows to tell the subsets apart by; test_data is for the end"
        raise InputError(
            message, where="data curate --prove", fix="give eval_data, or --eval-split 0.1"
        )
    return limit_items(items, HELD_OUT_TOKENS)


def read_subsets(inputs: RunInputs, folder: Path) -> dict[str, np.ndarray]:
    """Rows of each file that `data curate` wrote, and of the whole: what can be trained on."""
    data = inputs.datasets[ROLE]
    if read_manifest(folder).get("source") != data.fingerprint:
        raise InputError("the folder was made of other rows", where=str(folder), fix="choose again")
    subsets: dict[str, list[int]] = {SELECTED: [], "random": [], "longest": [], ALL_ROWS: []}
    rows_by_id = {data.get_id(row): row for row in range(len(data))}
    for line in (folder / SCORES_FILE).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["id"] not in rows_by_id:
            raise InputError(
                f"{record['id']} is not in the data",
                where=str(folder / SCORES_FILE),
                fix="choose again",
            )
        for name in (*record["files"], *([ALL_ROWS] if record["perplexity"] is not None else ())):
            subsets[name].append(rows_by_id[record["id"]])
    return {name: np.array(rows, dtype=np.int64) for name, rows in subsets.items()}


def _make_document_loader(
    session: Session, rows: np.ndarray, steps: int, seed: int
) -> Callable[[int], Sequence[Document]]:
    batch_size = require(session.plan.config.batch_size)
    epochs = math.ceil(steps * batch_size / len(rows))
    sampler = StepSampler(
        num_rows=len(rows), batch_size=batch_size, epochs=epochs, seed=seed, max_steps=steps
    )
    return lambda step: [
        document
        for index in sampler.get_rows(step)
        for document in session.rows.render_documents(int(rows[index]))
    ]


def _train_subset(training: TrainingLoop, name: str) -> int:
    """Tokens of the answers. Raises GateError where losses are no numbers."""
    try:
        return sum(event.supervised_tokens for event in training if isinstance(event, TrainStep))
    except GateError as error:
        where, fix = (
            f"data curate --prove, {name}",
            "lower learning_rate: `tunesmith tune lr` tries five",
        )
        raise GateError(error.message, where=where, fix=fix) from error


# ---------------------------------------------------------------- what is concluded


def summarize_ablation(plan: Plan, subset_runs: Sequence[SubsetRun], steps: int) -> AblationResult:
    """`trained` as `try_subsets` gave them, after so many steps."""
    untrained, *runs = subset_runs
    runs_by_subset: dict[str, list[SubsetRun]] = {}
    for run in runs:
        runs_by_subset.setdefault(run.name, []).append(run)
    base_score, seeds = compute_score(untrained.held_out), len(runs_by_subset[SELECTED])
    return AblationResult(
        steps=steps,
        batch_size=require(plan.config.batch_size),
        seeds=seeds,
        items=base_score.n,
        metric=untrained.held_out.metric,
        base_loss=base_score.value,
        arms=tuple(
            _build_arm(name, arm_runs, runs_by_subset) for name, arm_runs in runs_by_subset.items()
        ),
    )


def _build_arm(
    name: str, runs: Sequence[SubsetRun], runs_by_subset: Mapping[str, Sequence[SubsetRun]]
) -> SubsetArm:
    mean_values, selected_runs = (
        average_measurements([run.held_out for run in runs]),
        runs_by_subset[SELECTED],
    )
    arm_score = compute_score(mean_values)
    comparison, seed_differences = None, ()
    if name != SELECTED:
        comparison = compare_measurements(
            mean_values, average_measurements([run.held_out for run in selected_runs])
        )
        pairs = zip(runs, selected_runs, strict=True)
        seed_differences = tuple(
            compare_measurements(run.held_out, selected_run.held_out).difference
            for run, selected_run in pairs
        )
    tokens = round(sum(run.tokens for run in runs) / len(runs))
    return SubsetArm(
        name,
        runs[0].rows,
        tokens,
        arm_score.value,
        arm_score.low,
        arm_score.high,
        comparison,
        seed_differences,
    )


def average_measurements(measurements: Sequence[MetricValues]) -> MetricValues:
    """Of one measure on the same items, item by item."""
    values = np.mean([measurement.values for measurement in measurements], axis=0)
    return dataclasses.replace(measurements[0], values=tuple(values.tolist()))
