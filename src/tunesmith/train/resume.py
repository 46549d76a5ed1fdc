"""Resume: from which checkpoint a run continues, and whether it may.

    prepare_resume(folder, plan, inputs) -> ResumeState

A run depends on its recipe, plan, rows, tokenizer, chat template, weights, kernels and libraries.
If one of them has changed, the run is refused with the changed fields, or continues with a warning
when the user allows it.

In: a run folder and its reloaded inputs. Out: the newest valid checkpoint and the first events.
Left out: the fingerprint (session/fingerprint.py), restoring weights (loop.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import to_jsonable
from tunesmith.core.run_dir import (
    FINGERPRINT_FILE,
    PLAN_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    STAGES_FILE,
    RunFolder,
    is_run,
    is_staged,
    list_folders,
    read_all_events,
    read_failure,
    read_plan_json,
)
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Json, Plan
from tunesmith.model.kernels.build import describe_reference
from tunesmith.plan.stages import StagedPlan
from tunesmith.session.fingerprint import build_fingerprint, get_kernels
from tunesmith.session.identity import ROUNDING_PREFIX, list_changes, read_recipe
from tunesmith.session.inputs import RunInputs

CHANGED_INPUT = "changed input"  # the kind of the warnings that name what has changed


@dataclass(frozen=True)
class ResumeState:
    """Where a run starts or continues; `first_events` are the first of this attempt."""

    fingerprint: Json
    checkpoint_dir: Path | None = None
    has_changes: bool = False
    first_events: tuple[CheckResult, ...] = ()


def prepare_resume(
    folder: RunFolder,
    plan: Plan,
    inputs: RunInputs,
    *,
    allow_changes: bool = False,
    checkpoint: int | None = None,
) -> ResumeState:
    """Return where the run continues.

    Raise InputError if an input has changed and `allow_changes` is false, or if there is no valid
    checkpoint of step `checkpoint`."""
    fingerprint = build_fingerprint(plan, inputs, read_recipe(folder.path / RECIPE_FILE))
    stored = read_sealed_json(folder.path / FINGERPRINT_FILE)
    changes: list[str] = []
    roundings: list[str] = []
    for change in list_changes(stored, fingerprint):
        (roundings if change.startswith(ROUNDING_PREFIX) else changes).append(change)
    if changes and not allow_changes:
        raise InputError(
            "cannot resume: these inputs have changed since the run started:\n  "
            + "\n  ".join(changes),
            where=str(folder.path),
            fix="restore them, or start a new run; --allow-changes continues under plan.json "
            "and records the changes",
        )
    if checkpoint is None:
        checkpoint_dir, skipped = folder.find_latest_checkpoint()
    else:
        checkpoint_dir = folder.find_checkpoint(checkpoint)
        skipped = []
    step = 0 if checkpoint_dir is None else int(checkpoint_dir.name.removeprefix("step-"))
    if checkpoint is None:
        _refuse_missing_checkpoint(folder, step)
    events = list(check_kernels(plan, inputs, step))
    if failure := read_failure(folder.path):
        events.append(CheckResult("earlier attempt", "warn", failure, step))
    for change in changes:
        events.append(CheckResult(CHANGED_INPUT, "warn", change, step))
    for change in roundings:
        evidence = f"{change}: results may differ in the last bits"
        events.append(CheckResult("rounding", "warn", evidence, step))
    for problem in skipped:
        events.append(CheckResult("checkpoint", "warn", f"skipped {problem}", step))
    position = f"from the start: there is no {'intact ' if skipped else ''}checkpoint"
    if checkpoint_dir is not None:
        position = f"from checkpoints/{checkpoint_dir.name}"
    events.append(CheckResult("resume", "ok", position, step))
    return ResumeState(fingerprint, checkpoint_dir, bool(changes), tuple(events))


def find_interrupted_run(plan: Plan | StagedPlan, since: float) -> Path | None:
    """Return the newest unfinished run of the plan's recipe, beside where it would start, that has
    begun after `since` (seconds since 1970)."""
    output_dir = Path(plan.config.output_dir)
    plans = plan.plans if isinstance(plan, StagedPlan) else (plan,)
    recipes = to_jsonable([stage_plan.recipe for stage_plan in plans])
    matches: list[tuple[float, Path]] = []
    for folder in {output_dir, *list_folders(output_dir.parent)}:
        if not is_run(folder) or (folder / RECORD_FILE).exists():
            continue
        file = folder / (STAGES_FILE if is_staged(folder) else PLAN_FILE)
        started = file.stat().st_mtime
        if started < since:  # perhaps of another version, which is not read
            continue
        content = read_plan_json(file)
        stored = [stage_plan.get("recipe") for stage_plan in content.get("plans", [content])]
        if stored == recipes:
            matches.append((started, folder))
    return max(matches)[1] if matches else None


def check_kernels(plan: Plan, inputs: RunInputs, step: int = 0) -> tuple[CheckResult, ...]:
    """Return a warning if a run computes without its C kernels."""
    kernels = get_kernels(plan, inputs.machine)
    if kernels is None or kernels.library is not None:
        return ()
    return (CheckResult("kernels", "warn", describe_reference(kernels), step),)


def _refuse_missing_checkpoint(folder: RunFolder, step: int) -> None:
    """Raise InputError if the last rollback's checkpoint is gone and no newer one exists."""
    rollbacks = folder.load_rollbacks()
    if not rollbacks or step >= rollbacks[-1].to:
        return
    last = rollbacks[-1]
    older = f", continue before it with --checkpoint {step}" if step else ""
    raise InputError(
        f"the run was rolled back from step {last.step} to checkpoints/step-{last.to}, "
        "which is missing or damaged",
        where=str(folder.path),
        fix=f"restore it{older}, or start a new run",
    )


def read_input_changes(path: Path) -> tuple[str, ...]:
    """Return the changed inputs that any attempt was allowed to continue with."""
    changes: dict[str, None] = {}  # an ordered set
    for logged in read_all_events(path):
        event = logged.event
        if isinstance(event, CheckResult) and event.kind == CHANGED_INPUT:
            changes[event.evidence] = None
    return tuple(changes)
