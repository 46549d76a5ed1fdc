"""Read a run folder: one run, or several stages in one folder.

In: a path. Out: ReportData with a StageData for each stage. What does not exist yet is empty: a run
that is in progress, interrupted or stopped by a failed check has a page, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tunesmith.core.events import Event, GenerationSample, TrainStep
from tunesmith.core.json_io import read_file
from tunesmith.core.run_dir import (
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    FINGERPRINT_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    STAGES_DIR,
    is_staged,
    read_events,
    read_failure,
    read_run_plan,
    read_run_record,
    require_run,
)
from tunesmith.core.sealed_json import read_sealed_as
from tunesmith.core.types import Plan, RunRecord
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.evaluate.results import EvalResults, MetricValues
from tunesmith.plan.stages import read_staged_plan

E = TypeVar("E", bound=Event)
Grades = dict[str, tuple[float, float, bool]]  # metric -> before, after, higher is better
SamplePair = tuple[GenerationSample, GenerationSample]  # before, after


@dataclass(frozen=True)
class InputHashes:
    """The hashes in fingerprint.json: of the files of the base model, of its tokenizer and chat
    templates, and of the rows of each role."""

    base_sha256: dict[str, str] = field(default_factory=dict[str, str])
    tokenizer: str = ""
    renderer: str = ""
    templates: dict[str, str] = field(default_factory=dict[str, str])
    data: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, eq=False)
class StageData:
    """A run, or one of its stages; `name` is empty for a run of a single stage."""

    name: str
    path: Path
    plan: Plan
    events: tuple[Event, ...]
    input_hashes: InputHashes
    recipe: str
    record: RunRecord | None
    failure: str

    def select_events(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass(frozen=True, eq=False)
class ReportData:
    """A run with all its stages; `record` is None until the last one is finished."""

    path: Path
    stages: tuple[StageData, ...]
    record: RunRecord | None
    # item-by-item results; empty while the file of either is missing
    results_before: EvalResults
    results_after: EvalResults

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def failure(self) -> str:
        return next((stage.failure for stage in self.stages if stage.failure), "")

    @property
    def steps_done(self) -> int:
        total = 0
        for stage in self.stages:
            total += max((event.step for event in stage.select_events(TrainStep)), default=0)
        return total

    @property
    def steps_planned(self) -> int:
        return sum(stage.plan.steps for stage in self.stages)

    def get_sample_pairs(self) -> tuple[SamplePair, ...]:
        """Return all answers before and after if they were written, else the few of the record."""
        before = self.results_before.samples
        after = {sample.id: sample for sample in self.results_after.samples}
        all_pairs = tuple((sample, after[sample.id]) for sample in before if sample.id in after)
        record_pairs = self.record.samples if self.record else ()
        return all_pairs if len(all_pairs) > len(record_pairs) else record_pairs


def load_report_data(path: Path) -> ReportData:
    """Raises InputError for a folder that is no run, and for a damaged file."""
    require_run(path)
    stages: list[StageData] = []
    if is_staged(path):
        for plan in read_staged_plan(path).plans:
            stage_dir = path / STAGES_DIR / Path(plan.config.output_dir).name
            # the plan is made again when its stage starts
            if (stage_dir / PLAN_FILE).is_file():
                plan = read_run_plan(stage_dir)
            stages.append(_load_stage(stage_dir, stage_dir.name, plan))
    else:
        stages.append(_load_stage(path, "", read_run_plan(path)))
    before = after = EvalResults(())
    if (path / EVAL_BEFORE_FILE).is_file() and (path / EVAL_AFTER_FILE).is_file():
        before = read_sealed_as(EvalResults, path / EVAL_BEFORE_FILE)
        after = read_sealed_as(EvalResults, path / EVAL_AFTER_FILE)
    return ReportData(path, tuple(stages), _load_record(path), before, after)


def _load_stage(path: Path, name: str, plan: Plan) -> StageData:
    recipe = path / RECIPE_FILE
    hashes = path / FINGERPRINT_FILE
    return StageData(
        name=name,
        path=path,
        plan=plan,
        events=tuple(read_events(path)),
        input_hashes=read_sealed_as(InputHashes, hashes) if hashes.is_file() else InputHashes(),
        recipe=read_file(recipe).decode(errors="replace") if recipe.is_file() else "",
        record=_load_record(path),
        failure=read_failure(path),
    )


def _load_record(path: Path) -> RunRecord | None:
    return read_run_record(path) if (path / RECORD_FILE).is_file() else None


def collect_grades(run: ReportData) -> dict[str, Grades]:
    """Return the grades of the answers to each row, by the row's id."""
    metrics: set[str] = set()
    for stage in run.stages:
        metrics.update(stage.plan.config.metrics)
    after: dict[tuple[str, str], MetricValues] = {}
    for measurement in run.results_after.measurements:
        after[measurement.task, measurement.metric] = measurement
    grades: dict[str, Grades] = {}
    for measurement in run.results_before.measurements:
        metric = measurement.metric
        counterpart = after.get((measurement.task, metric))
        if counterpart is None or not is_graded_metric(metric, metrics):
            continue
        values_after = dict(zip(counterpart.ids, counterpart.values, strict=True))
        for row, value in zip(measurement.ids, measurement.values, strict=True):
            if row in values_after:
                grade = (value, values_after[row], measurement.higher_is_better)
                grades.setdefault(row, {})[metric] = grade
    return grades


def is_graded_metric(metric: str, settings: Iterable[str]) -> bool:
    """Return whether a metric of scores grades answers: it is set in the recipe's metrics, or
    counts answers that break a constraint of `never`, or rightly do not."""
    is_constraint = metric.startswith(("breaks ", "says "))
    return is_constraint or metric in map(format_metric_name, settings)
