"""Find the run that has tried what a next step would do.

In: a run folder, its Plan, the settings that the step changes. Out: the folder beside it whose run
has those settings and the same files. Left out: what its result says (evaluate/next_steps.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.run_dir import is_run, is_staged, list_folders, read_run_plan
from tunesmith.core.types import Plan
from tunesmith.plan.resolved import identify_run

MAX_FOLDERS = 200  # that are looked at


def find_tried(run: Path, plan: Plan, changes: Mapping[str, Any]) -> Path | None:
    free = ("num_train_epochs",) if "max_steps" in changes else ()
    wanted = {**identify_run(plan, *free), **changes}
    for folder in sorted(list_folders(run.parent))[:MAX_FOLDERS]:
        if folder.name == run.name or not is_run(folder) or is_staged(folder):
            continue
        try:
            other = read_run_plan(folder)
        except InputError:  # damaged, or of another format
            continue
        if identify_run(other, *free) == wanted:
            return folder
    return None
