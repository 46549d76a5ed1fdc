"""Parse the names of models to compare, and compare them by their stored results.

    parse_model_ref("RUN@0.5")  # also RUN, RUN/checkpoints/step-N, base, answers.jsonl, a model

In: two names. Out: ModelRef, EvalResults that files hold, ModelComparison. No model is loaded.
Left out: models that no file has results of (compare_models.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.core.errors import InputError, raise_if_machine_failed
from tunesmith.core.events import GenerationSample
from tunesmith.core.evidence import ErrorAnalysis
from tunesmith.core.hub_names import is_hub_id
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import (
    ADAPTER_DIR,
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    MODEL_DIR,
    RECORD_FILE,
    RUN_FIX,
    find_weights_dir,
    is_run,
    is_staged,
    read_failure,
    read_run_plan,
    read_run_record,
    require_run,
)
from tunesmith.core.sealed_json import read_sealed_as
from tunesmith.core.types import Comparison
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.error_analysis import analyze_errors
from tunesmith.evaluate.metrics import METRICS, grade_answer, parse_metric_arg, split_metric
from tunesmith.evaluate.pairing import pair_measurements
from tunesmith.evaluate.results import EvalResults, MetricValues, compare_measurements
from tunesmith.evaluate.scale_choice import MAX_SCALE
from tunesmith.evaluate.seed_noise import SeedSpread, add_seed_noise, read_spreads
from tunesmith.evaluate.statistics import adjust_p_values, compute_p_value
from tunesmith.model.hub.built_in import BUILT_IN_MODELS

BASE_NAME = "base"
SCALE_SUFFIX = re.compile(r"@\d+(\.\d+)?$")


@dataclass(frozen=True)
class ModelComparison:
    """`second` minus `first`, metric by metric.

    adjusted_p: p of each comparison after Holm correction. notes: what is not compared.
    """

    first: str
    second: str
    comparisons: tuple[Comparison, ...]
    adjusted_p: tuple[float, ...]
    notes: tuple[str, ...] = ()
    errors: ErrorAnalysis | None = None  # of the second model's answers; "before" is the first


@dataclass(frozen=True)
class ModelRef:
    """A model as the user named it. `scale` is the factor on its run's adapter."""

    name: str
    run_dir: Path | None = None
    scale: float = 1.0
    checkpoint_dir: Path | None = None

    @property
    def results_file(self) -> str:
        """The file of the run with its results; empty for a checkpoint or another scale."""
        if self.checkpoint_dir:
            return ""
        return {0.0: EVAL_BEFORE_FILE, 1.0: EVAL_AFTER_FILE}.get(self.scale, "")


# ---------------------------------------------------------------- names


def parse_model_ref(name: str) -> ModelRef:
    """Return what a name refers to.

    Raises InputError for an invalid scale, and for a name that is neither a path nor a model.
    """
    try:
        model_ref = _parse_ref(name)
        if model_ref.run_dir is None and name != BASE_NAME and not name.endswith(".jsonl"):
            _refuse_unknown(name)
    except OSError as error:
        raise_if_machine_failed(error, name[:80])
        raise InputError(f"invalid path: {error.strerror}", where=f"{name:.80}") from error
    return model_ref


def _parse_ref(name: str) -> ModelRef:
    path, separator, scale = name.rpartition("@")
    if separator and is_run(Path(path)):
        if not re.fullmatch(r"\d+(\.\d+)?", scale) or float(scale) > MAX_SCALE:
            fix = f"use a number from 0 to {MAX_SCALE:g}: RUN@0.5"
            raise InputError(f"invalid scale {scale:.40}", where=name, fix=fix)
        return ModelRef(name, Path(path), float(scale))
    folder = Path(name)
    is_checkpoint = folder.parent.name == "checkpoints" and folder.name.startswith("step-")
    if is_checkpoint and is_run(folder.parent.parent):
        return ModelRef(name, folder.parent.parent, checkpoint_dir=folder)
    if folder.name == "adapter" and is_run(folder.parent):
        return ModelRef(name, folder.parent)
    return ModelRef(name, folder if is_run(folder) else None)


def _refuse_unknown(name: str) -> None:
    """Raise InputError for a path that does not exist. A hub id looks like one, and passes unless
    its first part is a folder."""
    path = Path(SCALE_SUFFIX.sub("", name)).expanduser()
    if path.exists() or name in BUILT_IN_MODELS:
        return
    if is_hub_id(name) and not path.parent.is_dir():
        return
    fix = f"{RUN_FIX}; built-in models: {', '.join(BUILT_IN_MODELS)}"
    raise InputError("no such run folder, model folder or built-in model", where=name, fix=fix)


def refuse_untrained(run: Path) -> None:
    """Raise InputError for a run whose weights are not trained yet, by its files alone."""
    if is_staged(run) or any((run / name).is_dir() for name in (ADAPTER_DIR, MODEL_DIR)):
        return
    if not read_failure(run):  # which is told when the weights are looked for
        read_run_plan(run)  # a damaged one is the reason
        fix = f"finish it: tunesmith resume {run}"
        raise InputError("this run has no trained weights yet", where=str(run), fix=fix)


# ---------------------------------------------------------------- stored results


def load_cached_results(model_ref: ModelRef, other_ref: ModelRef) -> EvalResults | None:
    """Return the results that files hold, or None if a model must be loaded.

    `base` and a file of answers refer to the other model's run. Raises InputError for a run that is
    unfinished, damaged, or of another version.
    """
    name = model_ref.name
    if name == BASE_NAME or name.endswith(".jsonl"):
        if other_ref.run_dir is None:
            message = f"{name} can only be compared with a run, which has the items"
            fix = "name a run folder as the other model"
            raise InputError(message, where=other_ref.name, fix=fix)
        if name == BASE_NAME:
            return load_results(other_ref.run_dir, EVAL_BEFORE_FILE)
        return load_answers(Path(name), other_ref.run_dir)
    if model_ref.run_dir is not None and model_ref.results_file:
        return load_results(model_ref.run_dir, model_ref.results_file)
    return None


def load_results(run: Path, file: str) -> EvalResults:
    """Return the results in a file of a finished run."""
    require_run(run)
    if not (run / RECORD_FILE).is_file():
        fix = f"finish it: tunesmith resume {run}"
        raise InputError("this run is not finished", where=str(run), fix=fix)
    if not (run / file).is_file():
        message = f"there is no {file}: the run is of another version, or its folder is damaged"
        fix = "evaluate it again with `tunesmith eval`, or train it again"
        raise InputError(message, where=str(run), fix=fix)
    return read_sealed_as(EvalResults, run / file)


def load_answers(path: Path, run: Path) -> EvalResults:
    """Grade a file of answers, one {"id": ..., "answer": ...} per line, by a run's metrics.

    Raises InputError with file:line for an incomplete row, an unknown id and a duplicate id.
    """
    if is_staged(run):
        message = "answers are graded by the metrics of a single run, but this one has stages"
        raise InputError(message, where=str(run), fix="name the folder of a stage")
    run_results = load_results(run, EVAL_AFTER_FILE)
    samples_by_id = {sample.id: sample for sample in run_results.samples if sample.expected}
    answers = _read_answers(path, samples_by_id)
    plan = read_run_plan(run)
    schema_path = plan.recipe.get("response_schema")
    schema = read_json(Path(str(schema_path))) if schema_path else None
    samples = [
        replace(samples_by_id[item_id], answer=answer) for item_id, answer in answers.items()
    ]
    measurements: list[MetricValues] = []
    for metric in plan.config.metrics:
        if split_metric(metric)[0] not in METRICS:
            continue
        arg = parse_metric_arg(metric, schema)
        values = tuple(
            grade_answer(metric, answer, samples_by_id[item_id].expected, arg)
            for item_id, answer in answers.items()
        )
        measurements.append(MetricValues("test", metric, tuple(answers), values))
    if not measurements:
        fix = "compare it with another run"
        raise InputError("the run has no metric that grades answers", where=str(run), fix=fix)
    return EvalResults(tuple(measurements), tuple(samples), run_results.digests)


def _read_answers(path: Path, samples_by_id: dict[str, GenerationSample]) -> dict[str, str]:
    source = open_source(path)
    answers: dict[str, str] = {}
    for index in range(len(source)):
        row = source.read_row(index)
        item_id = row.data.get("id")
        answer = row.data.get("answer")
        if not isinstance(item_id, str) or not isinstance(answer, str):
            fix = 'write {"id": "test.jsonl:1", "answer": "..."}'
            raise InputError("the row needs an `id` and an `answer` string", where=row.id, fix=fix)
        if item_id not in samples_by_id:
            example = next(iter(samples_by_id), "none")
            fix = f"use the ids of its {EVAL_AFTER_FILE}, such as {example}"
            raise InputError(f"the run has no item {item_id!r:.80}", where=row.id, fix=fix)
        if item_id in answers:
            fix = "give one answer per id"
            raise InputError(f"duplicate id {item_id!r:.80}", where=row.id, fix=fix)
        answers[item_id] = answer
    return answers


# ---------------------------------------------------------------- comparing


def compare_models(refs: Sequence[ModelRef], results: Sequence[EvalResults]) -> ModelComparison:
    """Compare the second model with the first, and analyze its errors. Between two runs, seeds
    count. Raises InputError without a common metric.
    """
    names = [ref.name for ref in refs]
    run = refs[1].run_dir or refs[0].run_dir
    pairs, notes = pair_measurements(*results)
    if not pairs:
        missing = "\n  ".join(notes) or "nothing was measured of either"
        message = f"the models have no metric in common:\n  {missing}"
        fix = "compare runs with the same test_data or retention_data"
        raise InputError(message, where=" and ".join(names), fix=fix)
    comparisons = [compare_measurements(first, second) for first, second in pairs]
    if trained := _list_trained_apart(refs):
        spreads = read_spreads(trained)
        comparisons = [
            add_seed_noise(c, spreads.get((c.after.task, c.metric))) for c in comparisons
        ]
        notes.append(_describe_seeds(comparisons, spreads))
    p_values = [compute_p_value(comparison) for comparison in comparisons]
    first, second = names
    errors = None if run is None else _analyze_second(results, run)
    adjusted_p = adjust_p_values(p_values)
    return ModelComparison(first, second, tuple(comparisons), adjusted_p, tuple(notes), errors)


def _list_trained_apart(refs: Sequence[ModelRef]) -> list[Path]:
    """Return the folders of two trainings; empty if either model is a base, a file of answers, or
    of the same run."""
    runs = [ref.run_dir for ref in refs if ref.run_dir is not None and ref.scale != 0]
    is_apart = len({run.resolve() for run in runs}) == 2
    return runs if is_apart and not any(map(is_staged, runs)) else []


def _describe_seeds(
    comparisons: Sequence[Comparison], spreads: Mapping[tuple[str, str], SeedSpread]
) -> str:
    """Return where the variance between seeds is from, which two runs cannot show."""
    keys = [(each.after.task, each.metric) for each in comparisons]
    measured = [spreads[key] for key in keys if key in spreads]
    if measured:
        seeds = max(spread.degrees for spread in measured) + 1
        return f"intervals are for other seeds, too: by {seeds} runs here that differ in the seed"
    fix = "measure it here: `tunesmith tune sweep` with sweep: {seeds: 3}"
    return f"one seed each: another seed might give another difference; {fix}"


def _analyze_second(results: Sequence[EvalResults], run: Path) -> ErrorAnalysis | None:
    training = None
    if (run / RECORD_FILE).is_file():
        stored = read_run_record(run).errors
        training = stored.training if stored else None
    first, second = results
    metrics = read_run_plan(find_weights_dir(run)).config.metrics
    return analyze_errors(first, second, training, graded_metrics=metrics)
