"""Several stages in one recipe: one run after the other in one folder, each going on with what the
last one left.

    Stages -> gather -> make_plan -> StagedPlan -> train -> events; resume: from the first stage that is not finished

    RUN/stages.json         the plans of all stages, made before the first began
    RUN/stages/1-cpt/       an ordinary run folder
    RUN/stages/2-sft/       another one; its adapter_from is the one before, or its model RUN/stages/1-cpt/merged
    RUN/record.json         of the whole: before is the model that the first stage began with, after is the last one;
                            before.json and after.json hold the measures item by item

What a stage is and how it goes on is run.py's business. Why so: docs/design/stages.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import verify_dir, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, CheckResult, Event, StageStart
from tunesmith.core.json_io import dump_json, parse_as, read_json
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
)
from tunesmith.core.types import Comparison, Json, Plan, PlanValue, RunRecord
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.results import (
    RETENTION_DATA,
    EvalResults,
    compare_results,
    select_sample_pairs,
)
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.oom import memory_errors
from tunesmith.plan.build import is_compatible, normalize
from tunesmith.plan.stages import StagedPlan
from tunesmith.recipe.load import recipe_from_plan
from tunesmith.recipe.schema import Stages
from tunesmith.session import inputs
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
INHERITED_KEYS = ("method", "lora_r", "lora_alpha", TARGET_MODULES_KEY, "use_rslora", "use_dora")
BETWEEN_KEY = "between_stages"
CONTINUE_ADAPTER, MERGED = "the adapter goes on", "merged"
CONTINUE_CHOICE = PlanValue(
    CONTINUE_ADAPTER,
    "rule",
    "nothing is rounded, the whole run is one adapter, and the base is there without it",
    "ours",
)


# ---------------------------------------------------------------- before a run


def load_stage_inputs(stages: Stages, *, weights: bool = True) -> tuple[RunInputs, ...]:
    """The facts of each stage; dates are frozen at one moment."""
    output_dir, now = stages.recipes[0].output_dir, datetime.now()
    run_dir = output_dir if isinstance(output_dir, Path) else pick_run_folder(Path("runs"), "run")
    return tuple(
        inputs.load_inputs(
            recipe,
            now=now,
            output_dir=run_dir / STAGES_DIR / f"{number}-{recipe.stage}",
            needs_weights=weights,
        )
        for number, recipe in enumerate(stages.recipes, start=1)
    )


def make_staged_plan(stage_inputs: Sequence[RunInputs]) -> StagedPlan:
    """InputError for a stage that cannot be, or cannot go on with what the one before leaves."""
    plans: list[Plan] = []
    for run_inputs in stage_inputs:
        plan = inputs.make_plan(
            run_inputs, _inherit_values(plans[-1], run_inputs) if plans else None
        )
        if plans and _get_added_tokens(plan) != _get_added_tokens(plans[0]):
            message = f"the stage {plan.config.stage} adds other tokens than the first one, whose rows it goes on with"
            raise InputError(message, where="add_tokens", fix="add all of them in every stage")
        plans.append(plan)
    return StagedPlan(str(stage_inputs[0].output_dir.parent.parent), tuple(plans))


def _get_added_tokens(plan: Plan) -> dict[str, int]:
    return plan.config.add_tokens or {}


def _inherit_values(previous_plan: Plan, next_inputs: RunInputs) -> dict[str, PlanValue]:
    """What the stage before has decided of the next one."""
    name = Path(previous_plan.config.output_dir).name
    if reason := _explain_merge(previous_plan, next_inputs, name):
        return {BETWEEN_KEY: PlanValue(MERGED, "rule", reason, "ours")}
    return {
        key: PlanValue(getattr(previous_plan.config, key), "rule", f"the adapter of {name}, which goes on")
        for key in INHERITED_KEYS
    } | {BETWEEN_KEY: CONTINUE_CHOICE}


def _explain_merge(previous_plan: Plan, next_inputs: RunInputs, name: str) -> str:
    """Why no adapter can go on; "" where one can, which is better."""
    if previous_plan.config.method == "full":
        return f"all weights of {name} were trained: the model that it leaves is the base of this stage"
    for key in INHERITED_KEYS:
        requested, previous = getattr(next_inputs.recipe, key), getattr(previous_plan.config, key)
        if not is_compatible(requested, previous) and not (
            key == TARGET_MODULES_KEY
            and inputs.has_same_layers(next_inputs, requested, previous)
        ):
            message = f"{key} is {normalize(requested)} here, and {normalize(previous)} in the adapter of {name}"
            return f"{message}: that one goes into the weights, and what comes out is the base of this stage"
    return ""


# ---------------------------------------------------------------- a run


def train(
    staged: StagedPlan,
    stage_inputs: Sequence[RunInputs] | None = None,
    *,
    merge_model: MergeFn,
    allow_code: bool = False,
) -> Iterator[Event]:
    """A new run. Raises what `run.train` raises; what any stage would refuse is refused before the
    first begins."""
    stage_inputs = stage_inputs or tuple(inputs.reload_inputs(plan) for plan in staged.plans)
    for plan, run_inputs in zip(staged.plans, stage_inputs, strict=True):
        run.check_run(plan, run_inputs, allow_code=allow_code)
    with RunFolder.create(Path(staged.output_dir)) as folder:
        folder.write_json(STAGES_FILE, staged)
        options: Json = {"merge_model": merge_model, "allow_code": allow_code}
        yield from _run_stages(folder, staged, stage_inputs[0], **options)


def resume(
    path: Path,
    *,
    merge_model: MergeFn,
    allow_drift: bool = False,
    from_step: int | None = None,
    allow_code: bool = False,
) -> Iterator[Event]:
    """Goes on with the first stage that is not finished, then with those after it. `from_step` is
    of that stage."""
    with RunFolder.open(path) as folder:
        if (path / RECORD_FILE).exists():
            raise InputError(
                "this run is finished",
                where=str(path),
                fix="start a new one with another output_dir",
            )
        options: Json = {
            "merge_model": merge_model,
            "allow_drift": allow_drift,
            "from_step": from_step,
            "allow_code": allow_code,
        }
        yield from _run_stages(folder, read_staged(path), None, **options)


def read_staged(path: Path) -> StagedPlan:
    return parse_as(StagedPlan, read_json(path / STAGES_FILE), where=str(path / STAGES_FILE))


def _run_stages(
    folder: RunFolder,
    staged: StagedPlan,
    first_inputs: RunInputs | None,
    *,
    merge_model: MergeFn,
    allow_drift: bool = False,
    from_step: int | None = None,
    allow_code: bool = False,
) -> Iterator[Event]:
    stage_dirs = _list_stage_dirs(folder.path, staged)
    for number, (stage_dir, plan) in enumerate(zip(stage_dirs, staged.plans, strict=True)):
        if (stage_dir / RECORD_FILE).exists():
            continue
        stage = StageStart(
            number + 1, len(stage_dirs), plan.config.stage, plan.steps, f"{STAGES_DIR}/{stage_dir.name}"
        )
        folder.append_event(stage)
        yield stage
        if (stage_dir / PLAN_FILE).exists():
            yield from run.resume(
                stage_dir, allow_drift=allow_drift, from_step=from_step, allow_code=allow_code
            )
        elif number == 0:
            prepared = (plan, first_inputs) if first_inputs else _prepare_stage(plan, stage_dir, {})
            yield from run.train(*prepared, allow_code=allow_code)
        elif plan.config.between_stages == CONTINUE_ADAPTER:
            prepared = _prepare_stage(plan, stage_dir, _build_adapter_start(stage_dirs[number - 1]))
            yield from run.train(*prepared, allow_code=allow_code)
        else:
            model_dir, verdicts = _merge_stage_model(stage_dirs[number - 1], merge_model)
            for verdict in verdicts:
                folder.append_event(verdict)
                yield verdict
            prepared = _prepare_stage(
                plan, stage_dir, {"model": str(model_dir.absolute()), "add_tokens": []}
            )
            yield from run.train(*prepared, allow_code=allow_code)
        from_step = None
    with (
        GracefulStop(f"go on with: tunesmith resume {folder.path}") as stop,
        stop.immediate(),
        memory_errors(),
    ):
        record = _build_record(folder.path, staged, allow_code=allow_code)
    folder.flush()
    write_card(
        record,
        read_json(stage_dirs[-1] / FINGERPRINT_FILE),
        stages=[stage_dir.name for stage_dir in stage_dirs],
    )
    folder.write_json(RECORD_FILE, record)


def _list_stage_dirs(path: Path, staged: StagedPlan) -> list[Path]:
    return [path / STAGES_DIR / Path(plan.config.output_dir).name for plan in staged.plans]


def _build_adapter_start(previous_dir: Path) -> Json:
    """What a stage starts with: the adapter of the one before, and its base."""
    return {
        "adapter_from": str(previous_dir.absolute()),
        "model": read_run_plan(previous_dir).recipe["model"],
    }


def _merge_stage_model(
    previous_dir: Path, merge_model: MergeFn
) -> tuple[Path, list[CheckResult]]:
    """The folder of the whole model that a stage left, merged if it is not there yet; and what
    there is to say. GateError when the merged weights do not answer as the run does."""
    if read_run_plan(previous_dir).config.method == "full":
        return previous_dir / MODEL_DIR, []
    merged_dir, verdicts = previous_dir / MERGED, list[CheckResult]()
    if not merged_dir.exists():
        with memory_errors():
            evidence = merge_model(previous_dir, merged_dir)
        verdicts.append(
            CheckResult(MERGED, "ok", f"{STAGES_DIR}/{previous_dir.name}/{MERGED}: {evidence}")
        )
    elif problem := verify_dir(merged_dir):
        raise InputError(
            f"not as it was written: {problem}",
            where=str(merged_dir),
            fix="remove it: it is made again",
        )
    return merged_dir, verdicts


def _prepare_stage(plan: Plan, stage_dir: Path, overrides: Json) -> tuple[Plan, RunInputs]:
    """The plan of a stage made again, now that there is something to start from. Raises InputError
    when its rows have changed since the first plan."""
    recipe = recipe_from_plan(plan.recipe | overrides)
    run_inputs = inputs.load_inputs(
        recipe, now=datetime.fromisoformat(plan.config.now), output_dir=stage_dir
    )
    inputs.refuse_changed_rows(plan, run_inputs)
    return inputs.make_plan(
        run_inputs, {BETWEEN_KEY: plan.settings[BETWEEN_KEY]} if overrides else None
    ), run_inputs


# ---------------------------------------------------------------- after a run


def evaluate_stages(path: Path, *, allow_code: bool = False) -> tuple[Comparison, ...]:
    """The before/after of the whole, measured again."""
    staged = read_staged(path)
    return compare_results(*_measure_stages(path, staged, allow_code=allow_code), step=staged.steps)


def _measure_stages(
    path: Path, staged: StagedPlan, *, allow_code: bool
) -> tuple[EvalResults, EvalResults]:
    """What every stage measures, on the model that the first began with and on what the last one
    left."""
    stage_dirs = _list_stage_dirs(path, staged)
    plans = [read_run_plan(stage_dir) for stage_dir in stage_dirs]
    stage_inputs = [
        reload_inputs(plan, stage_dir) for plan, stage_dir in zip(plans, stage_dirs, strict=True)
    ]
    items = [
        build_eval_items(plan, run_inputs, allow_code=allow_code)
        for plan, run_inputs in zip(plans, stage_inputs, strict=True)
    ]
    text_sources = [plan.recipe["retention_data"] for plan in plans]
    for number in range(len(items)):
        if text_sources[number] in text_sources[number + 1 :]:
            items[number] = dataclasses.replace(items[number], general_texts=())

    def measure_all(model: PackedCausalLM, step: int) -> EvalResults:
        stages = zip(stage_dirs, plans, stage_inputs, items, strict=True)
        results = [
            _prefix_tasks(
                stage_dir.name,
                measure_items(open_eval_session(plan, run_inputs, model), stage_items, step=step),
            )
            for stage_dir, plan, run_inputs, stage_items in stages
        ]
        return _join_results(results)

    after = measure_all(
        load_trained_model(stage_dirs[-1], plans[-1], stage_inputs[-1]), staged.steps
    )
    adapter = inputs.load_starting_adapter(plans[0], stage_inputs[0].model.path)
    before = measure_all(
        load_starting_model(plans[0], dataclasses.replace(stage_inputs[0], adapter=adapter)), 0
    )
    return before, after


def _prefix_tasks(name: str, results: EvalResults) -> EvalResults:
    """Its tasks and items under the name of the stage; general text is the same for all."""
    measurements = [
        measurement
        if measurement.task == GENERAL_TASK
        else dataclasses.replace(measurement, task=f"{name} {measurement.task}")
        for measurement in results.measurements
    ]
    contents = {
        role if role == RETENTION_DATA else f"{name} {role}": rows
        for role, rows in results.digests.items()
    }
    return dataclasses.replace(results, measurements=tuple(measurements), digests=contents)


def _join_results(stage_results: Sequence[EvalResults]) -> EvalResults:
    return EvalResults(
        tuple(measurement for results in stage_results for measurement in results.measurements),
        tuple(sample for results in stage_results for sample in results.samples),
        {role: rows for results in stage_results for role, rows in results.digests.items()},
        tuple(row for results in stage_results for row in results.shown_ids),
    )


def _build_record(path: Path, staged: StagedPlan, *, allow_code: bool) -> RunRecord:
    """Sums over the stages, and the whole's own before and after."""
    stage_dirs = _list_stage_dirs(path, staged)
    stage_records = [
        parse_as(RunRecord, read_json(stage_dir / RECORD_FILE), where=str(stage_dir / RECORD_FILE))
        for stage_dir in stage_dirs
    ]
    before, after = _measure_stages(path, staged, allow_code=allow_code)
    for name, results in ((EVAL_BEFORE_FILE, before), (EVAL_AFTER_FILE, after)):
        write_file(path / name, dump_json(results, indent=2))
    return dataclasses.replace(
        stage_records[-1],
        kl_scores=(),  # of the last stage alone, as are its scales
        scales=(),
        preflight=tuple(verdict for record in stage_records for verdict in record.preflight),
        comparisons=compare_results(before, after, step=staged.steps),
        samples=select_sample_pairs(before, after),
        steps=sum(record.steps for record in stage_records),
        tokens=sum(record.tokens for record in stage_records),
        train_seconds=sum(record.train_seconds for record in stage_records),
        peak_bytes=max(record.peak_bytes for record in stage_records),
        task_tokens=dict(
            sum((Counter(record.task_tokens) for record in stage_records), Counter[str]())
        ),
        shared_tokens=sum(record.shared_tokens for record in stage_records),
        input_changes=tuple(
            dict.fromkeys(text for record in stage_records for text in record.input_changes)
        ),
    )
