"""The Python API: one function per verb of the command line.

    for event in tunesmith.train(tunesmith.plan("recipe.yaml", learning_rate=1e-4)): ...

In: paths, plain values and the objects of core/types.py. Out: the objects that --json prints.
Expected failures raise a TunesmithError. Imports are inside the functions so that nothing heavy
loads before a verb needs it. Verbs on data are in data.py. Left out: parsing arguments and printing
(cli/)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api.data import data_check as data_check
from tunesmith.api.data import data_curate as data_curate
from tunesmith.api.data import data_export_reviews as data_export_reviews
from tunesmith.api.data import data_import_reviews as data_import_reviews
from tunesmith.api.data import data_lock as data_lock
from tunesmith.api.data import data_show as data_show
from tunesmith.api.data import data_split as data_split
from tunesmith.api.inputs import AnyPath
from tunesmith.api.inputs import load_demo_inputs as load_demo_inputs
from tunesmith.api.inputs import load_inputs as load_inputs
from tunesmith.api.inputs import read_plan as read_plan
from tunesmith.api.inputs import read_recipe as read_recipe
from tunesmith.api.inputs import split_by_stage as split_by_stage
from tunesmith.core import run_dir
from tunesmith.core.errors import InputError
from tunesmith.core.events import Event
from tunesmith.core.hub_names import make_hub_path
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks, read_launch_time
from tunesmith.core.sampling import SamplingParams, check_sampling
from tunesmith.core.types import Json, Plan, RunRecord
from tunesmith.plan.stages import StagedPlan, require_single_stage

if TYPE_CHECKING:
    from tunesmith.advise.lr_finder import ShortRun, ShortRunTable
    from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice
    from tunesmith.advise.measured.run_arm import ArmResult
    from tunesmith.advise.rules.advice import Advice
    from tunesmith.advise.sweep.records import SweepEvent
    from tunesmith.api.inputs import AnyInputs as AnyInputs
    from tunesmith.core.evidence import RunVerdict
    from tunesmith.evaluate.model_ref import ModelComparison
    from tunesmith.evaluate.regression_gate import EvalReport
    from tunesmith.evaluate.verify.verification import LiveVerification
    from tunesmith.export.export import ExportResult
    from tunesmith.export.servers import ServerExport
    from tunesmith.plan.method_comparison import MethodEstimate
    from tunesmith.recipe.load import RecipeLike
    from tunesmith.recipe.template import InitResult
    from tunesmith.session.doctor import Diagnosis
    from tunesmith.session.run_list import RunSummary

# ---------------------------------------------------------------- before a run


def init(
    path: AnyPath = "recipe.yaml",
    *,
    model: str | None = None,
    data: str | None = None,
    from_config: AnyPath | None = None,
) -> InitResult:
    """Write a commented recipe and its JSON schema.

    `from_config` is a config of LLaMA-Factory, Axolotl or TRL to translate. Raises InputError if
    `path` exists or the config cannot be translated."""
    from tunesmith.recipe.template import write_recipe, write_translated

    if from_config is None:
        return write_recipe(Path(path), model=model, data=data)
    return write_translated(Path(path), Path(from_config), model=model, data=data)


def schema() -> Json:
    """Return the JSON schema of a recipe."""
    from tunesmith.recipe.schema import build_recipe_schema

    return build_recipe_schema()


def doctor() -> Diagnosis:
    """Check this machine: hardware and libraries."""
    from tunesmith.session.doctor import diagnose

    return diagnose()


def advise(path: AnyPath | None = None, **answers: Any) -> Advice:
    """Recommend whether to fine-tune, by rules.

    `path` is a YAML file of facts, or a recipe, in which case its rows are counted. `answers`
    override it: need="tone", examples=300. Raises InputError for an impossible answer."""
    from tunesmith.advise.rules.advice import advise
    from tunesmith.advise.rules.requirements import is_recipe, read_requirements

    file = None if path is None else Path(path)
    requirements = read_requirements(file, answers)
    return advise(requirements, file if file is not None and is_recipe(file) else None)


def advise_measured(
    recipe: RecipeLike | AnyInputs = None,
    *,
    documents: AnyPath | None = None,
    minutes: float = 10.0,
    target: float | None = None,
    margin: float = 0.1,
    base: str | None = None,
    folder: AnyPath = "runs/advise",
    ranks: Ranks = SINGLE_PROCESS,
    **changes: Any,
) -> Iterator[ExperimentStart | ArmResult | MeasuredAdvice]:
    """Recommend whether to fine-tune, measured on `eval_data` within `minutes`.

    Tries prompts, retrieval over `documents`, constrained decoding, prompts of another model `base`
    and short trainings. Yields an ExperimentStart, each ArmResult as it ends, and the
    MeasuredAdvice last. Results in `folder` are reused. The first of the recipe's `metrics` that
    grades the content of answers decides. Without a `target`, a cheaper approach may be worse by
    less than `margin`. With `ranks` this is rank 0 of several processes, which share the items
    out."""
    from tunesmith.advise.measured.experiment import ExperimentConfig, advise_measured
    from tunesmith.advise.measured.retrieval import open_passages
    from tunesmith.plan.build import refuse_if_too_large
    from tunesmith.session.planner import make_plan

    passages = None if documents is None else open_passages(Path(documents))
    inputs = require_single_stage(load_inputs(recipe, **changes))
    plan = make_plan(inputs)
    refuse_if_too_large(plan)
    config = ExperimentConfig(minutes, target, margin, Path(folder), ranks)
    other_base = None
    if base is not None:
        base_inputs = require_single_stage(load_inputs(recipe, **{**changes, "model": base}))
        other_base = make_plan(base_inputs), base_inputs
        refuse_if_too_large(other_base[0])
    yield from advise_measured(plan, inputs, passages, config, other_base)


def plan(
    recipe: RecipeLike | AnyInputs = None,
    *,
    target: str | None = None,
    memory: str | None = None,
    benchmark: bool = False,
    **changes: Any,
) -> Plan | StagedPlan:
    """Decide every setting of a run, with its reason, for each stage.

    `target` plans for that GPU or several ("8xh100"), `memory` for that much memory ("24GB"),
    instead of this machine. `benchmark` times real steps (about 10 seconds); otherwise no weights
    are loaded, and the model may be a config.json alone. Nothing is written. Raises InputError for
    a contradictory recipe."""
    from tunesmith.evaluate.metrics import refuse_invalid_metrics
    from tunesmith.session.planner import make_plan

    inputs = load_inputs(recipe, needs_weights=False, **changes)
    for stage_inputs in split_by_stage(inputs).values():
        refuse_invalid_metrics(stage_inputs)
    if isinstance(inputs, tuple) and not benchmark:
        from tunesmith.train import stages

        return stages.make_staged_plan([item.with_machine(target, memory) for item in inputs])
    single_inputs = require_single_stage(inputs).with_machine(target, memory)
    run_plan = make_plan(single_inputs)
    if not benchmark:
        return run_plan
    from tunesmith.train.calibrate import calibrate_plan
    from tunesmith.train.time_estimate import EvalCostEstimate, add_run_seconds

    # Built first, so that a setup that cannot be measured is refused before anything is timed.
    eval_cost = EvalCostEstimate(run_plan, single_inputs)
    return add_run_seconds(calibrate_plan(run_plan, single_inputs), eval_cost)


def compare_methods(
    recipe: RecipeLike | AnyInputs = None,
    *,
    target: str | None = None,
    memory: str | None = None,
    **changes: Any,
) -> tuple[MethodEstimate, ...]:
    """Estimate memory, compute, time and risk of full fine-tuning, LoRA and QLoRA."""
    from tunesmith.plan.hardware_presets import assume_bitsandbytes
    from tunesmith.plan.method_comparison import estimate_methods
    from tunesmith.session.adapter_settings import count_module_parameters
    from tunesmith.session.planner import make_planner

    inputs = require_single_stage(load_inputs(recipe, needs_weights=False, **changes))
    inputs = inputs.with_machine(target, memory)
    if inputs.adapter is not None:
        message = "methods cannot be compared when training continues an adapter"
        raise InputError(message, where="adapter_from", fix="leave it out")
    make_plan = make_planner(inputs)
    machine = assume_bitsandbytes(inputs.machine)
    return estimate_methods(
        lambda method: make_plan(inputs.recipe.model_copy(update={"method": method}), machine),
        lambda modules: count_module_parameters(inputs.model, modules),
    )


def tune_lr(
    recipe: RecipeLike | AnyInputs = None, *, steps: int = 40, **changes: Any
) -> Iterator[ShortRun | ShortRunTable]:
    """Train briefly at learning rates around the plan's; pick one by held-out loss.

    Yields each ShortRun as it ends, then the ShortRunTable. Nothing is written. Raises InputError
    without eval_data or eval_split, and for preference pairs."""
    from tunesmith.advise.lr_finder import find_learning_rate
    from tunesmith.plan.build import refuse_if_too_large
    from tunesmith.session.planner import make_plan

    inputs = require_single_stage(load_inputs(recipe, **changes))
    base_plan = make_plan(inputs)
    refuse_if_too_large(base_plan)
    yield from find_learning_rate(base_plan, inputs, steps=steps)


def tune_sweep(
    recipe: RecipeLike | AnyInputs = None,
    *,
    minutes: float | None = None,
    gpus: int | None = None,
    allow_code: bool = False,
    **changes: Any,
) -> Iterator[SweepEvent]:
    """Run the trials of the recipe's `sweep`; select on eval_data, test the winner once.

    Yields a SweepStart, for each trial a TrialStart, its TrialScores and a TrialEnd, and the
    SweepRecord last. `output_dir`, runs/sweep by default, holds the trials, each of which is a
    `tunesmith train` process; a folder with the same sweep is continued. With `gpus`, as many
    trials run at once, each with a GPU of its own (without a GPU: with its share of the cores).
    Raises InputError for a recipe that cannot be swept, GateError if every trial fails."""
    if find_spec("optuna") is None:
        message = "sweeps need Optuna, which is not installed"
        raise InputError(
            message, where="tune sweep", fix="pip install '.[sweep]' in tunesmith's folder"
        )
    from tunesmith.advise.sweep.run_sweep import run_sweep

    inputs = require_single_stage(load_inputs(recipe, **changes))
    output_dir = inputs.recipe.output_dir
    folder = output_dir if isinstance(output_dir, Path) else run_dir.RUNS_ROOT / "sweep"
    limit = math.inf if minutes is None else minutes
    yield from run_sweep(inputs, folder, minutes=limit, gpus=gpus, allow_code=allow_code)


# ---------------------------------------------------------------- runs


def train(
    plan: Plan | StagedPlan,
    inputs: AnyInputs | None = None,
    *,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Event]:
    """Run a plan in its `output_dir`, yielding events; the run advances as they are consumed.

    `inputs` saves reading the data again. `allow_code` permits metrics that are Python files. With
    `ranks` this is rank 0 of several processes, and the others call `tunesmith.train.follow`.
    Raises MachineError if it does not fit in memory, GateError if the preflight fails."""
    if isinstance(plan, StagedPlan):
        from tunesmith.export.export import merge_stage
        from tunesmith.train import stages

        stage_inputs = inputs if isinstance(inputs, tuple) else None
        options: Any = {"allow_code": allow_code, "ranks": ranks}
        return stages.train(plan, stage_inputs, merge_model=merge_stage, **options)
    if not isinstance(plan, Plan):
        message = f"train takes a Plan, not a {type(plan).__name__}"
        fix = 'make one: plan = tunesmith.plan("recipe.yaml")'
        raise InputError(message, where="train", fix=fix)
    from tunesmith.train import run

    run_inputs = None if isinstance(inputs, tuple) else inputs
    return run.train(plan, run_inputs, allow_code=allow_code, ranks=ranks)


def find_interrupted_run(plan: Plan | StagedPlan, ranks: Ranks) -> Path | None:
    """Return the run of this recipe that torchrun has started again, None for a first start."""
    if not ranks.restarts:
        return None
    from tunesmith.train import resume

    return resume.find_interrupted_run(plan, read_launch_time())


def resume(
    path: AnyPath,
    *,
    allow_changes: bool = False,
    checkpoint: int | None = None,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Event]:
    """Resume an interrupted run from its newest valid checkpoint, or from step `checkpoint`.

    Raises InputError if it is finished or, unless `allow_changes`, if its inputs have changed."""
    run_dir.require_run(Path(path))
    from tunesmith.train import run, stages

    options: Any = {
        "allow_changes": allow_changes,
        "checkpoint": checkpoint,
        "allow_code": allow_code,
        "ranks": ranks,
    }
    if run_dir.is_staged(Path(path)):
        from tunesmith.export.export import merge_stage

        return stages.resume(Path(path), merge_model=merge_stage, **options)
    return run.resume(Path(path), **options)


def demo(output_dir: AnyPath | None = None) -> Iterator[Event]:
    """Train the embedded example in `output_dir` or runs/demo-N."""
    inputs = load_demo_inputs(output_dir)
    return train(plan(inputs), inputs)


# ---------------------------------------------------------------- after a run


def list_runs(roots: Iterable[AnyPath] = ("runs",)) -> list[RunSummary]:
    """Return the runs at or below folders, newest first. Raises InputError for a missing one."""
    from tunesmith.session import run_list

    return run_list.list_runs([Path(root) for root in roots])


def read_record(path: AnyPath) -> RunRecord:
    """Read the results of a finished run. Raises InputError if it is not finished."""
    return run_dir.read_run_record(Path(path))


def evaluate(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    metrics: str | Sequence[str] | None = None,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> EvalReport:
    """Measure a finished run before and after, on its own items or on the rows of `data`.

    `target` is a run, RUN@0.5 (adapter scale), RUN/checkpoints/step-N, an adapter, or a model,
    which has scores only. `metrics` replace the run's. `ranks` are processes in lockstep that share
    the items out. Raises InputError for an invalid row."""
    from tunesmith.evaluate.model_ref import parse_model_ref, refuse_untrained

    ref = parse_model_ref(str(target))  # a wrong name is refused before torch is loaded
    if ref.run_dir is not None and ref.checkpoint_dir is None:
        refuse_untrained(ref.run_dir)
    from tunesmith.evaluate import compare_models
    from tunesmith.evaluate.regression_gate import EvalReport, parse_metrics
    from tunesmith.train import stages

    data_path = None if data is None else Path(make_hub_path(str(data), Path()) or data)
    spec = compare_models.EvalSpec(data_path, parse_metrics(metrics), allow_code, ranks)
    is_default = spec.data is None and not spec.metrics
    is_after = ref.results_file == run_dir.EVAL_AFTER_FILE
    if is_default and is_after and ref.run_dir is not None and run_dir.is_staged(ref.run_dir):
        evaluation = stages.evaluate_stages(ref.run_dir, allow_code=allow_code, ranks=ranks)
        return EvalReport.from_evaluation(evaluation, ref.run_dir)
    if ref.run_dir is None and not compare_models.is_adapter_dir(Path(ref.name)):
        results = compare_models.evaluate_model(ref, ref, spec)
        return EvalReport.from_results(results, spec.metrics)
    evaluation = compare_models.evaluate_before_after(ref, spec)
    return EvalReport.from_evaluation(evaluation, ref.run_dir)


def compare(a: AnyPath, b: AnyPath, *, allow_code: bool = False) -> ModelComparison:
    """Compare `b` with `a`, item by item.

    Each is a run, RUN@0.5 (adapter scale), RUN/checkpoints/step-N, "base", or a JSONL file of
    answers. A model is loaded only for results that no run folder has. Raises InputError for
    unfinished runs and without a metric in common."""
    from tunesmith.evaluate.model_ref import compare_models, load_cached_results, parse_model_ref

    first = parse_model_ref(str(a))
    second = parse_model_ref(str(b))
    first_results = load_cached_results(first, second)
    second_results = load_cached_results(second, first)
    if first_results is None or second_results is None:
        from tunesmith.evaluate.compare_models import EvalSpec, evaluate_model

        spec = EvalSpec(allow_code=allow_code)
        first_results = first_results or evaluate_model(first, second, spec)
        second_results = second_results or evaluate_model(second, first, spec)
    return compare_models([first, second], [first_results, second_results])


def read_verdict(path: AnyPath) -> RunVerdict:
    """Return whether a run's model may be used, and what to do next; also of an unfinished run."""
    from tunesmith.evaluate import run_verdict

    return run_verdict.read_verdict(Path(path))


def write_report(path: AnyPath, out: AnyPath | None = None) -> Path:
    """Write the HTML report of a run, finished or not, to `out` or RUN/report.html.

    Raises InputError if `path` is not a run folder, or is damaged."""
    from tunesmith.report.page import write_report

    return write_report(Path(path), None if out is None else Path(out))


def chat(
    path: AnyPath,
    questions: str | Iterable[str],
    sampling: SamplingParams | None = None,
    *,
    system: str | None = None,
) -> Iterator[str]:
    """Yield the answers of a run's adapter to one question, or to each turn of a conversation.

    Decoding is greedy unless `sampling` has a temperature. `system` replaces the system message of
    the training rows; an empty text means none."""
    run_dir.require_run(Path(path))
    check_sampling(sampling := sampling or SamplingParams())
    from tunesmith.evaluate.model_ref import refuse_untrained

    refuse_untrained(Path(path))
    from tunesmith.session import chat as chatting

    turns = [questions] if isinstance(questions, str) else questions
    return chatting.chat(Path(path), turns, sampling, system=system)


def verify(
    path: AnyPath, url: str, *, model: str | None = None, key: str = "", items: int = 64
) -> LiveVerification:
    """Ask a server the test rows of a finished run; return whether it answers as the run did.

    `url` is that of an OpenAI-compatible API, such as http://localhost:8000/v1. `model` may be left
    out for a server with one. `key` is sent as a bearer token. Raises InputError for a run without
    recorded answers, and MachineError for a server that cannot be reached or fails."""
    if find_spec("httpx") is None:
        message = "asking a server needs httpx, which is not installed"
        raise InputError(
            message, where="verify", fix="pip install '.[verify]' in tunesmith's folder"
        )
    from tunesmith.evaluate.verify.server_client import LiveClient, choose_model
    from tunesmith.evaluate.verify.verification import verify_run

    run_dir.require_run(Path(path))
    client = LiveClient(url, key)
    return verify_run(Path(path), client, choose_model(client, model), num_items=items)


def export(
    path: AnyPath,
    to: str,
    *,
    type: str | None = None,
    scale: float = 1.0,
    out: AnyPath | None = None,
) -> ExportResult:
    """Export a finished run as "peft", "merged", "gguf" or "ollama", checked against the run.

    `type` of a GGUF: "f16", "q8_0", "bf16" or "f32". `scale` multiplies the adapter. `out` is a new
    folder, RUN/export/TO by default. Raises GateError, and leaves no files, if the export does not
    answer as the run does."""
    run_dir.require_run(Path(path))
    from tunesmith.export.request import check_request, choose_output_path, choose_type

    out = None if out is None else Path(out)
    check_request(Path(path), to, type)
    choose_output_path(Path(path), to, choose_type(to, type), scale=scale, out=out)
    from tunesmith.export.export import export_run

    return export_run(Path(path), to, kind=type, scale=scale, out=out)


def export_servers(
    paths: Iterable[AnyPath],
    to: str,
    *,
    type: str | None = None,
    scale: float = 1.0,
    out: AnyPath | None = None,
) -> ServerExport:
    """Export finished runs with the files that start "vllm", "sglang", "llama-server", "kserve" or
    "ray" with them, each checked against its run as by `export`.

    `type` is that of llama-server's GGUF. `out` is a new folder, needed for several runs. Raises
    what `export` raises, and InputError for runs that the engine or one server cannot hold."""
    folders = [Path(path) for path in paths]
    for folder in folders:
        run_dir.require_run(folder)
    from tunesmith.export.request import check_request, choose_server_path

    for folder in folders:
        check_request(folder, to, type)
    out = None if out is None else Path(out)
    choose_server_path(folders, to, out)
    from tunesmith.export.servers import export_servers

    return export_servers(folders, to, kind=type, scale=scale, out=out)
