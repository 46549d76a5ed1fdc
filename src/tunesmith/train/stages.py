"""Several stages in one recipe: one run after the other in one folder.

    Stages -> load_stage_inputs -> make_staged_plan -> StagedPlan -> train -> events

    RUN/stages.json       the plans of all stages, made before the first one starts
    RUN/stages/1-cpt/     an ordinary run folder
    RUN/stages/2-sft/     another one; it continues the previous adapter, or starts from the merged
                          model RUN/stages/1-cpt/merged
    RUN/record.json       of all stages: before is the model that the first stage starts from, after
                          is the result of the last; eval_before.json and eval_after.json hold the
                          metrics item by item

`resume` continues with the first unfinished stage. Left out: running and resuming one stage
(run.py). Background: docs/design/stages.md."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import verify_dir, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, CheckResult, Event, StageStart
from tunesmith.core.evidence import ErrorAnalysis
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    FINGERPRINT_FILE,
    MODEL_DIR,
    PLAN_FILE,
    RECORD_FILE,
    STAGES_DIR,
    STAGES_FILE,
    RunFolder,
    pick_run_folder,
    read_run_plan,
    read_run_record,
)
from tunesmith.core.sealed_json import read_sealed_json, seal_json
from tunesmith.core.types import Json, Plan, PlanValue, RunRecord
from tunesmith.data.training_rows import read_training_rows
from tunesmith.evaluate.error_analysis import Evaluation, analyze_errors
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.results import (
    RETENTION_DATA,
    EvalResults,
    compare_results,
    select_sample_pairs,
)
from tunesmith.evaluate.run_verdict import judge_run
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.machine_errors import machine_errors
from tunesmith.plan.build import is_compatible, normalize
from tunesmith.plan.stages import StagedPlan, read_staged_plan
from tunesmith.recipe.load import rebuild_recipe
from tunesmith.recipe.schema import Stages
from tunesmith.session import inputs, planner
from tunesmith.session.inputs import RunInputs
from tunesmith.session.reopen import load_trained_model, reload_inputs
from tunesmith.session.session import load_starting_model, open_eval_session
from tunesmith.train import run
from tunesmith.train.model_card import write_card
from tunesmith.train.signals import GracefulStop

# Merges a finished stage's adapter into a new model folder, and returns the evidence that the model
# answers as the stage does. The caller passes it: exports are built on training.
MergeFn = Callable[[Path, Path], str]

TARGET_MODULES_KEY = "lora_target_modules"
INHERITED_KEYS = (
    *("method", "lora_r", "lora_alpha", TARGET_MODULES_KEY, "use_rslora", "use_dora"),
    "modules_to_save",
)
BETWEEN_KEY = "between_stages"
CONTINUE_ADAPTER = "continue adapter"
MERGED = "merged"
CONTINUE_REASON = "no rounding by a merge, one adapter for the run, and the base stays available"


# ---------------------------------------------------------------- before a run


def load_stage_inputs(stages: Stages, *, weights: bool = True) -> tuple[RunInputs, ...]:
    """Load the inputs of each stage; dates are frozen at one moment."""
    now = datetime.now()
    output_dir = stages.recipes[0].output_dir
    run_dir = output_dir if isinstance(output_dir, Path) else pick_run_folder(Path("runs"), "run")
    stage_inputs: list[RunInputs] = []
    for number, recipe in enumerate(stages.recipes, start=1):
        stage_dir = run_dir / STAGES_DIR / f"{number}-{recipe.stage}"
        stage_inputs.append(
            inputs.load_inputs(recipe, now=now, output_dir=stage_dir, needs_weights=weights)
        )
    return tuple(stage_inputs)


def make_staged_plan(stage_inputs: Sequence[RunInputs]) -> StagedPlan:
    """Plan all stages; raise InputError for one that cannot follow the previous one."""
    plans: list[Plan] = []
    for run_inputs in stage_inputs:
        inherited = _inherit_values(plans[-1], run_inputs) if plans else None
        plan = planner.make_plan(run_inputs, inherited)
        if plan.config.dp_shard_size > 1:
            message = "several stages cannot be used with sharded weights"
            raise InputError(
                message, where="dp_shard_size", fix="train each stage as a run of its own"
            )
        if plans and (plan.config.add_tokens or {}) != (plans[0].config.add_tokens or {}):
            raise InputError(
                f"stage {plan.config.stage} adds other tokens than the first stage",
                where="add_tokens",
                fix="list all of them in every stage",
            )
        plans.append(plan)
    run_dir = stage_inputs[0].output_dir.parent.parent
    return StagedPlan(str(run_dir), tuple(plans))


def _inherit_values(previous_plan: Plan, next_inputs: RunInputs) -> dict[str, PlanValue]:
    """Return the settings of a stage that follow from the previous one."""
    name = Path(previous_plan.config.output_dir).name
    merge_reason = _explain_merge(previous_plan, next_inputs, name)
    if merge_reason:
        return {BETWEEN_KEY: PlanValue(MERGED, "rule", merge_reason, "ours")}
    reason = f"continues the adapter of {name}"
    values = {
        key: PlanValue(getattr(previous_plan.config, key), "rule", reason) for key in INHERITED_KEYS
    }
    return values | {BETWEEN_KEY: PlanValue(CONTINUE_ADAPTER, "rule", CONTINUE_REASON, "ours")}


def _explain_merge(previous_plan: Plan, next_inputs: RunInputs, name: str) -> str:
    """Return why the previous adapter must be merged; "" if training can continue it."""
    if previous_plan.config.method == "full":
        return f"{name} trains all weights, so its model is the base of this stage"
    for key in INHERITED_KEYS:
        requested = getattr(next_inputs.recipe, key)
        previous = getattr(previous_plan.config, key)
        if is_compatible(requested, previous):
            continue
        if key == TARGET_MODULES_KEY and planner.has_same_layers(next_inputs, requested, previous):
            continue
        return (
            f"{key} is {normalize(requested)} here and {normalize(previous)} in the adapter of "
            f"{name}, which is merged into the base of this stage"
        )
    return ""


# ---------------------------------------------------------------- a run


def train(
    staged: StagedPlan,
    stage_inputs: Sequence[RunInputs] | None = None,
    *,
    merge_model: MergeFn,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Event]:
    """Start a run of several stages and yield its events.

    Raise what `run.train` raises; what any stage would refuse is refused before the first."""
    stage_inputs = stage_inputs or tuple(inputs.reload_inputs(plan) for plan in staged.plans)
    for plan, run_inputs in zip(staged.plans, stage_inputs, strict=True):
        run.check_run(plan, run_inputs, allow_code=allow_code)
    with RunFolder.create(Path(staged.output_dir)) as folder:
        folder.write_json(STAGES_FILE, staged)
        options: Json = {"merge_model": merge_model, "allow_code": allow_code, "ranks": ranks}
        yield from _run_stages(folder, staged, stage_inputs[0], **options)


def resume(
    path: Path,
    *,
    merge_model: MergeFn,
    allow_changes: bool = False,
    checkpoint: int | None = None,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Event]:
    """Continue with the first unfinished stage, from step `checkpoint` if given."""
    with RunFolder.open(path) as folder:
        run.refuse_finished(path)
        options: Json = {
            "merge_model": merge_model,
            "allow_changes": allow_changes,
            "checkpoint": checkpoint,
            "allow_code": allow_code,
            "ranks": ranks,
        }
        yield from _run_stages(folder, read_staged_plan(path), None, **options)


def _run_stages(
    folder: RunFolder,
    staged: StagedPlan,
    first_inputs: RunInputs | None,
    *,
    merge_model: MergeFn,
    allow_changes: bool = False,
    checkpoint: int | None = None,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Event]:
    stage_dirs = _list_stage_dirs(folder.path, staged)
    for index, (stage_dir, plan) in enumerate(zip(stage_dirs, staged.plans, strict=True)):
        if (stage_dir / RECORD_FILE).exists():
            continue
        stage = StageStart(
            index + 1,
            len(stage_dirs),
            plan.config.stage,
            plan.steps,
            f"{STAGES_DIR}/{stage_dir.name}",
        )
        folder.append_event(stage)
        yield stage
        if (stage_dir / PLAN_FILE).exists():
            yield from run.resume(
                stage_dir,
                allow_changes=allow_changes,
                checkpoint=checkpoint,
                allow_code=allow_code,
                ranks=ranks,
            )
            checkpoint = None
            continue
        checkpoint = None
        if index == 0 and first_inputs:
            yield from run.train(plan, first_inputs, allow_code=allow_code, ranks=ranks)
            continue
        overrides: Json = {}
        if index > 0 and plan.config.between_stages == CONTINUE_ADAPTER:
            previous_dir = stage_dirs[index - 1]
            overrides["adapter_from"] = str(previous_dir.absolute())
            overrides["model"] = rebuild_recipe(read_run_plan(previous_dir).recipe).model
        elif index > 0:
            model_dir, results = _merge_stage_model(stage_dirs[index - 1], merge_model)
            for result in results:
                folder.append_event(result)
                yield result
            overrides["model"] = str(model_dir.absolute())
            overrides["add_tokens"] = []
        stage_plan, stage_inputs = _prepare_stage(plan, stage_dir, overrides)
        yield from run.train(stage_plan, stage_inputs, allow_code=allow_code, ranks=ranks)
    resume_hint = f"continue with: tunesmith resume {folder.path}"
    with GracefulStop(resume_hint) as stop, stop.immediate(), machine_errors():
        record = _build_record(folder.path, staged, allow_code=allow_code)
    folder.flush()
    fingerprint = read_sealed_json(stage_dirs[-1] / FINGERPRINT_FILE)
    write_card(record, fingerprint, stages=[stage_dir.name for stage_dir in stage_dirs])
    folder.write_json(RECORD_FILE, record)


def _list_stage_dirs(path: Path, staged: StagedPlan) -> list[Path]:
    return [path / STAGES_DIR / Path(plan.config.output_dir).name for plan in staged.plans]


def _merge_stage_model(previous_dir: Path, merge_model: MergeFn) -> tuple[Path, list[CheckResult]]:
    """Return the folder of a stage's full model, and the result of merging it if that was needed.

    Raise GateError if the merged model does not answer as the stage does."""
    if read_run_plan(previous_dir).config.method == "full":
        return previous_dir / MODEL_DIR, []
    merged_dir = previous_dir / MERGED
    if not merged_dir.exists():
        with machine_errors():
            evidence = merge_model(previous_dir, merged_dir)
        location = f"{STAGES_DIR}/{previous_dir.name}/{MERGED}"
        return merged_dir, [CheckResult(MERGED, "ok", f"{location}: {evidence}")]
    if problem := verify_dir(merged_dir):
        raise InputError(
            f"the merged model is damaged: {problem}",
            where=str(merged_dir),
            fix="delete the folder and resume: it is made again",
        )
    return merged_dir, []


def _prepare_stage(plan: Plan, stage_dir: Path, overrides: Json) -> tuple[Plan, RunInputs]:
    """Plan a stage again now that the previous one is finished.

    Raise InputError if its rows have changed since the first plan."""
    recipe = rebuild_recipe(plan.recipe | overrides)
    now = datetime.fromisoformat(plan.config.now)
    run_inputs = inputs.load_inputs(recipe, now=now, output_dir=stage_dir)
    inputs.refuse_changed_rows(plan, run_inputs)
    inherited = {BETWEEN_KEY: plan.settings[BETWEEN_KEY]} if overrides else None
    return planner.make_plan(run_inputs, inherited), run_inputs


# ---------------------------------------------------------------- after a run


def evaluate_stages(
    path: Path, *, allow_code: bool = False, ranks: Ranks = SINGLE_PROCESS
) -> Evaluation:
    """Measure the first stage's starting model and the last stage's result again."""
    staged = read_staged_plan(path)
    before, after = _measure_stages(path, staged, allow_code=allow_code, ranks=ranks)
    errors = _analyze_errors(path, before, after, staged)
    return Evaluation(compare_results(before, after, step=staged.steps), errors)


def _analyze_errors(
    path: Path, before: EvalResults, after: EvalResults, staged: StagedPlan
) -> ErrorAnalysis | None:
    """Analyze the errors on the test rows of all stages, with all training rows."""
    stages = [reload_inputs(read_run_plan(each), each) for each in _list_stage_dirs(path, staged)]
    rows = read_training_rows(stage.datasets["data"] for stage in stages)
    metrics = [metric for plan in staged.plans for metric in plan.config.metrics]
    return analyze_errors(before, after, rows=rows, graded_metrics=metrics)


def _measure_stages(
    path: Path, staged: StagedPlan, *, allow_code: bool, ranks: Ranks = SINGLE_PROCESS
) -> tuple[EvalResults, EvalResults]:
    """Return the metrics of all stages before the first one and after the last one."""
    stage_dirs = _list_stage_dirs(path, staged)
    plans = [read_run_plan(stage_dir) for stage_dir in stage_dirs]
    stage_inputs: list[RunInputs] = []
    stage_items: list[EvalItems] = []
    for index, (stage_dir, plan) in enumerate(zip(stage_dirs, plans, strict=True)):
        run_inputs = reload_inputs(plan, stage_dir)
        items = build_eval_items(plan, run_inputs, allow_code=allow_code)
        # The same general text is measured once, with the last stage that names it.
        later_sources = [later.recipe.get("retention_data") for later in plans[index + 1 :]]
        if plan.recipe.get("retention_data") in later_sources:
            items = dataclasses.replace(items, general_texts=())
        stage_inputs.append(run_inputs)
        stage_items.append(items)

    def measure_all(model: PackedCausalLM, step: int) -> EvalResults:
        model.ranks = ranks
        results: list[EvalResults] = []
        for stage_dir, plan, run_inputs, items in zip(
            stage_dirs, plans, stage_inputs, stage_items, strict=True
        ):
            session = open_eval_session(plan, run_inputs, model)
            stage_results = measure_items(session, items, step=step)
            results.append(_prefix_tasks(stage_dir.name, stage_results))
        return _join_results(results)

    trained_model = load_trained_model(stage_dirs[-1], plans[-1], stage_inputs[-1])
    after = measure_all(trained_model, staged.steps)
    del trained_model
    adapter = inputs.load_starting_adapter(plans[0], stage_inputs[0].model.path)
    first_inputs = dataclasses.replace(stage_inputs[0], adapter=adapter)
    before = measure_all(load_starting_model(plans[0], first_inputs), 0)
    return before, after


def _prefix_tasks(stage_name: str, results: EvalResults) -> EvalResults:
    """Put tasks and data roles under the name of the stage; general text belongs to all stages."""
    measurements = [
        measurement
        if measurement.task == GENERAL_TASK
        else dataclasses.replace(measurement, task=f"{stage_name} {measurement.task}")
        for measurement in results.measurements
    ]
    digests = {
        role if role == RETENTION_DATA else f"{stage_name} {role}": rows
        for role, rows in results.digests.items()
    }
    return dataclasses.replace(results, measurements=tuple(measurements), digests=digests)


def _join_results(stage_results: Sequence[EvalResults]) -> EvalResults:
    joined = EvalResults(())
    for results in stage_results:
        joined = EvalResults(
            joined.measurements + results.measurements,
            joined.samples + results.samples,
            joined.digests | results.digests,
            joined.shown_ids + results.shown_ids,
        )
    return joined


def _build_record(path: Path, staged: StagedPlan, *, allow_code: bool) -> RunRecord:
    """Return the record of all stages: sums over them, and metrics before and after all."""
    records = [read_run_record(stage_dir) for stage_dir in _list_stage_dirs(path, staged)]
    preflight: list[CheckResult] = []
    task_tokens: Counter[str] = Counter()
    input_changes: dict[str, None] = {}  # an ordered set
    for record in records:
        preflight += record.preflight
        task_tokens.update(record.task_tokens)
        input_changes |= dict.fromkeys(record.input_changes)
    before, after = _measure_stages(path, staged, allow_code=allow_code)
    write_file(path / EVAL_BEFORE_FILE, seal_json(before))
    write_file(path / EVAL_AFTER_FILE, seal_json(after))
    record = dataclasses.replace(
        records[-1],
        kl_scores=(),  # the last stage's, relative to its own start, as are its scales
        scales=(),
        preflight=tuple(preflight),
        comparisons=compare_results(before, after, step=staged.steps),
        samples=select_sample_pairs(before, after),
        steps=sum(record.steps for record in records),
        tokens=sum(record.tokens for record in records),
        train_seconds=sum(record.train_seconds for record in records),
        total_seconds=sum(record.total_seconds for record in records),
        peak_bytes=max(record.peak_bytes for record in records),
        train_peak_bytes=max(record.train_peak_bytes for record in records),
        task_tokens=dict(task_tokens),
        shared_tokens=sum(record.shared_tokens for record in records),
        input_changes=tuple(input_changes),
        errors=_analyze_errors(path, before, after, staged),
    )
    return dataclasses.replace(record, verdict=judge_run(record, path))
