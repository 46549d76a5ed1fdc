"""One model beside another, item by item, from what their runs have measured: no model is loaded.

    RUN, RUN@0 or base, answers.jsonl -> Measured; two of them -> Compared

Left out: sides that no file holds, such as a checkpoint or half of an adapter (contenders.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.events import GenerationSample
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    RECORD_FILE,
    is_run,
    is_staged,
    read_run_plan,
)
from tunesmith.core.types import Comparison, Json
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.metrics import METRICS, grade_answer, parse_metric_arg, split_metric
from tunesmith.evaluate.pairing import pair_measurements
from tunesmith.evaluate.results import EvalResults, MetricValues, compare_measurements
from tunesmith.evaluate.scale_choice import MAX_SCALE
from tunesmith.evaluate.statistics import compute_p_value, holm_adjust
from tunesmith.model.hub.resolve import BUILT_IN_MODELS, HUB_ID

BASE_NAME = "base"
SCALE_SUFFIX = re.compile(r"@\d+(\.\d+)?$")
RUNS_DIR = Path("runs")  # where runs are, unless somebody said otherwise
MAX_SUGGESTIONS = 3


@dataclass(frozen=True)
class ModelComparison:
    """`b` minus `a`, measure by measure. `together`: Holm's p of each among all. `notes`: what is
    not compared."""

    first: str
    second: str
    comparisons: tuple[Comparison, ...]
    adjusted_p: tuple[float, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRef:
    """One of the two as it was named. `run` is the folder of its run, if it is of one; `scale` is
    of its adapter."""

    name: str
    run_dir: Path | None = None
    scale: float = 1.0
    checkpoint_dir: Path | None = None

    @property
    def results_file(self) -> str:
        """Which file of the run holds its measures; none for a checkpoint or another scale."""
        return (
            ""
            if self.checkpoint_dir
            else {0.0: EVAL_BEFORE_FILE, 1.0: EVAL_AFTER_FILE}.get(self.scale, "")
        )


def parse_model_ref(name: str) -> ModelRef:
    """What a name means. Raises InputError for a scale that is none, and for what can be seen to be
    nothing."""
    try:
        model_ref = _parse_ref(name)
        if model_ref.run_dir is None and name != BASE_NAME and not name.endswith(".jsonl"):
            _refuse_unknown(name)
    except OSError as error:
        raise InputError(
            f"nothing can have this name: {error.strerror}", where=f"{name:.80}"
        ) from error
    return model_ref


def _parse_ref(name: str) -> ModelRef:
    path, separator, scale = name.rpartition("@")
    if separator and is_run(Path(path)):
        if not re.fullmatch(r"\d+(\.\d+)?", scale) or float(scale) > MAX_SCALE:
            fix = f"a scale is a number from 0 to {MAX_SCALE:g}: RUN@0.5"
            raise InputError(f"{scale:.40} is no scale", where=name, fix=fix)
        return ModelRef(name, Path(path), float(scale))
    folder = Path(name)
    if (
        folder.parent.name == "checkpoints"
        and folder.name.startswith("step-")
        and is_run(folder.parent.parent)
    ):
        return ModelRef(name, folder.parent.parent, checkpoint_dir=folder)
    if folder.name == "adapter" and is_run(folder.parent):
        return ModelRef(name, folder.parent)
    return ModelRef(name, folder if is_run(folder) else None)


def _refuse_unknown(name: str) -> None:
    """InputError for a path where nothing is. An id on the hub looks like one: it passes unless it
    is near to a run."""
    path = Path(name.rpartition("@")[0] if SCALE_SUFFIX.search(name) else name).expanduser()
    if path.exists() or name in BUILT_IN_MODELS:
        return
    nearest = _find_nearest(path)
    if HUB_ID.fullmatch(name) and not any(
        is_run(folder) for folder in [*nearest, *_list_folders(path.parent)]
    ):
        return
    suggestions = [str(folder) for folder in nearest]
    if len(path.parts) == 1:
        suggestions += [str(folder) for folder in _find_nearest(RUNS_DIR / path)]
        suggestions += get_close_matches(name.lower(), BUILT_IN_MODELS, n=1, cutoff=0.5)
    fix = (
        f"did you mean {' or '.join(suggestions[:MAX_SUGGESTIONS])}?"
        if suggestions
        else f"built in: {', '.join(BUILT_IN_MODELS)}"
    )
    raise InputError(
        "there is no run folder, model folder or built-in model of that name", where=name, fix=fix
    )


def _find_nearest(path: Path) -> list[Path]:
    """Folders whose path is like it, part by part; the folder itself where there is one."""
    if path.is_dir() or path == path.parent:
        return [path] if path.is_dir() else []
    matches: list[Path] = []
    for parent in _find_nearest(path.parent):
        folders_by_name = {folder.name: folder for folder in _list_folders(parent)}
        names = (
            [path.name]
            if path.name in folders_by_name
            else get_close_matches(path.name, folders_by_name, n=MAX_SUGGESTIONS)
        )
        matches += [folders_by_name[name] for name in names]
    return matches


def _list_folders(path: Path) -> list[Path]:
    """Those in a folder that may be read."""
    try:
        return [child for child in path.iterdir() if child.is_dir()]
    except OSError:
        return []


def load_cached_results(model_ref: ModelRef, other_ref: ModelRef) -> EvalResults | None:
    """What files say of it: its run's, or, of the `base` and of answers, those of the other side's
    run. None if a model must be loaded. Raises InputError for a run that is not finished, damaged
    or of another version."""
    if model_ref.name == BASE_NAME or model_ref.name.endswith(".jsonl"):
        if other_ref.run_dir is None:
            message = f"{model_ref.name} is compared with a run, whose items it is measured on"
            raise InputError(
                message, where=other_ref.name, fix="name a run folder as the other side"
            )
        return (
            load_results(other_ref.run_dir, EVAL_BEFORE_FILE)
            if model_ref.name == BASE_NAME
            else load_answers(Path(model_ref.name), other_ref.run_dir)
        )
    return (
        load_results(model_ref.run_dir, model_ref.results_file)
        if model_ref.run_dir is not None and model_ref.results_file
        else None
    )


def load_results(run: Path, file: str) -> EvalResults:
    """The measures of a finished run."""
    if not (run / RECORD_FILE).is_file():
        raise InputError(
            "this run is not finished", where=str(run), fix=f"finish it: tunesmith resume {run}"
        )
    if not (run / file).is_file():
        message = (
            f"there is no {file}: the run was made by another version, or its folder is damaged"
        )
        raise InputError(
            message, where=str(run), fix="measure it again with `tunesmith eval`, or train it again"
        )
    return parse_as(EvalResults, read_json(run / file), where=str(run / file))


# ---------------------------------------------------------------- answers of somebody else


def load_answers(path: Path, run: Path) -> EvalResults:
    """A file of answers, {"id": ..., "answer": ...} a line, graded by the metrics of a run. Raises
    InputError with file:line for a row without them, for an id that the run does not know, and for
    one that stands twice."""
    if is_staged(run):
        message = "answers are graded by the metrics of one run, and this one has several stages"
        raise InputError(message, where=str(run), fix="name the folder of a stage")
    run_results = load_results(run, EVAL_AFTER_FILE)
    samples_by_id = {sample.id: sample for sample in run_results.samples if sample.expected}
    answers = _read_answers(path, samples_by_id)
    plan = read_run_plan(run)
    schema = read_json(Path(plan.recipe["schema"])) if plan.recipe.get("schema") else None
    names = [name for name in plan.config.metrics if split_metric(name)[0] in METRICS]
    measurements = [_grade_metric(name, answers, samples_by_id, schema) for name in names]
    if not measurements:
        raise InputError(
            "the run has no metric that grades answers",
            where=str(run),
            fix="compare it with another run",
        )
    return EvalResults(tuple(measurements), digests=run_results.digests)


def _read_answers(path: Path, samples_by_id: dict[str, GenerationSample]) -> dict[str, str]:
    source, answers = open_source(path), dict[str, str]()
    for index in range(len(source)):
        row = source.read_row(index)
        item_id, answer = row.data.get("id"), row.data.get("answer")
        if not isinstance(item_id, str) or not isinstance(answer, str):
            fix = 'write {"id": "test.jsonl:1", "answer": "..."}'
            raise InputError(
                "the row needs an `id` and an `answer`, both texts", where=row.id, fix=fix
            )
        if item_id not in samples_by_id:
            fix = f"ids are those of its after.json, such as {next(iter(samples_by_id), 'none')}"
            raise InputError(
                f"the run has asked nothing with the id {item_id!r:.80}", where=row.id, fix=fix
            )
        if item_id in answers:
            raise InputError(
                f"the id {item_id!r:.80} stands twice", where=row.id, fix="give one answer to each"
            )
        answers[item_id] = answer
    return answers


def _grade_metric(
    metric: str,
    answers: dict[str, str],
    samples_by_id: dict[str, GenerationSample],
    schema: Json | None,
) -> MetricValues:
    arg = parse_metric_arg(metric, schema)
    values = tuple(
        grade_answer(metric, answer, samples_by_id[item_id].expected, arg)
        for item_id, answer in answers.items()
    )
    return MetricValues("test", metric, tuple(answers), values)


# ---------------------------------------------------------------- together


def compare_models(names: Sequence[str], results: Sequence[EvalResults]) -> ModelComparison:
    """The second minus the first. Raises InputError when they have nothing in common."""
    pairs, notes = pair_measurements(*results)
    if not pairs:
        fix = "compare runs with the same test_data or retention_data"
        raise InputError(
            "they have no measure in common:\n  " + "\n  ".join(notes),
            where=" and ".join(names),
            fix=fix,
        )
    comparisons = tuple(compare_measurements(first, second) for first, second in pairs)
    return ModelComparison(
        names[0],
        names[1],
        comparisons,
        holm_adjust([compute_p_value(comparison) for comparison in comparisons]),
        tuple(notes),
    )
