"""The verbs as functions: `import tunesmith` offers them, the command line calls them.

    plan = tunesmith.plan("recipe.yaml", learning_rate=1e-4)
    for event in tunesmith.train(plan): ...

In: paths, plain values, and the frozen objects of types.py. Out: the objects that --json prints. Everything that goes
wrong on purpose is a TunesmithError: InputError, MachineError, GateError or Interrupted. Imports stand inside the
functions, here and in cli.py only: nothing heavy is loaded before a verb needs it. The verbs on rows are in
dataverbs.py. Left out: words and printing.
"""

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
    from tunesmith.advise.lr_finder import RateTest, Trial
    from tunesmith.advise.rules.advice import Advice
    from tunesmith.evaluate.evaluated import Evaluated
    from tunesmith.evaluate.model_ref import Compared
    from tunesmith.export.targets import Exported
    from tunesmith.plan.method_comparison import Outlook
    from tunesmith.recipe.template import Written
    from tunesmith.session.doctor import Diagnosis
    from tunesmith.session.inputs import Facts

    Known = Facts | tuple[Facts, ...]  # of several stages one each

AnyPath = str | Path
Wish = AnyPath | Mapping[str, Any] | Recipe | Stages | None

ONE_STAGE = "name one of them, with the keys that it needs: --stage sft"

# ---------------------------------------------------------------- before a run


def init(
    path: AnyPath = "recipe.yaml",
    *,
    model: str | None = None,
    data: str | None = None,
    from_config: AnyPath | None = None,
) -> Written:
    """Writes a commented recipe and its schema, or a translation of `from_config`, a config of another tool.

    InputError if there is a file at `path` already, or if the config cannot be translated.
    """
    from tunesmith.recipe.template import write_recipe, write_translated

    if from_config is None:
        return write_recipe(Path(path), model=model, data=data)
    return write_translated(Path(path), Path(from_config), model=model, data=data)


def schema() -> Json:
    """The JSON schema of a recipe."""
    from tunesmith.recipe.schema import recipe_schema

    return recipe_schema()


def doctor(model: str | None = None) -> Diagnosis:
    """What this machine has, lacks and can train; `model` is fetched if need be."""
    from tunesmith.session.doctor import diagnose

    return diagnose(model)


def advise(path: AnyPath | None = None, **facts: Any) -> Advice:
    """Whether to fine-tune, and what else, with reasons. `path`: a YAML file of facts, or a recipe, whose rows are
    counted; `facts` win over it: need="tone", examples=300. InputError for facts that cannot be."""
    from tunesmith.advise.rules.advice import advise
    from tunesmith.advise.rules.questionnaire import is_recipe, read_situation

    file = None if path is None else Path(path)
    known = read_situation(file, facts)
    return advise(known, file if file is not None and is_recipe(file) else None)


def read_recipe(recipe: Wish = None, **changes: Any) -> Recipe | Stages:
    """A recipe from a YAML file, a mapping or another recipe; `changes` win over it. Keys in any spelling. Stages, if
    its `stage` is a list.

    Paths in a file are relative to it, all others to the current folder. InputError lists everything that is wrong.
    """
    from tunesmith.recipe.load import load_recipe

    if isinstance(recipe, Recipe):
        written = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return load_recipe(None, arguments=(written, changes)) if changes else recipe
    if isinstance(recipe, Stages):
        made = [read_recipe(one, **changes) for one in recipe.recipes]
        return Stages(tuple(one for one in made if isinstance(one, Recipe)))
    if isinstance(recipe, Mapping):
        return load_recipe(None, arguments=(recipe, changes))
    if recipe is None or isinstance(recipe, (str, Path)):
        return load_recipe(Path(recipe) if recipe else None, arguments=(changes,))
    raise InputError(f"a recipe is a path, a mapping or a Recipe, not a {type(recipe).__name__}", where="recipe")


def gather(recipe: Wish | Known = None, *, weights: bool = True, **changes: Any) -> Known:
    """What is known of a recipe's model, machine and rows; of several stages, for each. Gathered once, it can be given
    to the verbs below. Without `weights` a config.json will do for a model, which is enough to plan."""
    from tunesmith.session import inputs

    if isinstance(recipe, (inputs.Facts, tuple)):
        if not changes:
            return recipe
        recipe = recipe.recipe if isinstance(recipe, inputs.Facts) else Stages(tuple(one.recipe for one in recipe))
    wish = read_recipe(recipe, **changes)
    if isinstance(wish, Recipe):
        return inputs.gather(wish, weights=weights)
    from tunesmith.train import stages

    return stages.gather(wish, weights=weights)


def by_stage(known: Known) -> dict[str, Facts]:
    """The facts of each stage, by the name of its folder; of a single one, by none."""
    return {one.output_dir.name: one for one in known} if isinstance(known, tuple) else {"": known}


def single(known: Known) -> Facts:
    """Raises InputError for several stages."""
    if isinstance(known, tuple):
        raise InputError("this is asked of one stage, and the recipe has several", where="stage", fix=ONE_STAGE)
    return known


def plan(
    recipe: Wish | Known = None,
    *,
    target: str | None = None,
    fit: str | None = None,
    calibrate: bool = False,
    **changes: Any,
) -> Plan | StagedPlan:
    """Every value of a run with its reason, for each stage. InputError for a wish that cannot be; nothing is loaded or
    written, and the model may be a config.json alone. `target`: for that GPU instead of this machine; `fit`: in this
    much memory. `calibrate`: how long it takes is measured, in about 10 seconds."""
    from tunesmith.evaluate.metrics import refuse_measures
    from tunesmith.session import inputs

    known = gather(recipe, weights=False, **changes)
    for one in by_stage(known).values():
        refuse_measures(one)
    if isinstance(known, inputs.Facts) or calibrate:
        one = _elsewhere(single(known), target, fit)
        return _calibrated(one) if calibrate else inputs.make_plan(one)
    from tunesmith.train import stages

    return stages.make_plan([_elsewhere(one, target, fit) for one in known])


def _calibrated(known: Facts) -> Plan:
    from tunesmith.session.inputs import make_plan
    from tunesmith.train.calibrate import calibrated
    from tunesmith.train.time_estimate import Beside, with_finish

    plan = make_plan(known)
    beside = Beside(plan, known)  # first: what cannot be measured is refused before anything is timed
    return with_finish(calibrated(plan, known), beside)


def remember(record: RunRecord) -> None:
    """Later plans on this machine predict from what a run took."""
    from tunesmith.session.run_history import remember

    remember(record)


def compare_methods(
    recipe: Wish | Known = None, *, target: str | None = None, fit: str | None = None, **changes: Any
) -> tuple[Outlook, ...]:
    """Full fine-tuning, LoRA and QLoRA of the same rows side by side: memory, work, time, risk, what is left."""
    from tunesmith.plan.hardware_presets import equipped
    from tunesmith.plan.method_comparison import compare
    from tunesmith.session.inputs import planner

    known = _elsewhere(single(gather(recipe, weights=False, **changes)), target, fit)
    if known.adapter is not None:
        raise InputError("an adapter to go on with leaves no method open", where="adapter_from", fix="leave it out")
    make, machine = planner(known), equipped(known.machine)
    return compare(lambda method: make(known.recipe.model_copy(update={"method": method}), machine))


def _elsewhere(known: Facts, target: str | None, fit: str | None) -> Facts:
    from tunesmith.plan.hardware_presets import machine_for

    return dataclasses.replace(known, machine=machine_for(known.machine, target, fit))


def read_plan(path: AnyPath) -> Plan | StagedPlan:
    """The plan of a run folder, or of a file that holds what `tunesmith plan --json` printed."""
    from tunesmith.core.json_io import from_json, read_json
    from tunesmith.core.run_dir import STAGES, is_staged, require_run

    if not Path(path).is_file():
        require_run(Path(path))
    file = Path(path) / (STAGES if is_staged(Path(path)) else "plan.json") if Path(path).is_dir() else Path(path)
    found = read_json(file)
    return from_json(StagedPlan if "plans" in found else Plan, found, where=str(file))


def tune_lr(recipe: Wish | Known = None, *, steps: int = 40, **changes: Any) -> Iterator[Trial | RateTest]:
    """Short runs at five rates around the plan's, picked by held-out loss: each `Trial` as it ends, then the
    `RateTest`. Nothing is written. InputError without eval_data or eval_split, and for preference pairs."""
    from tunesmith.advise.lr_finder import conclude, try_rates
    from tunesmith.plan.build import refuse_without_room
    from tunesmith.session.inputs import make_plan

    known = single(gather(recipe, **changes))
    decided = make_plan(known)
    refuse_without_room(decided)
    trials: list[Trial] = []
    for trial in try_rates(decided, known, steps=steps):
        trials.append(trial)
        yield trial
    yield conclude(decided, trials)


# ---------------------------------------------------------------- runs


def train(plan: Plan | StagedPlan, known: Known | None = None, *, allow_code: bool = False) -> Iterator[Event]:
    """A new run in the plan's `output_dir`; it goes on as the events are taken.

    `known` spares reading the rows again. `allow_code`: metrics of the recipe that are Python files may run.
    MachineError when it cannot fit, GateError when the proof fails.
    """
    if isinstance(plan, StagedPlan):
        from tunesmith.train import stages

        return stages.train(plan, known if isinstance(known, tuple) else None, allow_code=allow_code)
    if not isinstance(plan, Plan):
        what = f"train takes a Plan, not a {type(plan).__name__}"
        raise InputError(what, where="train", fix='make one: plan = tunesmith.plan("recipe.yaml")')
    from tunesmith.train import run

    return run.train(plan, None if isinstance(known, tuple) else known, allow_code=allow_code)


def resume(
    path: AnyPath, *, allow_drift: bool = False, from_step: int | None = None, allow_code: bool = False
) -> Iterator[Event]:
    """Goes on with an interrupted run, after its newest valid checkpoint or that of `from_step`. InputError if it is
    finished or none, and when what it stands on has changed, unless `allow_drift`. `allow_code`: as for `train`."""
    from tunesmith.core.run_dir import is_staged
    from tunesmith.train import run, stages

    go_on = stages.resume if is_staged(Path(path)) else run.resume
    return go_on(Path(path), allow_drift=allow_drift, from_step=from_step, allow_code=allow_code)


def demo(output_dir: AnyPath | None = None) -> Iterator[Event]:
    """The whole story on the embedded example, in `output_dir` or runs/demo-N."""
    known = demo_facts(output_dir)
    return train(plan(known), known)


def demo_facts(output_dir: AnyPath | None = None) -> Known:
    from tunesmith.core.run_dir import next_run_folder
    from tunesmith.recipe.demo import RECIPE

    return gather(RECIPE, output_dir=str(output_dir or next_run_folder(Path("runs"), "demo")))


# ---------------------------------------------------------------- after a run


def read_record(path: AnyPath) -> RunRecord:
    """What a finished run amounts to. InputError if it is not finished."""
    from tunesmith.core.json_io import from_json, read_json

    file = Path(path) / "record.json"
    return from_json(RunRecord, read_json(file), where=str(file))


def evaluate(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    metrics: str | Sequence[str] | None = None,
    allow_code: bool = False,
) -> tuple[Comparison, ...]:
    """Before and after on the same items, measured again; what `examine` takes, its comparisons alone."""
    return examine(target, data=data, metrics=metrics, allow_code=allow_code).comparisons


def examine(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    metrics: str | Sequence[str] | None = None,
    allow_code: bool = False,
) -> Evaluated:
    """A finished run before and after, on its own items or on the rows of `data`, by its own `metrics` or these. Also
    RUN@0.5, RUN/checkpoints/step-N or an adapter beside its base, and a model alone, which then has scores only.
    InputError for a row of `data` that cannot be used, and for metrics that the rows do not fit."""
    from tunesmith.core.run_dir import AFTER, is_staged, plan_in
    from tunesmith.evaluate import compare_models, finished_run
    from tunesmith.evaluate.evaluated import Evaluated, metrics_of
    from tunesmith.evaluate.model_ref import side_of
    from tunesmith.train import stages

    side = side_of(str(target))
    exam = compare_models.Exam(None if data is None else Path(data), metrics_of(metrics), allow_code)
    own = exam.data is None and not exam.metrics
    if own and side.file == AFTER and side.run is not None:
        if is_staged(side.run):
            return Evaluated.of(stages.evaluate(side.run, allow_code=allow_code), side.run)
        if plan_in(side.run)["method"] != "full":  # which takes its base and what became of it one after the other
            return Evaluated.of(finished_run.evaluate(side.run, allow_code=allow_code), side.run)
    if side.run is None and not compare_models.is_adapter(Path(side.name)):
        return Evaluated(tuple(compare_models.measured_by(side, side, exam).scores(step=0)))
    return Evaluated.of(compare_models.before_and_after(side, exam), side.run)


def compare(a: AnyPath, b: AnyPath, *, allow_code: bool = False) -> Compared:
    """`b` beside `a`, item by item: runs, RUN@0.5 for a scale of its adapter, RUN/checkpoints/step-N, "base", a JSONL
    file of answers. Two finished runs are compared by their files alone; a model is loaded only for what no file holds.
    InputError for runs that are not finished, and for sides without a measure in common."""
    from tunesmith.evaluate.model_ref import compared, on_file, side_of

    sides = side_of(str(a)), side_of(str(b))
    measured = [on_file(side, other) for side, other in zip(sides, sides[::-1], strict=True)]
    if None in measured:
        from tunesmith.evaluate.compare_models import Exam, measured_by

        measured = [
            known or measured_by(side, other, Exam(allow_code=allow_code))
            for known, side, other in zip(measured, sides, sides[::-1], strict=True)
        ]
    return compared([side.name for side in sides], [one for one in measured if one is not None])


def baselines(path: AnyPath, *, allow_code: bool = False) -> dict[str, tuple[Comparison, ...]]:
    """A finished run with constraints beside what costs no training: the base, the base told in the prompt, the base
    with tokens banned. Of each, how the trained model differs from it. InputError for a run without `never`."""
    from tunesmith.evaluate import finished_run

    return finished_run.baselines(Path(path), allow_code=allow_code)


def recovery(path: AnyPath) -> tuple[Comparison, ...]:
    """Whether what a run's general text lost is gone or only pushed aside: each domain by itself, and after other texts
    of it, where a model that still knows it is as good as before. InputError for a run without `retention_data`."""
    from tunesmith.evaluate import finished_run

    return finished_run.recovery(Path(path))


def write_report(path: AnyPath, out: AnyPath | None = None) -> Path:
    """The page of a run, finished or not, as one HTML file: `out`, or report.html in the run folder. InputError for
    what is no run folder, or a damaged one."""
    from tunesmith.report.page import write_report

    return write_report(Path(path), None if out is None else Path(out))


def chat(path: AnyPath, questions: str | Iterable[str]) -> Iterator[str]:
    """The answers of a run's adapter to one question, or to the questions of one conversation as they come."""
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
) -> Exported:
    """A finished run as peft, merged, gguf or ollama, compared with the run before it appears.

    `type`: of a GGUF: f16, q8_0, bf16, f32, or lora for the adapter alone. `base`: original, dequantized or auto, of a
    run on 4-bit weights. `scale`: the adapter times this, as RUN@SCALE is measured. `out`: a folder, else
    RUN/export/TO.
    GateError when what was written does not answer as the run does; then nothing is left.
    """
    from tunesmith.evaluate import finished_run

    place = None if out is None else Path(out)
    return finished_run.export(Path(path), to, kind=type, base=base, scale=scale, out=place)
