"""What a run folder holds, read once: of one run, or of several stages in one folder.

In: a path. Out: a `Story` of one `Part` a stage. What is not there yet is empty: a run that goes on, was interrupted or
was stopped by a gate has a page, too. Raises InputError for what is no run folder, and for a damaged file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.events import Sample
from tunesmith.core.json_io import from_json, read_json
from tunesmith.core.run_dir import (
    IDENTITY,
    OF_STAGES,
    PLAN,
    RECIPE,
    RECORD,
    STAGES,
    failure_of,
    is_staged,
    plan_in,
    read_events,
    require_run,
)
from tunesmith.core.types import Json, Plan, RunRecord
from tunesmith.plan.stages import StagedPlan

SIDES = ("before", "after")


@dataclass(frozen=True, eq=False)
class Part:
    """One run."""

    name: str
    path: Path
    plan: Plan
    events: tuple[Json, ...]
    identity: Json
    recipe: str
    record: RunRecord | None
    failure: str

    def of_type(self, kind: str) -> list[Json]:
        return [event for event in self.events if event["type"] == kind]


@dataclass(frozen=True, eq=False)
class Story:
    """`record` is of the whole; None while it is not finished."""

    path: Path
    parts: tuple[Part, ...]
    record: RunRecord | None
    measured: dict[str, Json]  # before.json and after.json of the whole

    @property
    def failure(self) -> str:
        return next((part.failure for part in self.parts if part.failure), "")

    @property
    def steps_taken(self) -> int:
        return sum(max((event["step"] for event in part.of_type("step")), default=0) for part in self.parts)

    @property
    def steps_planned(self) -> int:
        return sum(part.plan.steps for part in self.parts)

    def pairs(self) -> tuple[tuple[Sample, Sample], ...]:
        """Answers before and after: all that were kept, else the few of the record."""
        kept, shown = _kept(self.measured), self.record.samples if self.record else ()
        return kept if len(kept) > len(shown) else shown


def read_story(path: Path) -> Story:
    require_run(path)
    if not is_staged(path):
        part = _part(path, "", plan_in(path))
        return Story(path, (part,), part.record, _measured(path))
    staged = from_json(StagedPlan, read_json(path / STAGES), where=str(path / STAGES))
    parts: list[Part] = []
    for plan in staged.plans:
        place = path / OF_STAGES / Path(plan["output_dir"]).name
        own = place / PLAN  # made again when the stage began
        begun = from_json(Plan, read_json(own), where=str(own)) if own.is_file() else plan
        parts.append(_part(place, place.name, begun))
    return Story(path, tuple(parts), _record(path), _measured(path))


def _part(path: Path, name: str, plan: Plan) -> Part:
    recipe = path / RECIPE
    return Part(
        name=name,
        path=path,
        plan=plan,
        events=tuple(read_events(path)),
        identity=read_json(path / IDENTITY) if (path / IDENTITY).is_file() else {},
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        record=_record(path),
        failure=failure_of(path),
    )


def _record(path: Path) -> RunRecord | None:
    file = path / RECORD
    return from_json(RunRecord, read_json(file), where=str(file)) if file.is_file() else None


def _measured(path: Path) -> dict[str, Json]:
    files = {side: path / f"{side}.json" for side in SIDES}
    return {side: read_json(file) for side, file in files.items()} if all(map(Path.is_file, files.values())) else {}


def _kept(measured: dict[str, Json]) -> tuple[tuple[Sample, Sample], ...]:
    if not measured:
        return ()
    before, after = (from_json(tuple[Sample, ...], measured[side]["samples"]) for side in SIDES)
    later = {sample.id: sample for sample in after}
    return tuple((sample, later[sample.id]) for sample in before if sample.id in later)


def grades_of(story: Story) -> dict[str, dict[str, tuple[float, float, bool]]]:
    """Of each row what its answers were graded with: metric -> before, after, higher is better."""
    if not story.measured:
        return {}
    wanted, found = _names(story), dict[str, dict[str, tuple[float, float, bool]]]()
    after = {(one["task"], one["metric"]): one for one in story.measured["after"]["measurements"]}
    for one in story.measured["before"]["measurements"]:
        name, same = one["metric"], after.get((one["task"], one["metric"]))
        if same is None or not (name in wanted or name.startswith(("breaks ", "says "))):
            continue
        later = dict(zip(same["ids"], same["values"], strict=True))
        for row, value in zip(one["ids"], one["values"], strict=True):
            if row in later:
                found.setdefault(row, {})[name] = (value, later[row], one["higher_is_better"])
    return found


def _names(story: Story) -> set[str]:
    return {name for part in story.parts if "metrics" in part.plan.choices for name in part.plan["metrics"]}
