"""Run an arm of an experiment with a seed, in a process of its own, and return what it measured.

    run_arm(ArmJob(...)) -> ArmRun

In: a recipe. Out: a run folder as `tunesmith train` writes it, and the values of each item before
and after; arms that differ in training alone share those before. A job that was killed is resumed,
and one whose settings have changed starts anew. The process is new so that its peak memory is that
of this arm. Left out: which arms to run (run.py).
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.definitions import Answering

from tunesmith import api
from tunesmith.core.atomic import write_file
from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.run_dir import (
    CHECKPOINTS_DIR,
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    RECORD_FILE,
    is_run,
    read_events,
    read_run_plan,
)
from tunesmith.core.types import Json, Plan
from tunesmith.evaluate.model_ref import load_results
from tunesmith.evaluate.results import EvalResults, MetricValues
from tunesmith.plan.stages import require_single_stage
from tunesmith.session.planner import make_plan
from tunesmith.train import run

SETTINGS_SUFFIX = ".settings.json"
RUN_TASK = "run"  # of the values that a run has of its steps
SECONDS_PER_TOKEN = "microseconds_per_token"
# of a plan: what the measures before training depend on
BASE_SETTINGS = ("dtype", "attention", "pack_length", "share_prefixes", "metrics")
WARMUP_STEPS = 2  # whose time is that of the first touch of memory
# Settings of a plan that the measures before training depend on, of those that an arm may change.
BASE_SETTINGS = ("dtype", "attention", "pack_length", "share_prefixes", "metrics")
# Keys of a recipe that the measures before training do not depend on.
TRAINING_KEYS = {
    "batch_size",
    "data",
    "guard",
    "learning_rate",
    "lora_alpha",
    "lora_r",
    "max_steps",
    "method",
    "num_train_epochs",
    "optim",
    "rehearsal",
    "seed",
}
PRELOADED = ["tunesmith.train.run", "tunesmith.advise.measured.run_arm"]


@dataclass(frozen=True)
class ArmJob:
    """An arm with a seed. `folder` becomes its run folder, which has its settings beside it.

    settings: what decides the result, without the paths of this machine that `recipe` has."""

    folder: Path
    settings: Json
    recipe: Json
    answering: Answering | None = None
    documents: Path | None = None

    @property
    def settings_file(self) -> Path:
        return self.folder.with_name(self.folder.name + SETTINGS_SUFFIX)

    @property
    def result_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".result.json")


@dataclass(frozen=True)
class ArmRun:
    """The result of an arm with a seed. `failure` says why it ended early: at a gate, as by a
    loss that is not finite."""

    minutes: float
    steps: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    peak_gigabytes: float = 0.0
    warnings: tuple[str, ...] = ()  # kinds of the guard's and preflight's verdicts but "ok"
    before: tuple[MetricValues, ...] = ()
    after: tuple[MetricValues, ...] = ()
    failure: str = ""


class ArmError(Exception):
    """The process of an arm ended without a result: its recipe, the machine or a bug."""


def run_arm(job: ArmJob) -> ArmRun:
    """Return the result of a job, which is stored beside its folder and not measured again.

    Raises ArmError if its process fails."""
    has_same_settings = job.settings_file.exists() and read_json(job.settings_file) == job.settings
    if not has_same_settings:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.result_file.unlink(missing_ok=True)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        write_file(job.settings_file, dump_json(job.settings, indent=2))
    if not job.result_file.exists():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=measure_arm, args=(job,), daemon=True)
        process.start()
        process.join()
        if process.exitcode:
            raise ArmError(f"{job.folder}: its process ended with {process.exitcode}, see above")
    return parse_as(ArmRun, read_json(job.result_file), where=str(job.result_file))


def measure_arm(job: ArmJob) -> None:
    """Train or answer, and write the result."""
    result = _train(job) if job.answering is None else _answer(job, job.answering)
    write_file(job.result_file, dump_json(result))


# ---------------------------------------------------------------- training


def _train(job: ArmJob) -> ArmRun:
    try:
        _finish_run(job)
    except GateError as error:
        return ArmRun(minutes=_count_minutes(job.folder), failure=error.message)
    record = api.read_record(job.folder)
    events = read_events(job.folder)
    checks = [event for event in events if isinstance(event, CheckResult)]
    steps = [event for event in events if isinstance(event, TrainStep)]
    speed = measure_speed(steps)
    result = ArmRun(
        minutes=round(record.total_seconds / 60, 2),
        steps=record.steps,
        tokens=record.tokens,
        tokens_per_second=round(record.tokens / record.train_seconds, 1),
        peak_gigabytes=round(record.train_peak_bytes / 1e9, 3),
        warnings=tuple(dict.fromkeys(check.kind for check in checks if check.level != "ok")),
        before=_load_values(job.folder, EVAL_BEFORE_FILE),
        after=(*_load_values(job.folder, EVAL_AFTER_FILE), *speed),
    )
    for name in (CHECKPOINTS_DIR, "model"):  # gigabytes that nothing reads again
        shutil.rmtree(job.folder / name, ignore_errors=True)
    return result


def _finish_run(job: ArmJob) -> None:
    """Train, or resume where an earlier process was killed."""
    if (job.folder / RECORD_FILE).exists():
        return
    if is_run(job.folder):
        events = api.resume(job.folder)
    else:
        shutil.rmtree(job.folder, ignore_errors=True)
        inputs = require_single_stage(api.load_inputs(job.recipe, output_dir=str(job.folder)))
        plan = make_plan(inputs)
        events = run.train(plan, inputs, before=_find_base_results(job, plan))
    for _ in events:
        pass


def has_same_base(first: Plan, second: Plan) -> bool:
    """Return whether two plans on the same model and items measure the same before training."""
    is_quantized = {plan.config.method == "qlora" for plan in (first, second)}
    return len(is_quantized) == 1 and all(
        getattr(first.config, key) == getattr(second.config, key) for key in BASE_SETTINGS
    )


def _find_base_results(job: ArmJob, plan: Plan) -> EvalResults | None:
    """Return the measures before training of another arm or seed on the same items."""
    for file in sorted(job.folder.parent.glob(f"*/{EVAL_BEFORE_FILE}")):
        other = read_json(file.parent.with_name(file.parent.name + SETTINGS_SUFFIX))
        is_same = _select_base_settings(other) == _select_base_settings(job.settings)
        if is_same and _has_same_base(read_run_plan(file.parent), plan):
            return parse_as(EvalResults, read_json(file), where=str(file))
    return None


def _has_same_base(first: Plan, second: Plan) -> bool:
    """Return whether two plans on the same model and items measure the same before training."""
    is_quantized = {plan.config.method == "qlora" for plan in (first, second)}
    return len(is_quantized) == 1 and all(
        getattr(first.config, key) == getattr(second.config, key) for key in BASE_SETTINGS
    )


def _select_base_settings(settings: Json) -> Json:
    recipe = {key: value for key, value in settings["recipe"].items() if key not in TRAINING_KEYS}
    return {**settings, "recipe": recipe}


def _count_minutes(folder: Path) -> float:
    steps = [event for event in read_events(folder) if isinstance(event, TrainStep)]
    return round(sum(step.seconds for step in steps) / 60, 2)


def measure_speed(steps: list[TrainStep]) -> Iterator[MetricValues]:
    """Yield the time of each step, which is paired with that of the same rows in another arm."""
    timed = [step for step in steps[WARMUP_STEPS:] if step.tokens]  # rows may have no documents
    if timed:
        ids = tuple(f"step {step.step}" for step in timed)
        values = tuple(1e6 * step.seconds / step.tokens for step in timed)
        yield MetricValues(RUN_TASK, SECONDS_PER_TOKEN, ids, values, higher_is_better=False)


def _load_values(folder: Path, file: str) -> tuple[MetricValues, ...]:
    return tuple(round_values(values) for values in load_results(folder, file).measurements)


def round_values(values: MetricValues) -> MetricValues:
    """Round to six digits, and leave out what no claim reads."""
    rounded = tuple(float(f"{value:.6g}") for value in values.values)
    return replace(values, values=rounded, truncated=())


# ---------------------------------------------------------------- answering


def _answer(job: ArmJob, answering: Answering) -> ArmRun:
    """Answer the items as `tunesmith advise --measure` does, with the arm's way alone."""
    from tunesmith.advise.measured.arms import Arm
    from tunesmith.advise.measured.retrieval import open_passages
    from tunesmith.advise.measured.run_arm import ArmRunner, select_items
    from tunesmith.advise.measured.run_arm import run_arm as answer_items
    from tunesmith.evaluate.generate_until import apply_metrics, build_prompts

    inputs = require_single_stage(api.load_inputs(job.recipe, output_dir=str(job.folder)))
    plan = make_plan(inputs)
    items = select_items(inputs)
    passages = None if job.documents is None else open_passages(job.documents)
    runner = ArmRunner.from_plan(plan, inputs, items, passages)
    arm = Arm(seed=inputs.recipe.seed, **answering.model_dump())
    outcome = answer_items(runner, arm)
    prompts = build_prompts(items, inputs.renderer)
    measured = apply_metrics(
        prompts,
        [outcome.answers[prompt.id] for prompt in prompts],
        task="test",
        metrics=plan.config.metrics,
        schema=inputs.response_schema,
    )
    after = tuple(round_values(values) for values in measured)
    return ArmRun(minutes=round(outcome.total_seconds / 60, 2), after=after)
