"""Should this be fine-tuned, by measure: every way that fits into the minutes, on the user's items.
Read this first.

    Plan, Facts, documents, minutes -> Begun, then each Outcome as it ends, then MeasuredAdvice

The model is loaded once. What was found before is taken from the folder and costs nothing, so a
measure that was killed goes on where it was. Only `eval_data` is asked; `test_data` stays unread.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.advise.measured.arms import Arm, ArmOptions, build_arms
from tunesmith.advise.measured.knowledge_check import (
    MAX_ROWS,
    NUM_SAMPLES,
    NUM_SHOT_SETS,
    KnowledgeResult,
    check_knowledge,
    explain_no_facts,
)
from tunesmith.advise.measured.learning_curve import LearningCurve, fit_curve
from tunesmith.advise.measured.prompting import get_question
from tunesmith.advise.measured.result_store import ResultStore
from tunesmith.advise.measured.retrieval import RECALL_CUTOFFS, PassageIndex
from tunesmith.advise.measured.run_arm import (
    ArmResult,
    ArmRunner,
    run_arm,
    sample_examples,
    select_items,
)
from tunesmith.advise.measured.time_budget import (
    TokenTimings,
    count_fitting_items,
    count_train_tokens,
    estimate_seconds,
    measure_timings,
    split_by_budget,
)
from tunesmith.advise.measured.verdict import (
    ArmGrader,
    ArmRow,
    Decision,
    build_table,
    choose_primary_metric,
    make_decision,
)
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import Score
from tunesmith.core.types import Json, Plan
from tunesmith.evaluate.generate_until import build_prompts, check_prompts
from tunesmith.evaluate.metrics import METRICS, split_metric
from tunesmith.evaluate.statistics import compute_wilson_interval
from tunesmith.session.inputs import RunInputs
from tunesmith.session.provenance import hash_weight_files

KNOWLEDGE_TIME_SHARE, MIN_KNOWLEDGE_ROWS = (
    0.1,
    10,
)  # of the minutes; training rows under which their knowledge is not looked at
MAX_POOL_ROWS = 400  # training rows that are looked through for what can be shown or trained


@dataclass(frozen=True)
class ExperimentStart:
    """What is going to be tried, and what has no room in the minutes. `test_rows`: held-out rows
    that are kept for the test of a run, where the recipe names no test_data."""

    model: str
    items: int
    available_items: int
    test_rows: int
    seconds: float  # expected, of what is not there yet
    arms: tuple[Arm, ...]
    skipped: tuple[Arm, ...]


@dataclass(frozen=True)
class SkippedArm:
    arm: Arm
    reason: str


@dataclass(frozen=True)
class MeasuredAdvice:
    """`recall`: of the right answer among the first k passages, by k; empty without documents.
    `no_knowledge`: why the knowledge of training answers was not looked at. `loose`: what the
    grammar leaves of the schema to the model."""

    model: str
    metric: str
    items: int
    available_items: int
    training_rows: int
    decision: Decision
    rows: tuple[ArmRow, ...]
    learning_curve: LearningCurve | None
    knowledge: KnowledgeResult | None
    knowledge_skip_reason: str
    recall: dict[int, Score]
    skipped: tuple[SkippedArm, ...]
    unenforced: tuple[str, ...]
    target: float | None
    minutes: float  # that this call took
    folder: str


@dataclass(frozen=True)
class ExperimentConfig:
    minutes: float = 10.0
    target: float | None = None
    metric: str | None = None
    folder: Path = Path("runs/advise")


@dataclass(frozen=True)
class ArmSpeed:
    """Measured once for a folder, so that a measure that goes on asks the same items."""

    timings: TokenTimings
    items: int


def advise_measured(
    plan: Plan, inputs: RunInputs, passages: PassageIndex | None, config: ExperimentConfig
) -> Iterator[ExperimentStart | ArmResult | MeasuredAdvice]:
    """Raises InputError without items, for a metric or schema that cannot be used, and where an
    item has no room."""
    started = time.perf_counter()
    metrics = _validate_metrics(plan, config)
    items = select_items(inputs)
    check_prompts(build_prompts(items, inputs.renderer), metrics, inputs.response_schema)
    store = ResultStore(config.folder, _build_fingerprint(plan, inputs, passages))
    runner = ArmRunner.from_plan(plan, inputs, items, passages, store.answer_cache)
    runner, timings = _limit_items(runner, store, config.minutes)
    options = ArmOptions(
        len(sample_examples(runner.rows, 0, MAX_POOL_ROWS)),
        passages is not None,
        inputs.response_schema is not None,
    )
    experiment = _Experiment(runner, store, timings, started + 60 * config.minutes)
    arms = build_arms(options)
    yield experiment.describe_start(arms, len(items))
    yield from experiment.run_arms(arms[:1])
    experiment.measure_knowledge()
    yield from experiment.run_arms(arms[1:])
    yield _build_advice(experiment, metrics, len(items), config, time.perf_counter() - started)


def _validate_metrics(plan: Plan, config: ExperimentConfig) -> tuple[str, ...]:
    """The metrics, the deciding one first."""
    if plan.config.stage != "sft":
        message = f"questions are asked and answered; stage: {plan.config.stage} has none"
        raise InputError(
            message,
            where="stage",
            fix="measure with `stage: sft` and rows of questions with answers",
        )
    if not 0 < config.minutes < math.inf:
        raise InputError(
            "there is no time to measure in", where="--minutes", fix="give some: --minutes 10"
        )
    if config.target is not None and not 0 < config.target <= 1:
        raise InputError(f"a score lies between 0 and 1, not {config.target:g}", where="--target")
    if config.metric is not None and split_metric(config.metric)[0] not in METRICS:
        raise InputError(
            f"there is no metric {config.metric!r:.60}",
            where="--metric",
            fix=f"use {', '.join(METRICS)}",
        )
    metrics = tuple(
        name for name in plan.config.metrics if split_metric(name)[0] in METRICS
    )  # likelihoods and code are not asked
    if not metrics and config.metric is None:
        message = "none of the metrics grades an answer by itself"
        raise InputError(
            message, where="metrics", fix=f"name one with --metric: {', '.join(METRICS)}"
        )
    primary = config.metric or choose_primary_metric(metrics)
    return (primary, *(name for name in metrics if name != primary))


def _build_fingerprint(plan: Plan, inputs: RunInputs, passages: PassageIndex | None) -> Json:
    """All that answers depend on, but the items and the arm."""
    ignored_settings = ("output_dir", "metrics", "eval_steps", "save_steps", "guard")
    return {
        "recipe": {key: value for key, value in plan.recipe.items() if key not in ignored_settings},
        "model": hash_weight_files(inputs.model.path),
        "renderer": inputs.renderer.fingerprint,
        "day": plan.config.now[:10] if inputs.renderer.has_date else "",
        "rows": {role: inputs.datasets[role].fingerprint for role in ("data", "eval_data")},
        "schema": inputs.response_schema,
        "documents": "" if passages is None else passages.fingerprint,
    }


def _limit_items(
    runner: ArmRunner, store: ResultStore, minutes: float
) -> tuple[ArmRunner, TokenTimings]:
    """With as many items as the minutes allow, and how fast they go."""
    arm_speed = store.get("pace", ArmSpeed)
    if arm_speed is None:
        timings = measure_timings(runner)
        arm_speed = ArmSpeed(timings, count_fitting_items(runner, timings, 60 * minutes))
        store.put("pace", arm_speed)
    return dataclasses.replace(runner, items=runner.items[: arm_speed.items]), arm_speed.timings


class _Experiment:
    """What has been found, and the clock."""

    def __init__(
        self, runner: ArmRunner, store: ResultStore, timings: TokenTimings, deadline: float
    ) -> None:
        self.runner, self.store, self.timings, self.deadline = runner, store, timings, deadline
        self.item_ids = [example.id for example in runner.items]
        self.results: list[ArmResult] = []
        # of what the last arms took to what was expected: a busy machine changes its pace
        self.time_ratio = 1.0
        self.skipped: list[SkippedArm] = []
        self.knowledge: KnowledgeResult | None = None
        self.knowledge_skip_reason = explain_no_facts(runner)

    def describe_start(self, arms: Sequence[Arm], available_items: int) -> ExperimentStart:
        missing = [arm for arm in arms if self._load_result(arm) is None]
        remaining_seconds = self.deadline - time.perf_counter()
        fitting, skipped = split_by_budget(missing, remaining_seconds, self._estimate_seconds)
        seconds = sum(map(self._estimate_seconds, fitting))
        selected = tuple(arm for arm in arms if arm not in skipped)
        inputs = self.runner.inputs
        test_rows = 0 if inputs.recipe.test_data else len(inputs.datasets["test_data"])
        return ExperimentStart(
            self.runner.plan.model.name,
            len(self.item_ids),
            available_items,
            test_rows,
            seconds,
            selected,
            tuple(skipped),
        )

    def run_arms(self, arms: Sequence[Arm]) -> Iterator[ArmResult]:
        """Each as it ends; those without room in the time that is left are left out."""
        for arm in arms:
            if (result := self._load_result(arm)) is None:
                arm_seconds, remaining_seconds = (
                    self._estimate_seconds(arm),
                    self.deadline - time.perf_counter(),
                )
                if self.results and arm_seconds > remaining_seconds:
                    self.skipped.append(
                        SkippedArm(
                            arm,
                            f"about {arm_seconds:.0f} s, {max(0, remaining_seconds):.0f} s were left",
                        )
                    )
                    continue
                result = self._try_arm(arm)
            if result is not None:
                self.results.append(result)
                yield result

    def _try_arm(self, arm: Arm) -> ArmResult | None:
        try:
            result = run_arm(self.runner, arm)
        except (InputError, GateError) as error:
            if not self.results:
                raise  # the plain question itself cannot be asked
            self.skipped.append(SkippedArm(arm, error.message))
            return None
        self.store.put(self._build_key(arm), result)
        if arm.examples:
            tokens = self.time_ratio * count_train_tokens(self.runner, self.timings, arm)
            self.timings = dataclasses.replace(
                self.timings, train_seconds=result.train_seconds / max(tokens, 1e-9)
            )
        else:
            self.time_ratio *= (
                result.total_seconds / max(self._estimate_seconds(arm), 1e-9)
            ) ** 0.5  # half of the way, in logarithms
        return result

    def measure_knowledge(self) -> None:
        """The knowledge check, on as many rows as its share of the time allows."""
        if self.knowledge_skip_reason:
            return
        self.knowledge = self.store.get("knowledge", KnowledgeResult)
        if self.knowledge is not None:
            return
        timings, remaining_seconds = self.timings, self.deadline - time.perf_counter()
        row_seconds = (
            self.time_ratio
            * NUM_SHOT_SETS
            * (1 + NUM_SAMPLES)
            * (
                timings.row_tokens * timings.prefill_seconds
                + 1.3 * timings.answer_tokens * timings.decode_seconds
            )
        )
        num_rows = min(
            MAX_ROWS, int(KNOWLEDGE_TIME_SHARE * remaining_seconds / max(row_seconds, 1e-9))
        )
        if num_rows < MIN_KNOWLEDGE_ROWS:
            self.knowledge_skip_reason = f"{MIN_KNOWLEDGE_ROWS} rows would take {MIN_KNOWLEDGE_ROWS * row_seconds:.0f} s, over a tenth of the time"
            return
        self.knowledge = check_knowledge(self.runner, num_rows)
        self.store.put("knowledge", self.knowledge)

    def _estimate_seconds(self, arm: Arm) -> float:
        return self.time_ratio * estimate_seconds(self.runner, self.timings, arm)

    def _load_result(self, arm: Arm) -> ArmResult | None:
        return self.store.get(self._build_key(arm), ArmResult)

    def _build_key(self, arm: Arm) -> Json:
        return {"arm": dataclasses.asdict(arm), "items": self.item_ids}


def _build_advice(
    experiment: _Experiment,
    metrics: tuple[str, ...],
    available_items: int,
    config: ExperimentConfig,
    seconds: float,
) -> MeasuredAdvice:
    runner, inputs = experiment.runner, experiment.runner.inputs
    grader = ArmGrader(
        build_prompts(runner.items, inputs.renderer), metrics[0], metrics, inputs.response_schema
    )
    rows = build_table(experiment.results, grader)
    is_constrained = any(result.arm.is_constrained for result in experiment.results)
    return MeasuredAdvice(
        model=runner.plan.model.name,
        metric=metrics[0],
        items=len(experiment.item_ids),
        available_items=available_items,
        training_rows=len(runner.rows),
        decision=make_decision(
            rows, config.target, [skipped_arm.arm for skipped_arm in experiment.skipped]
        ),
        rows=rows,
        learning_curve=_fit_learning_curve(experiment.results, grader, config.target),
        knowledge=experiment.knowledge,
        knowledge_skip_reason=experiment.knowledge_skip_reason,
        recall=_measure_recall(runner),
        skipped=tuple(experiment.skipped),
        unenforced=runner.grammar.warnings if is_constrained else (),
        target=config.target,
        minutes=seconds / 60,
        folder=str(config.folder),
    )


def _fit_learning_curve(
    results: Sequence[ArmResult], grader: ArmGrader, target: float | None
) -> LearningCurve | None:
    """Through plain trainings: those with passages learn something else."""
    scores: dict[int, list[Sequence[float]]] = {}
    for result in results:
        if result.arm.examples and not result.arm.passages:
            scores.setdefault(result.arm.examples, []).append(grader.grade_items(result))
    return fit_curve(scores, target)


def _measure_recall(runner: ArmRunner) -> dict[int, Score]:
    if runner.passages is None:
        return {}
    questions = build_prompts(runner.items, runner.inputs.renderer)
    pairs = zip(runner.items, questions, strict=True)
    ranks = [
        runner.passages.find_rank(get_question(item), question.expected) for item, question in pairs
    ]
    recall: dict[int, Score] = {}
    for cutoff in RECALL_CUTOFFS:
        hits = sum(rank is not None and rank <= cutoff for rank in ranks)
        low, high = compute_wilson_interval(hits, len(ranks))
        recall[cutoff] = Score(
            "passages", f"recall@{cutoff}", hits / len(ranks), low, high, len(ranks), 0
        )
    return recall
