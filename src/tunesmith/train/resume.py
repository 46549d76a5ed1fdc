"""Where a run goes on, and whether it may.

    go_on(folder, plan, facts) -> Start     the newest checkpoint that can be trusted, and what there is to say

A run stands on its recipe, plan, rows, tokenizer, template, weights and libraries. If one of them
has changed, going on would not be the same run: it is refused field by field, or allowed and told.
"""

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

DRIFT = "drift"  # the kind of the verdict that tells what had changed


@dataclass(frozen=True)
class ResumeState:
    """Where a run begins or goes on. `news` are the first events of the attempt."""

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
    """Raises InputError when something has changed and may not, and for a `from_step` without a
    valid checkpoint."""
    fingerprint = build_fingerprint(plan, inputs, read_recipe(folder.path / RECIPE_FILE))
    changed = list_changes(read_json(folder.path / FINGERPRINT_FILE), fingerprint)
    drift = [change for change in changed if not change.startswith(ROUNDING_PREFIX)]
    if drift and not allow_drift:
        raise InputError(
            "not what the run stood on when it began:\n  " + "\n  ".join(drift),
            where=str(folder.path),
            fix="put it back as it was, or start a new run; with --allow-drift this one goes on under its plan.json, "
            "and its record says what had changed",
        )
    if from_step is None:
        checkpoint, skipped = folder.find_latest_checkpoint()
    else:
        checkpoint, skipped = folder.find_checkpoint(from_step), []
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    if from_step is None:
        _refuse_missing_checkpoint(folder, step)
    messages_by_kind = {
        "earlier attempt": [text] if (text := read_failure(folder.path)) else [],
        DRIFT: drift,
        "rounding": [
            f"{change}: the last bits may differ"
            for change in changed
            if change.startswith(ROUNDING_PREFIX)
        ],
        "checkpoint": [f"skipped {problem}" for problem in skipped],
    }
    warnings = [
        CheckResult(kind, "warn", text, step)
        for kind, texts in messages_by_kind.items()
        for text in texts
    ]
    position = (
        "from the start: there is no checkpoint yet"
        if checkpoint is None
        else f"after checkpoints/{checkpoint.name}"
    )
    return ResumeState(
        fingerprint,
        checkpoint,
        bool(drift),
        (*warnings, CheckResult("resume", "ok", position, step)),
    )


def _refuse_missing_checkpoint(folder: RunFolder, step: int) -> None:
    """Raises InputError when the checkpoint that the run went back to is gone, and none after it
    was written."""
    last = next(reversed(folder.load_rollbacks()), None)
    if last is not None and step < last.to:
        older = f", or go on before it with --from-step {step}" if step else ""
        raise InputError(
            f"the run went back from step {last.step} to checkpoints/step-{last.to}, which is gone or damaged",
            where=str(folder.path),
            fix=f"put it back{older}, or start a new run",
        )


def read_drift(path: Path) -> tuple[str, ...]:
    """What had changed at any attempt of a run that was allowed to go on."""
    evidence = [
        event["evidence"]
        for event in read_all_events(path)
        if event["type"] == "verdict" and event["kind"] == DRIFT
    ]
    return tuple(dict.fromkeys(evidence))
