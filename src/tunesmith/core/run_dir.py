"""The run folder: all that a run leaves, and the interface for every other program.

    with RunFolder.create(path) as folder:      refuses a folder that is in use or not empty
        folder.write_json("plan.json", plan)
        folder.append_event(step)               one line of events.jsonl
        with folder.checkpoint(step, metadata={...}) as target: ...     checkpoints/step-N
    read_events(path) -> list[Event]            takes no lock

One process at a time may write; the lock dies with its process. Events are only appended. A line
that the disk has no room for waits in memory, and no checkpoint is written before it. A run that
was killed continues with `RunFolder.open`, under the next attempt number, and so does a run that
rolls back; readers take the last attempt of a step. Left out: the content of the other files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from tunesmith.core.atomic import (
    TEMP_PREFIX,
    atomic_dir,
    disk_errors,
    make_dirs,
    open_unlinked,
    read_manifest,
    refuse_links,
    remove_folder,
    remove_leftovers,
    verify_dir,
    write_file,
)
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import (
    CHECKSUM_KEY,
    CheckResult,
    Event,
    LoggedEvent,
    Rollback,
    Score,
    TrainStep,
    compute_checksum,
    get_event_type,
    parse_event,
)
from tunesmith.core.json_io import dump_json, parse_as, read_file, to_jsonable
from tunesmith.core.sealed_json import RESTORE_FIX, read_sealed_json, seal_json
from tunesmith.core.types import RUN_FORMAT, Json, Plan, RunRecord

if TYPE_CHECKING:
    from filelock import FileLock

PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.yaml"
RESOLVED_FILE = "resolved.yaml"  # the recipe with every value that the plan resolved
EVENTS_FILE = "events.jsonl"
FINGERPRINT_FILE = "fingerprint.json"  # hashes of everything that the run depends on
CHECKPOINTS_DIR = "checkpoints"
ADAPTER_DIR = "adapter"
MODEL_DIR = "model"  # in place of the adapter, where all weights are trained
PREFLIGHT_FILE = "preflight.json"  # checks of the attempt that began last
EVAL_BEFORE_FILE = "eval_before.json"  # results by item, before and after training
EVAL_AFTER_FILE = "eval_after.json"
RECORD_FILE = "record.json"
STAGES_FILE = "stages.json"  # in place of plan.json, in a run of several stages
STAGES_DIR = "stages"
SELF_REHEARSAL_FILE = "rehearsal.jsonl"  # texts that the base model generated for rehearsal
REJECTED_FILE = "rejected.jsonl"  # rows that could not be used
ROLLBACKS_FILE = "rollbacks.json"  # written before the first step after a rollback
LOCK_FILE = ".lock"
OWNER_FILE = ".lock.pid"  # the process that holds the lock

# files that a process leaves if it is killed before it has a plan
STARTUP_FILES = (LOCK_FILE, OWNER_FILE, FINGERPRINT_FILE, REJECTED_FILE, SELF_REHEARSAL_FILE)
RUNS_ROOT = Path("runs")  # the default parent of run folders
RUN_FIX = "name a run folder: `tunesmith runs` lists them"
EVENT_FIX = f"{RESTORE_FIX}, or remove the line: checkpoints do not depend on it"
FAILED_CHECK = "failed"  # kind of the CheckResult that ends a run which a gate has stopped


class RunFolder:
    """An open, locked run folder.

    `attempt` counts from 1 the processes that worked on the run, and its rollbacks."""

    def __init__(self, path: Path, lock: FileLock, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._lock = lock
        self._pending = b""  # lines that the disk has not taken yet
        file = path / EVENTS_FILE
        with disk_errors(file):
            self._events = open_unlinked(file, os.O_RDWR | os.O_APPEND)
            # cut off the line that a killed process left unfinished
            os.ftruncate(self._events, file.read_bytes().rfind(b"\n") + 1)

    @classmethod
    def create(cls, path: Path) -> Self:
        """Start a run. Raises InputError if the folder is in use, not empty or has a link,
        MachineError if it cannot be created."""
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise InputError(
                    "the output folder is a file", where=str(path), fix="choose another output_dir"
                )
            make_dirs(path)
            refuse_links(path)
            _refuse_nonempty(path)
            lock = _acquire_lock(path)
            try:
                # another process may have come and gone before the lock was taken
                _refuse_nonempty(path)
            except InputError:
                lock.release()
                raise
            remove_leftovers(path)
        return cls(path, lock, attempt=1)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run to continue it. Raises InputError if it is not a run, in use, or has
        a link where it would be written."""
        require_run(path)
        with disk_errors(path):
            for folder in (path, path / CHECKPOINTS_DIR, path / STAGES_DIR):
                if folder.is_dir():
                    refuse_links(folder)
            lock = _acquire_lock(path)
            remove_leftovers(path)
            remove_leftovers(path / CHECKPOINTS_DIR)
        attempts = [0]
        attempts += [logged.attempt for logged in read_all_events(path)]
        attempts += [rollback.attempt for rollback in read_rollbacks(path)]
        return cls(path, lock, attempt=1 + max(attempts))

    def close(self) -> None:
        os.close(self._events)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ files and events

    def write_json(self, name: str, value: Any) -> None:
        """Write an object with its seal (sealed_json.py)."""
        write_file(self.path / name, seal_json(value))

    def write_text(self, name: str, text: str) -> None:
        write_file(self.path / name, text.encode())

    def append_event(self, event: Event) -> str:
        """Append an event, and force it to the disk unless it is a step (they are many).

        Returns the system's message if the disk does not take the line. It then waits, with later
        lines, for the next event or `flush`."""
        event_type = get_event_type(event)
        head = {"type": event_type, "time": round(time.time(), 3), "attempt": self.attempt}
        fields: Json = {**head, **to_jsonable(event, event_type)}
        self._pending += dump_json({**fields, CHECKSUM_KEY: compute_checksum(fields)})
        try:
            self._write_pending()
            if not isinstance(event, TrainStep):
                os.fsync(self._events)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def flush(self) -> None:
        """Write waiting lines and force all lines to the disk. Raises MachineError if the disk
        still does not take them."""
        with disk_errors(self.path / EVENTS_FILE, len(self._pending)):
            self._write_pending()
            os.fsync(self._events)

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._events, self._pending) :]

    def load_events(self) -> list[Event]:
        return read_events(self.path)

    def load_rollbacks(self) -> tuple[Rollback, ...]:
        return read_rollbacks(self.path)

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def checkpoint(
        self,
        step: int,
        *,
        metadata: Json,
        needed_bytes: int = 0,
        keep_last: int = 2,
        keep_steps: Collection[int] = (),
    ) -> Generator[Path]:
        """Yield a folder to fill, which then becomes checkpoints/step-N atomically.

        `metadata` goes into its manifest (recipe hash, data fingerprint, versions). When the
        checkpoint has been read back and verified, older ones beyond `keep_last` are removed,
        except those of `keep_steps`."""
        self.flush()
        target = self.path / CHECKPOINTS_DIR / f"step-{step}"
        with atomic_dir(
            target, metadata={"step": step, **metadata}, needed_bytes=needed_bytes
        ) as temporary:
            yield temporary
        if problem := verify_dir(target):
            raise MachineError(f"reads back differently: {problem}", where=str(target))
        self._prune_checkpoints(step, keep_last, keep_steps)

    def iter_checkpoints(self) -> Iterator[tuple[Path, str]]:
        """Yield each checkpoint, newest first, with its problem ("" if it is valid). Reads every
        byte, one checkpoint at a time."""
        for step, path in self._list_checkpoints():
            yield path, _verify_checkpoint(path, step)

    def find_latest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Return the newest valid checkpoint, and the problem of each newer one.

        It is found by name: a pointer file could be torn, too, and would need the same checks."""
        skipped: list[str] = []
        for path, problem in self.iter_checkpoints():
            if not problem:
                return path, skipped
            skipped.append(f"{CHECKPOINTS_DIR}/{path.name}: {problem}")
        return None, skipped

    def find_checkpoint(self, step: int) -> Path:
        """Return the checkpoint of a step. Raises InputError if it is missing or damaged."""
        paths = dict(self._list_checkpoints())
        if step not in paths:
            saved_steps = ", ".join(str(number) for number in sorted(paths)) or "none"
            raise InputError(
                f"there is no checkpoint of step {step}",
                where=str(self.path),
                fix=f"use one of these steps: {saved_steps}",
            )
        if problem := _verify_checkpoint(paths[step], step):
            fix = "leave the step out to use the newest valid checkpoint"
            raise InputError(problem, where=str(paths[step]), fix=fix)
        return paths[step]

    def _list_checkpoints(self) -> list[tuple[int, Path]]:
        checkpoints: list[tuple[int, Path]] = []
        for path in (self.path / CHECKPOINTS_DIR).glob("step-*"):
            if match := re.fullmatch(r"step-(\d+)", path.name):
                checkpoints.append((int(match[1]), path))
        return sorted(checkpoints, reverse=True)

    def list_saved_steps(self) -> list[int]:
        """Return the steps of checkpoints with all files in full size, newest first."""
        return [
            step
            for step, path in self._list_checkpoints()
            if not verify_dir(path, should_hash=False)
        ]

    def record_rollback(self, rollback: Rollback) -> tuple[Rollback, ...]:
        """Record a rollback: events after `rollback.to` from earlier attempts are ignored from now
        on. Returns all rollbacks of the run."""
        for step, path in self._list_checkpoints():
            if step > rollback.to:
                with disk_errors(path):
                    remove_folder(path)
        rollback = dataclasses.replace(rollback, attempt=self.attempt)
        rollbacks = (*read_rollbacks(self.path), rollback)
        self.write_json(ROLLBACKS_FILE, {"rollbacks": rollbacks})
        self.attempt += 1
        return rollbacks

    def _prune_checkpoints(self, step: int, keep_last: int, keep_steps: Collection[int]) -> None:
        num_valid = 0
        for number, path in self._list_checkpoints():
            if num_valid >= keep_last and number < step and number not in keep_steps:
                with disk_errors(path):
                    remove_folder(path)
            elif not verify_dir(path, should_hash=False):
                num_valid += 1


def _verify_checkpoint(checkpoint: Path, step: int) -> str:
    if problem := verify_dir(checkpoint):
        return problem
    manifest_step = read_manifest(checkpoint).get("step")
    return "" if manifest_step == step else f"its manifest names step {manifest_step}"


def _refuse_nonempty(path: Path) -> None:
    """Raise InputError for any file but those of a process that was killed before its plan."""
    content = sorted(entry.name for entry in path.iterdir() if not _is_startup_file(entry))
    if not content:
        return
    if (path / LOCK_FILE).exists():
        _acquire_lock(path).release()  # "in use" is the better message, if it applies
    names = ", ".join(content[:3]) + (", ..." if len(content) > 3 else "")
    fix = "choose another output_dir" + (
        ", or `tunesmith resume` this run" if PLAN_FILE in content else ""
    )
    raise InputError(f"the output folder is not empty: {names}", where=str(path), fix=fix)


def _is_startup_file(entry: Path) -> bool:
    if entry.name == EVENTS_FILE:
        return entry.is_file() and not entry.stat().st_size
    return entry.name in STARTUP_FILES or entry.name.startswith(TEMP_PREFIX)


def _acquire_lock(path: Path) -> FileLock:
    """Lock the folder. The system drops the lock when the process ends. A file system without locks
    raises OSError: a killed process would leave a marker file behind."""
    from filelock import FileLock, Timeout  # which imports asyncio, and readers take no lock

    os.close(open_unlinked(path / LOCK_FILE, os.O_RDWR))  # raises for a link
    lock = FileLock(path / LOCK_FILE, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = _read_owner(path)
        raise InputError(
            f"in use by process {owner}", where=str(path), fix="wait for it, or stop it"
        ) from None
    owner_file = open_unlinked(path / OWNER_FILE, os.O_WRONLY)
    try:
        os.ftruncate(owner_file, 0)
        os.write(owner_file, str(os.getpid()).encode())
    finally:
        os.close(owner_file)
    return lock


def _read_owner(path: Path) -> str:
    try:
        return (path / OWNER_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"  # it has just taken the lock


# ---------------------------------------------------------------- readers


def is_run(path: Path | str) -> bool:
    # not Path.is_file, which raises OSError for a name that is too long
    return os.path.isfile(f"{path}/{PLAN_FILE}") or is_staged(path)


def is_staged(path: Path | str) -> bool:
    return os.path.isfile(f"{path}/{STAGES_FILE}")


def require_run(path: Path) -> None:
    """Raise InputError if the folder is not a run, or has another format."""
    if not os.path.exists(path):
        raise InputError("no such run folder", where=str(path), fix=RUN_FIX)
    if not is_run(path):
        message = f"not a run folder: there is no {PLAN_FILE}"
        raise InputError(message, where=str(path), fix=RUN_FIX)
    read_plan_json(path / (STAGES_FILE if is_staged(path) else PLAN_FILE))


def list_folders(path: Path) -> list[Path]:
    """Return the subfolders; none if the folder cannot be read."""
    try:
        return [child for child in path.iterdir() if child.is_dir()]
    except (OSError, ValueError):  # also a name that no file can have
        return []


def read_plan_json(file: Path) -> Json:
    """Read a file that holds a Plan or a StagedPlan. Raises InputError if it is missing, broken or
    of another format."""
    content = read_sealed_json(file)
    plans: Any = content.get("plans", [content])
    for plan in cast("list[Any]", plans if isinstance(plans, list) and plans else [None]):
        refuse_other_format(plan, file)
    return content


def refuse_other_format(plan: Any, file: Path) -> None:
    """Raise InputError for a plan, as read from JSON, that is none or has another format."""
    if not isinstance(plan, dict):
        raise InputError("not a plan", where=str(file), fix=RESTORE_FIX)
    file_format = cast("Json", plan).get("format", 1)
    if file_format != RUN_FORMAT:
        raise InputError(
            f"run folder format {file_format!r:.20} is not supported; this version reads format "
            f"{RUN_FORMAT}",
            where=str(file),
            fix="use the version that wrote it, or train again from the recipe",
        )


def read_run_plan(path: Path) -> Plan:
    """Raises InputError when it is missing, broken, or of another format."""
    file = path / PLAN_FILE
    return parse_as(Plan, read_plan_json(file), where=str(file), fix=RESTORE_FIX)


def read_run_record(path: Path) -> RunRecord:
    """Raises InputError when the run is not finished, or of another format."""
    require_run(path)
    file = path / RECORD_FILE
    if not file.is_file():
        fix = f"finish it: tunesmith resume {path}"
        raise InputError("this run is not finished", where=str(path), fix=fix)
    return parse_as(RunRecord, read_sealed_json(file), where=str(file), fix=RESTORE_FIX)


def find_weights_dir(path: Path) -> Path:
    """Return the folder with the trained weights: in a staged run, that of the last stage.

    Raises InputError for a run of another format."""
    if is_run(path):
        require_run(path)
    if not is_staged(path):
        return path
    if not (path / RECORD_FILE).is_file():
        fix = f"finish the run: tunesmith resume {path}"
        raise InputError("some of its stages are not finished", where=str(path), fix=fix)
    stages = [stage for stage in list_folders(path / STAGES_DIR) if re.match(r"\d+-", stage.name)]
    return max(stages, key=lambda stage: int(stage.name.partition("-")[0]), default=path)


def find_parent_run(path: Path) -> Path:
    """Return the run that a stage is part of, or the run itself."""
    parent = path.absolute().parent
    return path.parent.parent if parent.name == STAGES_DIR and is_staged(parent.parent) else path


def read_events(path: Path) -> list[Event]:
    """Return the events of a run folder by step: of each kind the last attempt at a step.

    Events that a rollback discarded are left out, and the results that announce rollbacks are kept.
    Raises InputError with file:line for a broken line."""
    events = _drop_discarded(read_all_events(path), read_rollbacks(path))
    last_attempts: dict[tuple[type[Event], str, int], int] = {}
    for logged in events:
        last_attempts[_get_kind(logged.event)] = logged.attempt
    latest: list[Event] = []
    for logged in events:
        is_last = logged.attempt == last_attempts[_get_kind(logged.event)]
        if is_last or _is_rollback(logged.event):
            latest.append(logged.event)
    return sorted(latest, key=lambda event: event.step)


def _get_kind(event: Event) -> tuple[type[Event], str, int]:
    """Return what a later attempt replaces as one. Test rows are measured with the weights of a
    step that an earlier attempt may have evaluated."""
    return type(event), event.task if isinstance(event, Score) else "", event.step


def read_rollbacks(path: Path) -> tuple[Rollback, ...]:
    """Return the rollbacks of a run folder, in order. Raises InputError for a damaged file."""
    file = path / ROLLBACKS_FILE
    if not file.exists():
        return ()
    rollbacks = read_sealed_json(file).get("rollbacks")
    return parse_as(tuple[Rollback, ...], rollbacks, where=str(file), fix=RESTORE_FIX)


def _drop_discarded(
    events: Sequence[LoggedEvent], rollbacks: Sequence[Rollback]
) -> list[LoggedEvent]:
    remaining = list(events)
    for rollback in rollbacks:
        remaining = [
            logged
            for logged in remaining
            if logged.attempt > rollback.attempt
            or logged.event.step <= rollback.to
            or _is_rollback(logged.event)
        ]
    return remaining


def _is_rollback(event: Event) -> bool:
    return isinstance(event, CheckResult) and event.level == "rollback"


def read_all_events(path: Path) -> list[LoggedEvent]:
    """Return the events of all attempts, in the order in which they were written.

    An unfinished last line is left out: it was cut off by a kill, or is just being written. Raises
    InputError with file:line for a broken line."""
    file = path / EVENTS_FILE
    content = read_file(file, fix=RESTORE_FIX, max_bytes=None) if file.exists() else b""
    events: list[LoggedEvent] = []
    for line_number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            events.append(parse_event(line))
        except ValueError as error:
            message = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(message, where=f"{file}:{line_number}", fix=EVENT_FIX) from None
    return events


def read_last_events(path: Path, max_bytes: int = 16_384) -> list[Event]:
    """Return the events at the end of the log, in the order in which they were written, of all
    attempts. Lines that are unfinished or broken are left out."""
    file = path / EVENTS_FILE
    if not file.exists():
        return []
    with file.open("rb") as stream:
        start = max(0, stream.seek(0, os.SEEK_END) - max_bytes)
        stream.seek(start)
        lines = stream.read(max_bytes).split(b"\n")[:-1]
    events: list[Event] = []
    for line in lines[1:] if start else lines:
        with suppress(ValueError):
            events.append(parse_event(line).event)
    return events


def read_failure(path: Path) -> str:
    """Return the reason why a gate ended the last attempt, or "" if none did."""
    events = read_all_events(path)
    last = events[-1].event if events else None
    if isinstance(last, CheckResult) and last.kind == FAILED_CHECK:
        return last.evidence
    return ""


def pick_run_folder(parent: Path, name: str) -> Path:
    """Return the first of name-1, name-2, ... that is free, or has only rejected rows."""
    number = 1
    while (folder := parent / f"{name}-{number}").exists() and not _has_only_rejected(folder):
        number += 1
    return folder


def is_free(path: Path) -> bool:
    """Return whether a run could start there."""
    if not path.exists():
        return True
    return path.is_dir() and all(
        _is_startup_file(entry) and not entry.is_symlink() for entry in path.iterdir()
    )


def _has_only_rejected(path: Path) -> bool:
    if not path.is_dir():
        return False
    entries = list(path.iterdir())
    return [entry.name for entry in entries] == [REJECTED_FILE] and not entries[0].is_symlink()
