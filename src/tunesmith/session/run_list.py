"""The run folders below a folder, with the state of each, for `tunesmith runs`.

    list_runs([Path("runs")]) -> [RunSummary, ...], the last changed first

Reads the record of a finished run, else its plan and the end of events.jsonl, so that a thousand
runs take a fraction of a second, and takes no lock, so that it never disturbs a run that starts. A
folder that cannot be read is listed with its problem. Left out: results in full (`tunesmith
report`)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pydantic_core import from_json

from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult, Event, Score, TrainStep
from tunesmith.core.hub_names import remove_commit
from tunesmith.core.run_dir import (
    EVENTS_FILE,
    FAILED_CHECK,
    OWNER_FILE,
    PLAN_FILE,
    RECORD_FILE,
    STAGES_DIR,
    STAGES_FILE,
    is_run,
    is_staged,
    read_last_events,
    read_plan_json,
    refuse_other_format,
)
from tunesmith.core.sealed_json import remove_seal
from tunesmith.core.types import Json

State = Literal["running", "finished", "stopped", "interrupted", "unreadable"]
MAX_DEPTH = 3  # folders below the one that is listed
# The score of a run in one column: the first of these that it has, or another grade.
MAIN_METRICS = ("exact_match", "accuracy")
UNGRADED_METRICS = ("loss", "kl", "top1_agreement", "bits_per_byte")


@dataclass(frozen=True)
class RunSummary:
    """A run in one line."""

    path: str
    state: State
    verdict: str = ""  # of a finished run
    model: str = ""
    step: int = 0  # over all stages
    steps: int = 0
    score: Score | None = None  # the newest; of test_data once the run is finished
    peak_bytes: int = 0
    modified: float = 0.0  # of its last event, seconds since the epoch
    problem: str = ""  # why it was stopped or cannot be read


def list_runs(roots: Sequence[Path]) -> list[RunSummary]:
    """Return the runs at or below the folders. Raises InputError for a folder that is missing."""
    runs = [summarize_run(folder) for folder in _find_all_runs(roots)]
    return sorted(runs, key=lambda run: (-run.modified, run.path))


def list_newest_runs(roots: Sequence[Path], count: int) -> tuple[list[RunSummary], int]:
    """Return the `count` runs that were changed last, and the number of older ones, which are not
    read. Raises InputError for a folder that is missing."""
    folders = _find_all_runs(roots)
    folders.sort(key=_read_modified, reverse=True)
    newest = [summarize_run(folder) for folder in folders[:count]]
    newest.sort(key=lambda run: (-run.modified, run.path))
    return newest, len(folders) - len(newest)


def _find_all_runs(roots: Sequence[Path]) -> list[Path]:
    folders: dict[Path, None] = {}  # ordered, without duplicates
    for root in roots:
        if not os.path.isdir(root):
            fix = "name a folder with runs in it, or start one: `tunesmith train recipe.yaml`"
            raise InputError("no such folder", where=str(root), fix=fix)
        paths = _find_runs(str(root), MAX_DEPTH)
        folders.update(dict.fromkeys(map(Path, paths)))
    return list(folders)


def _read_modified(folder: Path) -> float:
    """Return when a run was changed last, as its summary says; 0 for one that cannot be read."""
    with suppress(OSError):
        return os.stat(f"{folder}/{RECORD_FILE}").st_mtime
    with suppress(OSError, ValueError):
        return max(_read_mtime(path) for path in _list_parts(folder))
    return 0.0


def _find_runs(folder: str, depth: int) -> Iterator[str]:
    """Yield run folders, as text: joining a thousand Paths takes 10 ms. Stages are part of their
    run; links are not followed."""
    if is_run(folder):
        yield folder
        return
    if not depth:
        return
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return  # a folder that others have closed to us
    for name in sorted(names):
        yield from _find_runs(f"{folder}/{name}", depth - 1)


def summarize_run(folder: Path) -> RunSummary:
    """Summarize a run folder; the state of one that cannot be read is "unreadable"."""
    try:
        if os.path.isfile(folder / RECORD_FILE):
            return _summarize_finished(folder)
        plans = _read_plans(folder)
        parts = [read_last_events(path) for path in _list_parts(folder)]
        steps = [int(plan["steps"]) for plan in plans]
        model = str(plans[0]["recipe"]["model"])
    except InputError as error:
        return RunSummary(str(folder), "unreadable", problem=error.message)
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return RunSummary(str(folder), "unreadable", problem="its plan or record is damaged")
    events = list(itertools.chain.from_iterable(parts))
    state, problem = _find_state(folder, parts[-1])
    done = sum(map(_find_last_step, parts))
    return RunSummary(
        path=str(folder),
        state=state,
        model=Path(remove_commit(model)).name,
        step=min(done, sum(steps)),
        steps=sum(steps),
        score=_choose_score(event for event in events if isinstance(event, Score)),
        peak_bytes=_find_peak_bytes(events),
        modified=max(_read_mtime(path) for path in _list_parts(folder)),
        problem=problem,
    )


def _summarize_finished(folder: Path) -> RunSummary:
    file = folder / RECORD_FILE
    record = remove_seal(from_json(file.read_bytes()), file)
    refuse_other_format(record["plan"], file)
    scores = [_read_score(comparison["after"]) for comparison in record["comparisons"]]
    return RunSummary(
        path=str(folder),
        state="finished",
        verdict=str((record.get("verdict") or {}).get("name", "")),
        model=Path(remove_commit(record["plan"]["recipe"]["model"])).name,
        step=int(record["steps"]),
        steps=int(record["steps"]),
        score=_choose_score(scores),
        peak_bytes=int(record["peak_bytes"]),
        modified=file.stat().st_mtime,
    )


def _read_score(values: Json) -> Score:
    """Return a score whose values are numbers; a validated one would take ten times as long."""
    texts: Json = {"metric": str(values["metric"])}
    numbers: Json = {name: float(values[name]) for name in ("value", "low", "high")}
    return Score(**(values | texts | numbers))


def _read_plans(folder: Path) -> list[Json]:
    file = folder / (STAGES_FILE if is_staged(folder) else PLAN_FILE)
    plan = read_plan_json(file)
    return cast("list[Json]", plan.get("plans", [plan]))


def _list_parts(folder: Path) -> list[Path]:
    """Return the folders with the events of training: the stages that were begun, or the run."""
    if not is_staged(folder):
        return [folder]
    stages = [path for path in (folder / STAGES_DIR).glob("*-*") if is_run(path)]
    return sorted(stages, key=lambda path: int(path.name.partition("-")[0])) or [folder]


def _find_last_step(events: Sequence[Event]) -> int:
    return max((event.step for event in events), default=0)


def _find_peak_bytes(events: Sequence[Event]) -> int:
    return max((event.peak_bytes for event in events if isinstance(event, TrainStep)), default=0)


def _read_mtime(folder: Path) -> float:
    file = folder / EVENTS_FILE
    return (file if file.exists() else folder).stat().st_mtime


def _find_state(folder: Path, events: Sequence[Event]) -> tuple[State, str]:
    """Return the state of an unfinished run, and why a gate stopped it."""
    if _is_owner_alive(folder):
        return "running", ""
    last = events[-1] if events else None
    if isinstance(last, CheckResult) and last.kind == FAILED_CHECK:
        return "stopped", last.evidence
    return "interrupted", ""


def _is_owner_alive(folder: Path) -> bool:
    """Return whether the process that locked the folder still runs, by its start time: numbers of
    processes are used again."""
    import psutil

    file = folder / OWNER_FILE
    try:
        process = psutil.Process(int(file.read_text(encoding="utf-8")))
        return process.is_running() and process.create_time() <= file.stat().st_mtime + 1
    except (OSError, ValueError, OverflowError, psutil.Error):
        return False


def _choose_score(scores: Iterable[Score]) -> Score | None:
    """Return the newest score of the main metric: a grade if there is one, else the loss."""
    newest = {score.metric: score for score in scores}
    names = [*MAIN_METRICS, *(name for name in newest if name not in UNGRADED_METRICS), "loss"]
    return next((newest[name] for name in names if name in newest), None)
