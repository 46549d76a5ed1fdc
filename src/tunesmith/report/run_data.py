"""What a run folder holds, read once: of one run, or of several stages in one folder.

In: a path. Out: a `Story` of one `Part` a stage. What is not there yet is empty: a run that goes
on, was interrupted or was stopped by a gate has a page, too. Raises InputError for what is no run
folder, and for a damaged file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.events import GenerationSample
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import (
    FINGERPRINT_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    STAGES_DIR,
    STAGES_FILE,
    is_staged,
    read_events,
    read_failure,
    read_run_plan,
    require_run,
)
from tunesmith.core.types import Json, Plan, RunRecord
from tunesmith.plan.stages import StagedPlan

SIDES = ("before", "after")


@dataclass(frozen=True, eq=False)
class StageData:
    """One run."""

    name: str
    path: Path
    plan: Plan
    events: tuple[Json, ...]
    identity: Json
    recipe: str
    record: RunRecord | None
    failure: str

    def select_events(self, kind: str) -> list[Json]:
        return [event for event in self.events if event["type"] == kind]


@dataclass(frozen=True, eq=False)
class ReportData:
    """`record` is of the whole; None while it is not finished."""

    path: Path
    stages: tuple[StageData, ...]
    record: RunRecord | None
    eval_results: dict[str, Json]  # before.json and after.json of the whole

    @property
    def failure(self) -> str:
        return next((part.failure for part in self.stages if part.failure), "")

    @property
    def steps_done(self) -> int:
        return sum(
            max((event["step"] for event in part.select_events("step")), default=0)
            for part in self.stages
        )

    @property
    def steps_planned(self) -> int:
        return sum(part.plan.steps for part in self.stages)

    def get_sample_pairs(self) -> tuple[tuple[GenerationSample, GenerationSample], ...]:
        """Answers before and after: all that were kept, else the few of the record."""
        all_pairs, record_pairs = (
            _load_sample_pairs(self.eval_results),
            self.record.samples if self.record else (),
        )
        return all_pairs if len(all_pairs) > len(record_pairs) else record_pairs


def load_report_data(path: Path) -> ReportData:
    require_run(path)
    if not is_staged(path):
        part = _load_stage(path, "", read_run_plan(path))
        return ReportData(path, (part,), part.record, _load_eval_results(path))
    staged = parse_as(StagedPlan, read_json(path / STAGES_FILE), where=str(path / STAGES_FILE))
    parts: list[StageData] = []
    for plan in staged.plans:
        stage_dir = path / STAGES_DIR / Path(plan["output_dir"]).name
        plan_file = stage_dir / PLAN_FILE  # made again when the stage began
        stage_plan = (
            parse_as(Plan, read_json(plan_file), where=str(plan_file))
            if plan_file.is_file()
            else plan
        )
        parts.append(_load_stage(stage_dir, stage_dir.name, stage_plan))
    return ReportData(path, tuple(parts), _load_record(path), _load_eval_results(path))


def _load_stage(path: Path, name: str, plan: Plan) -> StageData:
    recipe = path / RECIPE_FILE
    return StageData(
        name=name,
        path=path,
        plan=plan,
        events=tuple(read_events(path)),
        identity=read_json(path / FINGERPRINT_FILE) if (path / FINGERPRINT_FILE).is_file() else {},
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        record=_load_record(path),
        failure=read_failure(path),
    )


def _load_record(path: Path) -> RunRecord | None:
    file = path / RECORD_FILE
    return parse_as(RunRecord, read_json(file), where=str(file)) if file.is_file() else None


def _load_eval_results(path: Path) -> dict[str, Json]:
    files = {side: path / f"{side}.json" for side in SIDES}
    return (
        {side: read_json(file) for side, file in files.items()}
        if all(map(Path.is_file, files.values()))
        else {}
    )


def _load_sample_pairs(
    eval_results: dict[str, Json],
) -> tuple[tuple[GenerationSample, GenerationSample], ...]:
    if not eval_results:
        return ()
    before, after = (
        parse_as(tuple[GenerationSample, ...], eval_results[side]["samples"]) for side in SIDES
    )
    later = {sample.id: sample for sample in after}
    return tuple((sample, later[sample.id]) for sample in before if sample.id in later)


def collect_grades(story: ReportData) -> dict[str, dict[str, tuple[float, float, bool]]]:
    """Of each row what its answers were graded with: metric -> before, after, higher is better."""
    if not story.eval_results:
        return {}
    metric_names, grades = (
        _collect_metric_names(story),
        dict[str, dict[str, tuple[float, float, bool]]](),
    )
    after = {
        (measurement["task"], measurement["metric"]): measurement
        for measurement in story.eval_results["after"]["measurements"]
    }
    for measurement in story.eval_results["before"]["measurements"]:
        name, after_measurement = (
            measurement["metric"],
            after.get((measurement["task"], measurement["metric"])),
        )
        if after_measurement is None or not (
            name in metric_names or name.startswith(("breaks ", "says "))
        ):
            continue
        later = dict(zip(after_measurement["ids"], after_measurement["values"], strict=True))
        for row, value in zip(measurement["ids"], measurement["values"], strict=True):
            if row in later:
                grades.setdefault(row, {})[name] = (
                    value,
                    later[row],
                    measurement["higher_is_better"],
                )
    return grades


def _collect_metric_names(story: ReportData) -> set[str]:
    return {
        name
        for part in story.stages
        if "metrics" in part.plan.choices
        for name in part.plan["metrics"]
    }
