"""Where a run goes on, and whether it may.

    go_on(folder, plan, facts) -> Start     the newest checkpoint that can be trusted, and what there is to say

A run stands on its recipe, plan, rows, tokenizer, template, weights and libraries. If one of them has changed, going on
would not be the same run: it is refused field by field, or allowed and told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import InputError
from tunesmith.core.events import Verdict
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import IDENTITY, RECIPE, RunFolder, every_event, failure_of
from tunesmith.core.types import Json, Plan
from tunesmith.session.fingerprint import ROUNDING, changes, identity_of, read_recipe
from tunesmith.session.inputs import Facts

DRIFT = "drift"  # the kind of the verdict that tells what had changed


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on. `news` are the first events of the attempt."""

    identity: Json
    checkpoint: Path | None = None
    drifted: bool = False
    news: tuple[Verdict, ...] = ()


def go_on(
    folder: RunFolder, plan: Plan, facts: Facts, *, allow_drift: bool = False, from_step: int | None = None
) -> Start:
    """Raises InputError when something has changed and may not, and for a `from_step` without a valid checkpoint."""
    identity = identity_of(plan, facts, read_recipe(folder.path / RECIPE))
    changed = changes(read_json(folder.path / IDENTITY), identity)
    drift = [change for change in changed if not change.startswith(ROUNDING)]
    if drift and not allow_drift:
        raise InputError(
            "not what the run stood on when it began:\n  " + "\n  ".join(drift),
            where=str(folder.path),
            fix="put it back as it was, or start a new run; with --allow-drift this one goes on under its plan.json, "
            "and its record says what had changed",
        )
    if from_step is None:
        checkpoint, skipped = folder.latest_checkpoint()
    else:
        checkpoint, skipped = folder.checkpoint_of(from_step), []
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    if from_step is None:
        _refuse_lost_way(folder, step)
    said = {
        "earlier attempt": [text] if (text := failure_of(folder.path)) else [],
        DRIFT: drift,
        "rounding": [f"{change}: the last bits may differ" for change in changed if change.startswith(ROUNDING)],
        "checkpoint": [f"skipped {problem}" for problem in skipped],
    }
    warnings = [Verdict(kind, "warn", text, step) for kind, texts in said.items() for text in texts]
    place = (
        "from the start: there is no checkpoint yet" if checkpoint is None else f"after checkpoints/{checkpoint.name}"
    )
    return Start(identity, checkpoint, bool(drift), (*warnings, Verdict("resume", "ok", place, step)))


def _refuse_lost_way(folder: RunFolder, step: int) -> None:
    """Raises InputError when the checkpoint that the run went back to is gone, and none after it was written."""
    last = next(reversed(folder.rollbacks()), None)
    if last is not None and step < last.to:
        older = f", or go on before it with --from-step {step}" if step else ""
        raise InputError(
            f"the run went back from step {last.step} to checkpoints/step-{last.to}, which is gone or damaged",
            where=str(folder.path),
            fix=f"put it back{older}, or start a new run",
        )


def drift_of(path: Path) -> tuple[str, ...]:
    """What had changed at any attempt of a run that was allowed to go on."""
    told = [e["evidence"] for e in every_event(path) if e["type"] == "verdict" and e["kind"] == DRIFT]
    return tuple(dict.fromkeys(told))
