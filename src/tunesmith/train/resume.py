"""Resume: from which checkpoint a run continues, and whether it may.

    prepare_resume(folder, plan, inputs) -> ResumeState

A run depends on its recipe, plan, rows, tokenizer, chat template, weights and libraries. If one of
them has changed, the run is refused with the changed fields, or continues with a warning when the
user allows it.

In: a run folder and its reloaded inputs. Out: the newest valid checkpoint and the first events.
Left out: the fingerprint (session/fingerprint.py), restoring weights (loop.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import (
    FINGERPRINT_FILE,
    RECIPE_FILE,
    RunFolder,
    read_all_events,
    read_failure,
)
from tunesmith.core.types import Json, Plan
from tunesmith.session.fingerprint import (
    ROUNDING_PREFIX,
    build_fingerprint,
    list_changes,
    read_recipe,
)
from tunesmith.session.inputs import RunInputs

DRIFT = "changed input"  # the kind of the warnings that name what has changed


@dataclass(frozen=True)
class ResumeState:
    """Where a run starts or continues; `first_events` are the first of this attempt."""

    fingerprint: Json
    checkpoint: Path | None = None
    has_drifted: bool = False
    first_events: tuple[CheckResult, ...] = ()


def prepare_resume(
    folder: RunFolder,
    plan: Plan,
    inputs: RunInputs,
    *,
    allow_drift: bool = False,
    from_step: int | None = None,
) -> ResumeState:
    """Return where the run continues.

    Raise InputError if an input has changed and `allow_drift` is false, or if `from_step` has no
    valid checkpoint."""
    fingerprint = build_fingerprint(plan, inputs, read_recipe(folder.path / RECIPE_FILE))
    drift: list[str] = []
    roundings: list[str] = []
    for change in list_changes(read_json(folder.path / FINGERPRINT_FILE), fingerprint):
        (roundings if change.startswith(ROUNDING_PREFIX) else drift).append(change)
    if drift and not allow_drift:
        raise InputError(
            "cannot resume, these inputs have changed since the run started:\n  "
            + "\n  ".join(drift),
            where=str(folder.path),
            fix="restore them, or start a new run; --allow-drift continues under plan.json "
            "and records the changes",
        )
    if from_step is None:
        checkpoint, skipped = folder.find_latest_checkpoint()
    else:
        checkpoint = folder.find_checkpoint(from_step)
        skipped = []
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    if from_step is None:
        _refuse_missing_checkpoint(folder, step)
    events: list[CheckResult] = []
    if failure := read_failure(folder.path):
        events.append(CheckResult("earlier attempt", "warn", failure, step))
    for change in drift:
        events.append(CheckResult(DRIFT, "warn", change, step))
    for change in roundings:
        evidence = f"{change}: results may differ in the last bits"
        events.append(CheckResult("rounding", "warn", evidence, step))
    for problem in skipped:
        events.append(CheckResult("checkpoint", "warn", f"skipped {problem}", step))
    position = "from the start: there is no checkpoint yet"
    if checkpoint is not None:
        position = f"from checkpoints/{checkpoint.name}"
    events.append(CheckResult("resume", "ok", position, step))
    return ResumeState(fingerprint, checkpoint, bool(drift), tuple(events))


def _refuse_missing_checkpoint(folder: RunFolder, step: int) -> None:
    """Raise InputError if the last rollback's checkpoint is gone and no newer one exists."""
    rollbacks = folder.load_rollbacks()
    if not rollbacks or step >= rollbacks[-1].to:
        return
    last = rollbacks[-1]
    older = f", continue before it with --from-step {step}" if step else ""
    raise InputError(
        f"the run was rolled back from step {last.step} to checkpoints/step-{last.to}, "
        "which is missing or damaged",
        where=str(folder.path),
        fix=f"restore it{older}, or start a new run",
    )


def read_drift(path: Path) -> tuple[str, ...]:
    """Return the changed inputs that any attempt was allowed to continue with."""
    changes: dict[str, None] = {}  # an ordered set
    for logged in read_all_events(path):
        event = logged.event
        if isinstance(event, CheckResult) and event.kind == DRIFT:
            changes[event.evidence] = None
    return tuple(changes)
