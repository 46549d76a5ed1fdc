"""The verbs as functions: `import tunesmith` offers them, the command line calls them.

    plan = tunesmith.plan("recipe.yaml", learning_rate=1e-4)
    for event in tunesmith.train(plan): ...

In: paths, plain values, and the frozen objects of types.py. Out: the objects that --json prints.
Everything that goes wrong on purpose is a TunesmithError: InputError, MachineError, GateError or
Interrupted. Imports stand inside the functions, here and in cli.py only: nothing heavy is loaded
before a verb needs it. The verbs on rows are in dataverbs.py. Left out: words and printing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import InputError
from tunesmith.core.events import Event
from tunesmith.core.types import Comparison, Json, Plan, RunRecord
from tunesmith.plan.stages import StagedPlan
from tunesmith.recipe.schema import Recipe, Stages

if TYPE_CHECKING:
    from tunesmith.advise.lr_finder import LRFinderResult, LRTrial
    from tunesmith.advise.rules.advice import Advice
    from tunesmith.evaluate.evaluated import EvalReport
    from tunesmith.evaluate.model_ref import ModelComparison
    from tunesmith.export.export import ExportResult
    from tunesmith.plan.method_comparison import MethodEstimate
    from tunesmith.recipe.template import InitResult
    from tunesmith.session.doctor import Diagnosis
    from tunesmith.session.inputs import RunInputs

    AnyInputs = RunInputs | tuple[RunInputs, ...]  # of several stages one each

AnyPath = str | Path
RecipeLike = AnyPath | Mapping[str, Any] | Recipe | Stages | None

SINGLE_STAGE_FIX = "name one of them, with the keys that it needs: --stage sft"

# ---------------------------------------------------------------- before a run


def init(
    path: AnyPath = "recipe.yaml",
    *,
    model: str | None = None,
    data: str | None = None,
    from_config: AnyPath | None = None,
) -> InitResult:
    """Writes a commented recipe and its schema, or a translation of `from_config`, a config of
    another tool.

    InputError if there is a file at `path` already, or if the config cannot be translated.
    """
    from tunesmith.recipe.template import write_recipe, write_translated

    if from_config is None:
        return write_recipe(Path(path), model=model, data=data)
    return write_translated(Path(path), Path(from_config), model=model, data=data)


def schema() -> Json:
    """The JSON schema of a recipe."""
    from tunesmith.recipe.schema import build_recipe_schema

    return build_recipe_schema()


def doctor(model: str | None = None) -> Diagnosis:
    """What this machine has, lacks and can train; `model` is fetched if need be."""
    from tunesmith.session.doctor import diagnose

    return diagnose(model)


def advise(path: AnyPath | None = None, **answers: Any) -> Advice:
    """Whether to fine-tune, and what else, with reasons. `path`: a YAML file of facts, or a recipe,
    whose rows are counted; `facts` win over it: need="tone", examples=300. InputError for facts
    that cannot be."""
    from tunesmith.advise.rules.advice import advise
    from tunesmith.advise.rules.questionnaire import is_recipe, read_requirements

    file = None if path is None else Path(path)
    requirements = read_requirements(file, answers)
    return advise(requirements, file if file is not None and is_recipe(file) else None)


def read_recipe(recipe: RecipeLike = None, **changes: Any) -> Recipe | Stages:
    """A recipe from a YAML file, a mapping or another recipe; `changes` win over it. Keys in any
    spelling. Stages, if its `stage` is a list.

    Paths in a file are relative to it, all others to the current folder. InputError lists
    everything that is wrong."""
    from tunesmith.recipe.load import load_recipe

    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return load_recipe(None, arguments=(values, changes)) if changes else recipe
    if isinstance(recipe, Stages):
        recipes = [read_recipe(stage_recipe, **changes) for stage_recipe in recipe.recipes]
        return Stages(
            tuple(stage_recipe for stage_recipe in recipes if isinstance(stage_recipe, Recipe))
        )
    if isinstance(recipe, Mapping):
        return load_recipe(None, arguments=(recipe, changes))
    if recipe is None or isinstance(recipe, (str, Path)):
        return load_recipe(Path(recipe) if recipe else None, arguments=(changes,))
    raise InputError(
        f"a recipe is a path, a mapping or a Recipe, not a {type(recipe).__name__}", where="recipe"
    )


def load_inputs(
    recipe: RecipeLike | AnyInputs = None, *, needs_weights: bool = True, **changes: Any
) -> AnyInputs:
    """What is known of a recipe's model, machine and rows; of several stages, for each. Gathered
    once, it can be given to the verbs below. Without `weights` a config.json will do for a model,
    which is enough to plan."""
    from tunesmith.session import inputs

    if isinstance(recipe, (inputs.RunInputs, tuple)):
        if not changes:
            return recipe
        recipe = (
            recipe.recipe
            if isinstance(recipe, inputs.RunInputs)
            else Stages(tuple(stage_inputs.recipe for stage_inputs in recipe))
        )
    loaded_recipe = read_recipe(recipe, **changes)
    if isinstance(loaded_recipe, Recipe):
        return inputs.load_inputs(loaded_recipe, needs_weights=needs_weights)
    from tunesmith.train import stages

    return stages.load_stage_inputs(loaded_recipe, weights=needs_weights)


def split_by_stage(inputs: AnyInputs) -> dict[str, RunInputs]:
    """The facts of each stage, by the name of its folder; of a single one, by none."""
    return (
        {stage_inputs.output_dir.name: stage_inputs for stage_inputs in inputs}
        if isinstance(inputs, tuple)
        else {"": inputs}
    )


def require_single_stage(inputs: AnyInputs) -> RunInputs:
    """Raises InputError for several stages."""
    if isinstance(inputs, tuple):
        raise InputError(
            "this is asked of one stage, and the recipe has several",
            where="stage",
            fix=SINGLE_STAGE_FIX,
        )
    return inputs


def plan(
    recipe: RecipeLike | AnyInputs = None,
    *,
    target: str | None = None,
    fit: str | None = None,
    calibrate: bool = False,
    **changes: Any,
) -> Plan | StagedPlan:
    """Every value of a run with its reason, for each stage. InputError for a wish that cannot be;
    nothing is loaded or written, and the model may be a config.json alone. `target`: for that GPU
    instead of this machine; `fit`: in this much memory. `calibrate`: how long it takes is measured,
    in about 10 seconds."""
    from tunesmith.evaluate.metrics import refuse_invalid_metrics
    from tunesmith.session.inputs import RunInputs, make_plan

    inputs = load_inputs(recipe, needs_weights=False, **changes)
    for stage_inputs in split_by_stage(inputs).values():
        refuse_invalid_metrics(stage_inputs)
    if isinstance(inputs, RunInputs) or calibrate:
        stage_inputs = _retarget_inputs(require_single_stage(inputs), target, fit)
        return _calibrate_plan(stage_inputs) if calibrate else make_plan(stage_inputs)
    from tunesmith.train import stages

    return stages.make_staged_plan(
        [_retarget_inputs(stage_inputs, target, fit) for stage_inputs in inputs]
    )


def _calibrate_plan(inputs: RunInputs) -> Plan:
    from tunesmith.session.inputs import make_plan
    from tunesmith.train.calibrate import calibrate_plan
    from tunesmith.train.time_estimate import EvalCostEstimate, add_run_seconds

    plan = make_plan(inputs)
    eval_cost = EvalCostEstimate(
        plan, inputs
    )  # first: what cannot be measured is refused before anything is timed
    return add_run_seconds(calibrate_plan(plan, inputs), eval_cost)


def record_run_history(record: RunRecord) -> None:
    """Later plans on this machine predict from what a run took."""
    from tunesmith.session.run_history import save_past_run

    save_past_run(record)


def compare_methods(
    recipe: RecipeLike | AnyInputs = None,
    *,
    target: str | None = None,
    fit: str | None = None,
    **changes: Any,
) -> tuple[MethodEstimate, ...]:
    """Full fine-tuning, LoRA and QLoRA of the same rows side by side: memory, work, time, risk,
    what is left."""
    from tunesmith.plan.hardware_presets import assume_bitsandbytes
    from tunesmith.plan.method_comparison import estimate_methods
    from tunesmith.session.inputs import make_planner

    inputs = _retarget_inputs(
        require_single_stage(load_inputs(recipe, needs_weights=False, **changes)), target, fit
    )
    if inputs.adapter is not None:
        raise InputError(
            "an adapter to go on with leaves no method open",
            where="adapter_from",
            fix="leave it out",
        )
    make_plan, machine = make_planner(inputs), assume_bitsandbytes(inputs.machine)
    return estimate_methods(
        lambda method: make_plan(inputs.recipe.model_copy(update={"method": method}), machine)
    )


def _retarget_inputs(inputs: RunInputs, target: str | None, fit: str | None) -> RunInputs:
    from tunesmith.plan.hardware_presets import choose_machine

    return dataclasses.replace(inputs, machine=choose_machine(inputs.machine, target, fit))


def read_plan(path: AnyPath) -> Plan | StagedPlan:
    """The plan of a run folder, or of a file that holds what `tunesmith plan --json` printed."""
    from tunesmith.core.json_io import parse_as, read_json
    from tunesmith.core.run_dir import STAGES_FILE, is_staged, require_run

    if not Path(path).is_file():
        require_run(Path(path))
    file = (
        Path(path) / (STAGES_FILE if is_staged(Path(path)) else "plan.json")
        if Path(path).is_dir()
        else Path(path)
    )
    content = read_json(file)
    return parse_as(StagedPlan if "plans" in content else Plan, content, where=str(file))


def tune_lr(
    recipe: RecipeLike | AnyInputs = None, *, steps: int = 40, **changes: Any
) -> Iterator[LRTrial | LRFinderResult]:
    """Short runs at five rates around the plan's, picked by held-out loss: each `Trial` as it ends,
    then the `RateTest`. Nothing is written. InputError without eval_data or eval_split, and for
    preference pairs."""
    from tunesmith.advise.lr_finder import summarize_trials, try_rates
    from tunesmith.plan.build import refuse_if_too_large
    from tunesmith.session.inputs import make_plan

    inputs = require_single_stage(load_inputs(recipe, **changes))
    base_plan = make_plan(inputs)
    refuse_if_too_large(base_plan)
    trials: list[LRTrial] = []
    for trial in try_rates(base_plan, inputs, steps=steps):
        trials.append(trial)
        yield trial
    yield summarize_trials(base_plan, trials)


# ---------------------------------------------------------------- runs


def train(
    plan: Plan | StagedPlan, inputs: AnyInputs | None = None, *, allow_code: bool = False
) -> Iterator[Event]:
    """A new run in the plan's `output_dir`; it goes on as the events are taken.

    `known` spares reading the rows again. `allow_code`: metrics of the recipe that are Python files
    may run. MachineError when it cannot fit, GateError when the proof fails."""
    if isinstance(plan, StagedPlan):
        from tunesmith.train import stages

        stage_inputs = inputs if isinstance(inputs, tuple) else None
        return stages.train(
            plan, stage_inputs, merge_model=_export_merged, allow_code=allow_code
        )
    if not isinstance(plan, Plan):
        message = f"train takes a Plan, not a {type(plan).__name__}"
        raise InputError(
            message, where="train", fix='make one: plan = tunesmith.plan("recipe.yaml")'
        )
    from tunesmith.train import run

    return run.train(plan, None if isinstance(inputs, tuple) else inputs, allow_code=allow_code)


def resume(
    path: AnyPath,
    *,
    allow_drift: bool = False,
    from_step: int | None = None,
    allow_code: bool = False,
) -> Iterator[Event]:
    """Goes on with an interrupted run, after its newest valid checkpoint or that of `from_step`.
    InputError if it is finished or none, and when what it stands on has changed, unless
    `allow_drift`. `allow_code`: as for `train`."""
    from tunesmith.core.run_dir import is_staged
    from tunesmith.train import run, stages

    run_dir = Path(path)
    options: dict[str, Any] = {
        "allow_drift": allow_drift,
        "from_step": from_step,
        "allow_code": allow_code,
    }
    if is_staged(run_dir):
        return stages.resume(run_dir, merge_model=_export_merged, **options)
    return run.resume(run_dir, **options)


def _export_merged(run_dir: Path, model_dir: Path) -> str:
    """Merge a finished stage's adapter into a model folder; return the evidence of parity."""
    from tunesmith.export.export import export_run

    parity = export_run(run_dir, "merged", out=model_dir).parity
    same = f"{parity.same_answers} of {parity.prompts} answers identical to the run's"
    return f"{same}, mean KL {parity.mean_kl:.1e} nats/token"


def demo(output_dir: AnyPath | None = None) -> Iterator[Event]:
    """The whole story on the embedded example, in `output_dir` or runs/demo-N."""
    inputs = load_demo_inputs(output_dir)
    return train(plan(inputs), inputs)


def load_demo_inputs(output_dir: AnyPath | None = None) -> AnyInputs:
    from tunesmith.core.run_dir import pick_run_folder
    from tunesmith.recipe.demo import DEMO_RECIPE

    return load_inputs(
        DEMO_RECIPE, output_dir=str(output_dir or pick_run_folder(Path("runs"), "demo"))
    )


# ---------------------------------------------------------------- after a run


def read_record(path: AnyPath) -> RunRecord:
    """What a finished run amounts to. InputError if it is not finished."""
    from tunesmith.core.json_io import parse_as, read_json

    file = Path(path) / "record.json"
    return parse_as(RunRecord, read_json(file), where=str(file))


def evaluate(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    metrics: str | Sequence[str] | None = None,
    allow_code: bool = False,
) -> tuple[Comparison, ...]:
    """Before and after on the same items, measured again; what `examine` takes, its comparisons
    alone."""
    return evaluate_full(target, data=data, metrics=metrics, allow_code=allow_code).comparisons


def evaluate_full(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    metrics: str | Sequence[str] | None = None,
    allow_code: bool = False,
) -> EvalReport:
    """A finished run before and after, on its own items or on the rows of `data`, by its own
    `metrics` or these. Also RUN@0.5, RUN/checkpoints/step-N or an adapter beside its base, and a
    model alone, which then has scores only. InputError for a row of `data` that cannot be used, and
    for metrics that the rows do not fit."""
    from tunesmith.core.run_dir import EVAL_AFTER_FILE, is_staged, read_run_plan
    from tunesmith.evaluate import compare_models, finished_run
    from tunesmith.evaluate.evaluated import EvalReport, parse_metrics
    from tunesmith.evaluate.model_ref import parse_model_ref
    from tunesmith.train import stages

    model_ref = parse_model_ref(str(target))
    spec = compare_models.EvalSpec(
        None if data is None else Path(data), parse_metrics(metrics), allow_code
    )
    is_default = spec.data is None and not spec.metrics
    if is_default and model_ref.results_file == EVAL_AFTER_FILE and model_ref.run_dir is not None:
        if is_staged(model_ref.run_dir):
            return EvalReport.from_comparisons(
                stages.evaluate_stages(model_ref.run_dir, allow_code=allow_code), model_ref.run_dir
            )
        if (
            read_run_plan(model_ref.run_dir).config.method != "full"
        ):  # which takes its base and what became of it one after the other
            return EvalReport.from_comparisons(
                finished_run.evaluate_run(model_ref.run_dir, allow_code=allow_code),
                model_ref.run_dir,
            )
    if model_ref.run_dir is None and not compare_models.is_adapter_dir(Path(model_ref.name)):
        return EvalReport(
            tuple(compare_models.evaluate_model(model_ref, model_ref, spec).iter_scores(step=0))
        )
    return EvalReport.from_comparisons(
        compare_models.evaluate_before_after(model_ref, spec), model_ref.run_dir
    )


def compare(a: AnyPath, b: AnyPath, *, allow_code: bool = False) -> ModelComparison:
    """`b` beside `a`, item by item: runs, RUN@0.5 for a scale of its adapter,
    RUN/checkpoints/step-N, "base", a JSONL file of answers. Two finished runs are compared by their
    files alone; a model is loaded only for what no file holds. InputError for runs that are not
    finished, and for sides without a measure in common."""
    from tunesmith.evaluate.model_ref import compare_models, load_cached_results, parse_model_ref

    refs = parse_model_ref(str(a)), parse_model_ref(str(b))
    results = [
        load_cached_results(ref, other_ref) for ref, other_ref in zip(refs, refs[::-1], strict=True)
    ]
    if None in results:
        from tunesmith.evaluate.compare_models import EvalSpec, evaluate_model

        results = [
            cached or evaluate_model(ref, other_ref, EvalSpec(allow_code=allow_code))
            for cached, ref, other_ref in zip(results, refs, refs[::-1], strict=True)
        ]
    return compare_models(
        [ref.name for ref in refs], [result for result in results if result is not None]
    )


def evaluate_baselines(
    path: AnyPath, *, allow_code: bool = False
) -> dict[str, tuple[Comparison, ...]]:
    """A finished run with constraints beside what costs no training: the base, the base told in the
    prompt, the base with tokens banned. Of each, how the trained model differs from it. InputError
    for a run without `never`."""
    from tunesmith.evaluate import finished_run

    return finished_run.compare_baselines(Path(path), allow_code=allow_code)


def measure_relearning(path: AnyPath) -> tuple[Comparison, ...]:
    """Whether what a run's general text lost is gone or only pushed aside: each domain by itself,
    and after other texts of it, where a model that still knows it is as good as before. InputError
    for a run without `retention_data`."""
    from tunesmith.evaluate import finished_run

    return finished_run.compare_relearning(Path(path))


def write_report(path: AnyPath, out: AnyPath | None = None) -> Path:
    """The page of a run, finished or not, as one HTML file: `out`, or report.html in the run
    folder. InputError for what is no run folder, or a damaged one."""
    from tunesmith.report.page import write_report

    return write_report(Path(path), None if out is None else Path(out))


def chat(path: AnyPath, questions: str | Iterable[str]) -> Iterator[str]:
    """The answers of a run's adapter to one question, or to the questions of one conversation as
    they come."""
    from tunesmith.evaluate import finished_run

    return finished_run.chat(Path(path), [questions] if isinstance(questions, str) else questions)


def export(
    path: AnyPath,
    to: str,
    *,
    type: str | None = None,
    base: str = "auto",
    scale: float = 1.0,
    out: AnyPath | None = None,
) -> ExportResult:
    """A finished run as peft, merged, gguf or ollama, compared with the run before it appears.

    `type`: of a GGUF: f16, q8_0, bf16, f32, or lora for the adapter alone. `base`: original,
    dequantized or auto, of a run on 4-bit weights. `scale`: the adapter times this, as RUN@SCALE is
    measured. `out`: a folder, else RUN/export/TO. GateError when what was written does not answer
    as the run does; then nothing is left."""
    from tunesmith.export.export import export_run

    output_path = None if out is None else Path(out)
    return export_run(
        Path(path), to, kind=type, base=base, scale=scale, out=output_path
    )
