"""Measure whether to fine-tune: try every approach that fits in the minutes, on the user's items.

    plan, inputs, documents, config -> ExperimentStart, each ArmResult as it ends, MeasuredAdvice

Read this first. The model is loaded once. Stored results are reused, so an interrupted experiment
continues. Only `eval_data` is used; `test_data` is not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.advise.measured.arms import Arm, ArmOptions, build_arms
from tunesmith.advise.measured.retrieval import PassageIndex
from tunesmith.advise.measured.run_arm import (
    ArmResult,
    ArmRunner,
    run_arm,
    sample_examples,
    select_items,
)
from tunesmith.advise.measured.verdict import (
    DEFAULT_MARGIN,
    ArmGrader,
    ArmRow,
    Decision,
    add_caveats,
    build_table,
    choose_options,
    choose_primary_metric,
    collect_candidates,
    count_looks,
    make_decision,
    split_items,
)
from tunesmith.core.atomic import make_dirs, refuse_links, remove_leftovers, write_file
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.types import Example, Json, Plan
from tunesmith.evaluate.generate_until import build_prompts, check_prompts
from tunesmith.evaluate.metrics import METRICS, split_metric
from tunesmith.model.hub.base_config import encode_special_floats
from tunesmith.session.identity import hash_weight_files
from tunesmith.session.inputs import RunInputs
from tunesmith.session.row_groups import map_groups
from tunesmith.train.follow_measuring import start_measuring

MAX_POOL_ROWS = 400  # training rows that may be shown or trained on
MIN_ITEMS = 20
ITEM_TIME_SHARE = 0.03  # of the minutes, for one zero-shot arm
# recipe keys that do not change an answer
IGNORED_SETTINGS = ("output_dir", "metrics", "eval_steps", "save_steps", "guard")


@dataclass(frozen=True)
class ExperimentStart:
    """The arms that run while the minutes last."""

    model: str
    items: int
    available_items: int
    test_rows: int  # held out as test_data, where the recipe names none
    arms: tuple[Arm, ...]
    minutes: float


@dataclass(frozen=True)
class SkippedArm:
    arm: Arm
    reason: str


@dataclass(frozen=True)
class MeasuredAdvice:
    model: str
    metric: str
    items: int
    available_items: int
    training_rows: int
    decision: Decision
    rows: tuple[ArmRow, ...]
    skipped: tuple[SkippedArm, ...]
    unenforced: tuple[str, ...]  # parts of the schema that the grammar does not enforce
    target: float | None
    minutes: float  # of this call
    folder: str


@dataclass(frozen=True)
class ExperimentConfig:
    minutes: float = 10.0
    target: float | None = None
    margin: float = DEFAULT_MARGIN  # that a cheaper approach may be worse by
    folder: Path = Path("runs/advise")
    ranks: Ranks = SINGLE_PROCESS  # which share the items out; the others follow


@dataclass(frozen=True)
class ArmSpeed:
    """Stored once per folder, so that a continued experiment uses the same items."""

    item_seconds: float  # zero-shot
    items: int


def advise_measured(
    plan: Plan,
    inputs: RunInputs,
    passages: PassageIndex | None,
    config: ExperimentConfig,
    base: tuple[Plan, RunInputs] | None = None,
) -> Iterator[ExperimentStart | ArmResult | MeasuredAdvice]:
    """Run the experiment; `base` is the plan and the inputs of another model on the same rows.

    Raises InputError without items, for an unusable metric or schema, and for an item that exceeds
    the context.
    """
    start = time.perf_counter()
    metric = _choose_metric(plan, config)
    if base is not None and inputs.recipe.eval_split is not None:
        message = "eval_split may hold out other rows from another model"
        fix = "name eval_data; `tunesmith data split` writes it"
        raise InputError(message, where="--base", fix=fix)
    items = select_items(inputs)
    check_prompts(build_prompts(items, inputs.renderer), (metric,), inputs.response_schema)
    store = ResultStore(config.folder, _build_fingerprint(plan, inputs, passages))
    runner = ArmRunner.from_plan(plan, inputs, items, passages)
    start_measuring(runner.model, plan, config.ranks)
    other_base = None if base is None else OtherBase.load(*base, passages)
    runner, item_seconds = _limit_items(runner, store, config.minutes)
    options = ArmOptions(
        rows=len(sample_examples(runner.rows, 0, MAX_POOL_ROWS)),
        has_documents=passages is not None,
        has_schema=inputs.response_schema is not None,
        base="" if other_base is None else Path(other_base.runner.plan.model.name).name,
    )
    looks = count_looks(len(runner.items), len(items))
    deadline = start + 60 * config.minutes
    experiment = _Experiment(runner, other_base, store, item_seconds, deadline, looks)
    arms = build_arms(options)
    yield ExperimentStart(
        model=plan.model.name,
        items=len(runner.items),
        available_items=len(items),
        test_rows=0 if inputs.recipe.test_data else len(inputs.datasets["test_data"]),
        arms=tuple(arms),
        minutes=config.minutes,
    )
    yield from experiment.run_arms(arms)
    yield from experiment.measure_more(items, lambda: _decide(experiment, metric, config))
    yield _build_advice(experiment, metric, len(items), config, time.perf_counter() - start)


def _choose_metric(plan: Plan, config: ExperimentConfig) -> str:
    """Return the metric that decides."""
    if plan.config.stage != "sft":
        message = f"stage: {plan.config.stage} has no questions with answers to measure"
        raise InputError(message, where="stage", fix="use `stage: sft`")
    if not 0 < config.minutes < math.inf:
        raise InputError("must be a positive number", where="--minutes", fix="--minutes 10")
    if config.target is not None and not 0 < config.target <= 1:
        message = f"must be between 0 and 1, not {config.target:g}"
        raise InputError(message, where="--target", fix="write 90% as 0.9")
    if not 0 < config.margin < 1:
        message = f"must be between 0 and 1, not {config.margin:g}"
        raise InputError(message, where="--margin", fix="write 10% as 0.1")
    # likelihoods and custom code are left out
    metrics = tuple(name for name in plan.config.metrics if split_metric(name)[0] in METRICS)
    if not metrics:
        message = "none of the metrics grades answers"
        raise InputError(message, where="metrics", fix=f"choose one: {', '.join(METRICS)}")
    return choose_primary_metric(metrics)


def _build_fingerprint(plan: Plan, inputs: RunInputs, passages: PassageIndex | None) -> Json:
    """Return everything that answers depend on, except the items and the arm."""
    recipe = {key: value for key, value in plan.recipe.items() if key not in IGNORED_SETTINGS}
    return {
        "recipe": recipe,
        "model": hash_weight_files(inputs.model.path),
        "config": encode_special_floats(read_json(inputs.model.path / "config.json")),
        "renderer": inputs.renderer.fingerprint,
        "day": plan.config.now[:10] if inputs.renderer.has_date else "",
        "rows": {role: inputs.datasets[role].fingerprint for role in ("data", "eval_data")},
        "schema": inputs.response_schema,
        "documents": "" if passages is None else passages.fingerprint,
    }


def _limit_items(runner: ArmRunner, store: ResultStore, minutes: float) -> tuple[ArmRunner, float]:
    """Return a runner with as many items as zero-shot answers in its share of the minutes, and its
    seconds per item."""
    speed = store.get("speed", ArmSpeed)
    if speed is None:
        first = dataclasses.replace(runner, items=runner.items[:MIN_ITEMS])
        item_seconds = run_arm(first, Arm()).total_seconds / len(first.items)
        num_fitting = int(ITEM_TIME_SHARE * 60 * minutes / item_seconds)
        speed = ArmSpeed(item_seconds, min(len(runner.items), max(MIN_ITEMS, num_fitting)))
        store.put("speed", speed)
    return dataclasses.replace(runner, items=runner.items[: speed.items]), speed.item_seconds


# ---------------------------------------------------------------- stored results

T = TypeVar("T")


class ResultStore:
    """Results on disk: one file per arm, written when the arm has finished.

    A file's name is a hash of everything that its content depends on (model, rows, items,
    documents, arm), so an interrupted experiment continues, a repeated one is free, and no stale
    result is used. Recipes may share a folder. Raises InputError for a folder that cannot be made
    or has a link.
    """

    def __init__(self, folder: Path, fingerprint: Json) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        if folder.exists() and not folder.is_dir():
            raise InputError("not a folder", where=f"--out: {folder}", fix="name a folder")
        make_dirs(folder)
        refuse_links(folder)
        remove_leftovers(folder)

    def get(self, key: Any, result_type: type[T]) -> T | None:
        """Return None for a result that is missing, truncated or of another version."""
        path = self._build_path(key)
        if not path.is_file():
            return None
        try:
            return parse_as(result_type, read_json(path)["result"], where=str(path))
        except (InputError, KeyError, TypeError):
            return None

    def put(self, key: Any, result: Any) -> None:
        write_file(self._build_path(key), dump_json({"key": key, "result": result}))

    def _build_path(self, key: Any) -> Path:
        key_bytes = dump_json({**self.fingerprint, "key": key})
        return self.folder / f"{hashlib.sha256(key_bytes).hexdigest()[:20]}.json"


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class OtherBase:
    """Another model, which may read its rows as other messages, and what its answers depend on."""

    runner: ArmRunner  # without items
    items: dict[str, Example]
    fingerprint: Json

    @classmethod
    def load(cls, plan: Plan, inputs: RunInputs, passages: PassageIndex | None) -> OtherBase:
        items = {item.id: item for item in select_items(inputs)}
        runner = ArmRunner.from_plan(plan, inputs, (), passages)
        return cls(runner, items, _build_fingerprint(plan, inputs, passages))

    def make_runner(self, items: Sequence[Example]) -> ArmRunner:
        mine = tuple(self.items[item.id] for item in items if item.id in self.items)
        return dataclasses.replace(self.runner, items=mine)


class _Experiment:
    """The results so far, and the clock. An arm may take as long as the slowest of its model."""

    def __init__(
        self,
        runner: ArmRunner,
        other_base: OtherBase | None,
        store: ResultStore,
        item_seconds: float,
        deadline: float,
        looks: int,
    ) -> None:
        self.runner = runner
        self.other_base = other_base
        self.looks = looks
        self.first_items = len(runner.items)
        self.store = store
        self.deadline = deadline
        self.results: list[ArmResult] = []
        self.skipped: list[SkippedArm] = []
        # Until one was trained on, a row counts as an item that is answered in each epoch.
        self.row_seconds = item_seconds * runner.plan.config.num_train_epochs

    def run_arms(self, arms: Sequence[Arm]) -> Iterator[ArmResult]:
        """Yield each result as it ends; arms that do not fit in the remaining time are skipped."""
        for arm in arms:
            result = self.store.get(self._build_key(arm, self.runner), ArmResult)
            if result is None:
                arm_seconds = self._estimate_seconds(arm)
                remaining_seconds = self.deadline - time.perf_counter()
                if self.results and arm_seconds > remaining_seconds:
                    remaining = f"{max(0, remaining_seconds):.0f} s left"
                    self.skipped.append(SkippedArm(arm, f"about {arm_seconds:.0f} s, {remaining}"))
                    continue
                result = self._try_arm(arm, self.runner)
            if result is not None:
                self.results.append(result)
                yield result

    def measure_more(
        self, items: Sequence[Example], decide: Callable[[], Decision]
    ) -> Iterator[ArmResult]:
        """Let the chosen arms answer more items, twice as many each time, until it is decided.

        Each yielded result has the answers to all its items. A round that does not fit in the time
        is left out; a training is repeated for it, from the same weights and rows."""
        while (count := len(self.runner.items)) < len(items):
            decision = decide()
            if decision.conclusion != "undecided" or decision.untried:
                return
            more = dataclasses.replace(self.runner, items=tuple(items[count : 2 * count]))
            arms = self._list_judged_arms(decision)
            stored = [self.store.get(self._build_key(arm, more), ArmResult) for arm in arms]
            num_seconds = 0.0
            for arm, result in zip(arms, stored, strict=True):
                num_seconds += 0.0 if result else self._estimate_seconds(arm, len(more.items))
            if time.perf_counter() + num_seconds > self.deadline:
                return
            for arm, result in zip(arms, stored, strict=True):
                result = result or self._try_arm(arm, more)
                if result is None:
                    return
                yield self._merge(result)
            self.runner = dataclasses.replace(self.runner, items=(*self.runner.items, *more.items))

    def _list_judged_arms(self, decision: Decision) -> list[Arm]:
        """Return the arms of the options; of a training each of its seeds."""
        options = {option.arm for option in decision.options}
        return [
            result.arm
            for result in self.results
            if result.arm in options or (result.arm.examples and result.arm.row_key in options)
        ]

    def _merge(self, result: ArmResult) -> ArmResult:
        index = [each.arm for each in self.results].index(result.arm)
        answers = {**self.results[index].answers, **result.answers}
        self.results[index] = dataclasses.replace(self.results[index], answers=answers)
        return self.results[index]

    def _try_arm(self, arm: Arm, runner: ArmRunner) -> ArmResult | None:
        answering = runner
        if arm.base and self.other_base is not None:
            answering = self.other_base.make_runner(runner.items)
        try:
            result = run_arm(answering, arm)
        except (InputError, GateError) as error:
            if not self.results:
                raise  # without the zero-shot baseline there is no experiment
            self.skipped.append(SkippedArm(arm, error.message))
            return None
        self.store.put(self._build_key(arm, runner), result)
        return result

    def _build_key(self, arm: Arm, runner: ArmRunner) -> Json:
        base = self.other_base.fingerprint if arm.base and self.other_base else {}
        items = [example.id for example in runner.items]
        return {"arm": dataclasses.asdict(arm), "items": items, "base": base}

    def _estimate_seconds(self, arm: Arm, items: int = 0) -> float:
        by_model = [result for result in self.results if result.arm.base == arm.base]
        answering = [each.total_seconds - each.train_seconds for each in by_model or self.results]
        training = [
            each.train_seconds / each.arm.examples for each in self.results if each.arm.examples
        ]
        row_seconds = max(training, default=self.row_seconds)
        share = (items or self.first_items) / self.first_items
        return share * max(answering, default=0.0) + arm.examples * row_seconds


def _build_grader(experiment: _Experiment, metric: str) -> ArmGrader:
    runner = experiment.runner
    questions = build_prompts(runner.items, runner.inputs.renderer)
    row_groups = map_groups(runner.inputs.datasets["eval_data"], runner.inputs.recipe.group)
    groups = tuple(row_groups[question.id] for question in questions) if row_groups else ()
    return ArmGrader(questions, metric, runner.inputs.response_schema, groups)


def _decide(experiment: _Experiment, metric: str, config: ExperimentConfig) -> Decision:
    """Choose an arm of each approach on a third of the first items, and judge it on the others."""
    grader = _build_grader(experiment, metric)
    first = experiment.first_items
    choosing = split_items(
        [item.id for item in experiment.runner.items[:first]], grader.groups[:first]
    )
    candidates = collect_candidates(experiment.results, grader)
    values = {arm: values for arm, (values, _) in candidates.items()}
    options = choose_options(values, choosing)
    skipped = [skipped.arm for skipped in experiment.skipped]
    decision = make_decision(
        options,
        config.target,
        config.margin,
        looks=experiment.looks,
        choosing_items=len(choosing),
        skipped=skipped,
    )
    seeds = [len(candidates[option.arm][1]) for option in options if option.approach == "sft"]
    return add_caveats(decision, sum(seeds))


def _build_advice(
    experiment: _Experiment,
    metric: str,
    available_items: int,
    config: ExperimentConfig,
    seconds: float,
) -> MeasuredAdvice:
    runner = experiment.runner
    is_constrained = any(result.arm.is_constrained for result in experiment.results)
    return MeasuredAdvice(
        model=runner.plan.model.name,
        metric=metric,
        items=len(runner.items),
        available_items=available_items,
        training_rows=len(runner.rows),
        decision=_decide(experiment, metric, config),
        rows=build_table(experiment.results, _build_grader(experiment, metric)),
        skipped=tuple(experiment.skipped),
        unenforced=runner.grammar.warnings if is_constrained else (),
        target=config.target,
        minutes=seconds / 60,
        folder=str(config.folder),
    )
