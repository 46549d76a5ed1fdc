"""The folder of a sweep: one process at a time, and one sweep.

    with lock_folder(folder):
        check_identity(folder, build_identity(plan, inputs, metric))

settings.json, written before the first trial, holds everything that trials and their comparison
depend on: the fingerprint of a run, but for what a trial may change. Left out: the journal of the
trials (trial_study.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.core.atomic import make_dirs, refuse_links, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.formatting import format_count
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Json, Plan
from tunesmith.session.fingerprint import build_fingerprint
from tunesmith.session.identity import list_changes
from tunesmith.session.inputs import RunInputs

IDENTITY_FILE = "settings.json"
LOCK_FILE = ".lock"
# Of the fingerprint: a trial has a recipe and a plan of its own, and may go on elsewhere.
TRIAL_FIELDS = ("base", "recipe", "plan", "machine")
SWEEP_FORMAT = 3
MAX_NAMED = 3  # changes


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make the folder and lock it. Raises InputError if another process sweeps in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError("not a folder", where=str(folder), fix="choose another output_dir")
    make_dirs(folder)
    refuse_links(folder)
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = "another process runs this sweep"
        raise InputError(message, where=str(folder), fix="wait for it, or stop it") from None
    with lock:
        yield


def build_identity(plan: Plan, inputs: RunInputs, metric: str) -> Json:
    """Return everything that trials and their comparison depend on; `plan` is that of the recipe
    without its sweep. More trials of a search are the same sweep, and so is another folder."""
    recipe = inputs.recipe.model_dump(mode="json", exclude_unset=True)
    recipe.pop("output_dir", None)
    recipe["sweep"].pop("trials", None)
    fingerprint = build_fingerprint(plan, inputs, {})
    shared = {name: value for name, value in fingerprint.items() if name not in TRIAL_FIELDS}
    return {
        "format": SWEEP_FORMAT,
        **shared,
        "dtype": plan.config.dtype,
        "recipe": recipe,
        "metric": metric,
    }


def check_identity(folder: Path, identity: Json) -> None:
    """Raise InputError if the folder holds a sweep of another recipe, or of another version."""
    file = folder / IDENTITY_FILE
    if not file.exists():
        if names := sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE):
            message = f"the folder is not empty and is not a sweep: {', '.join(names[:3])}"
            raise InputError(message, where=str(folder), fix="choose another output_dir")
        write_file(file, dump_json(identity))
        return
    stored = parse_as(Json, read_json(file), where=str(file))
    if stored.get("format") != SWEEP_FORMAT:
        message = f"sweep format {stored.get('format')!r:.20} is not supported"
        fix = "use the version that wrote it, or another output_dir"
        raise InputError(message, where=str(file), fix=fix)
    if changes := list_changes(stored, identity):
        message = f"holds a sweep with other settings: {'; '.join(changes[:MAX_NAMED])}"
        if more := len(changes[MAX_NAMED:]):
            message += f", and {format_count(more, 'other change')}"
        fix = "restore what has changed, or choose another output_dir"
        raise InputError(message, where=str(folder), fix=fix)
