"""The run folder: the only thing that a run leaves behind, and the interface that every other
program reads.

    with RunFolder.create(path) as folder:          refuses a folder that is in use or not empty
        folder.write_json("plan.json", plan)
        folder.append_event(step)                   a line of events.jsonl
        with folder.checkpoint(step, facts={...}) as target: ...   checkpoints/step-N

One process at a time may write; the lock dies with its process. Events are only ever appended; a
line that the disk has no room for waits in memory, and the next checkpoint is not written before
it. A run that was killed goes on with `RunFolder.open`, under the next attempt number, and so does
one that goes back; readers take the last attempt of a step. Reading events needs no lock. What the
files mean is the business of whoever writes them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tunesmith.core.atomic import (
    TEMP_PREFIX,
    atomic_dir,
    disk_errors,
    make_dirs,
    read_manifest,
    remove_folder,
    remove_leftovers,
    verify_dir,
    write_file,
)
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Rollback,
    Score,
    StageStart,
    TrainingEnd,
    TrainStep,
)
from tunesmith.core.json_io import dump_json, parse_as, read_json, to_jsonable
from tunesmith.core.types import Json, Plan

LOCK_FILE, EVENTS_FILE, CHECKPOINTS_DIR, RECIPE_FILE = (
    ".lock",
    "events.jsonl",
    "checkpoints",
    "recipe.yaml",
)
PLAN_FILE, FINGERPRINT_FILE, RECORD_FILE = "plan.json", "identity.json", "record.json"
EVAL_BEFORE_FILE, EVAL_AFTER_FILE = "before.json", "after.json"  # what was measured, item by item
ADAPTER_DIR, MODEL_DIR = (
    "adapter",
    "model",
)  # what a run leaves: the model where it trains all weights
STAGES_FILE, STAGES_DIR = (
    "stages.json",
    "stages",
)  # the plans of several stages, and the folder of their runs
# what the model wrote before it was trained, to rehearse it
SELF_REHEARSAL_FILE = "rehearsal.jsonl"
REJECTED_FILE = "rejected.jsonl"  # rows that could not be used; all that a refused attempt leaves
# written before the first step of the new way: it alone says which way a run went
ROLLBACKS_FILE = "rollbacks.json"
FAILED_CHECK = "failed"  # the kind of the verdict that ends a run which a gate has stopped

EVENT_TYPES: dict[type[Any], str] = {
    TrainStep: "step",
    Score: "score",
    GenerationSample: "sample",
    CheckResult: "verdict",
    CheckpointSaved: "saved",
    TrainingEnd: "done",
    StageStart: "stage",
}


class RunFolder:
    """An open, locked run folder. `attempt` counts from 1 the processes that worked on it, and the
    times that one of them went back to an earlier step."""

    def __init__(self, path: Path, lock: int, attempt: int) -> None:
        self.path, self.attempt, self._lock = path, attempt, lock
        self._pending = b""  # lines that the disk did not take yet
        with disk_errors(path / EVENTS_FILE):
            self._events = os.open(path / EVENTS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            complete_bytes = (path / EVENTS_FILE).read_bytes().rfind(b"\n") + 1
            os.ftruncate(
                self._events, complete_bytes
            )  # without the line that a killed process has left unfinished

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new run. Raises InputError if the folder is in use or holds anything, MachineError if
        it cannot be made."""
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise InputError(
                    "the output folder is a file", where=str(path), fix="choose another output_dir"
                )
            make_dirs(path)
            _refuse_nonempty(path)
            lock = _acquire_lock(path)
            try:
                _refuse_nonempty(
                    path
                )  # another process may have come and gone between the two lines above
            except InputError:
                os.close(lock)
                raise
            remove_leftovers(path)
        return cls(path, lock, attempt=1)

    @classmethod
    def open(cls, path: Path) -> Self:
        """An earlier run, to go on with. Raises InputError if it is none or in use."""
        require_run(path)
        with disk_errors(path):
            lock = _acquire_lock(path)
            remove_leftovers(path)
            remove_leftovers(path / CHECKPOINTS_DIR)
        attempts = [
            *(event["attempt"] for event in read_all_events(path)),
            *(rollback.attempt for rollback in read_rollbacks(path)),
        ]
        return cls(path, lock, attempt=1 + max(attempts, default=0))

    def close(self) -> None:
        os.close(self._events)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ files and events

    def write_json(self, name: str, value: Any) -> None:
        write_file(self.path / name, dump_json(value, indent=2))

    def write_text(self, name: str, text: str) -> None:
        write_file(self.path / name, text.encode())

    def append_event(self, event: Event) -> str:
        """Appends at once; all but steps are forced to the disk, since they are few and answer for
        what they name.

        Returns what the system said if the disk does not take the line. It waits then, with those
        after it, for the next event, or for `settle`."""
        event_type = EVENT_TYPES[type(event)]
        head = {"type": event_type, "time": round(time.time(), 3), "attempt": self.attempt}
        self._pending += dump_json({**head, **to_jsonable(event, event_type)})
        try:
            self._write_pending()
            if not isinstance(event, TrainStep):
                os.fsync(self._events)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def flush(self) -> None:
        """Writes what waits, and forces all lines to the disk. Raises MachineError if it still does
        not take them."""
        with disk_errors(self.path / EVENTS_FILE, len(self._pending)):
            self._write_pending()
            os.fsync(self._events)

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._events, self._pending) :]

    def load_events(self) -> list[Json]:
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
        """Fill the yielded folder: it becomes checkpoints/step-N, whole or not at all.

        `facts` go into its manifest (recipe hash, data fingerprint, versions). Older ones beyond
        `keep_last` are removed once this one is verified, which means read again from end to end;
        those of the steps `keep` stay."""
        self.flush()
        target = self.path / CHECKPOINTS_DIR / f"step-{step}"
        with atomic_dir(
            target, metadata={"step": step, **metadata}, needed_bytes=needed_bytes
        ) as temporary:
            yield temporary
        if problem := verify_dir(target):
            raise MachineError(
                f"was written and reads back differently: {problem}", where=str(target)
            )
        self._prune_checkpoints(step, keep_last, keep_steps)

    def iter_checkpoints(self) -> Iterator[tuple[Path, str]]:
        """Newest first, each with what is wrong with it, empty if nothing is. Lazy, since it reads
        every byte."""
        for step, path in self._list_checkpoints():
            yield path, _verify_checkpoint(path, step)

    def find_latest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest one that can be trusted, and for each newer one what is wrong with it. It is
        found by name: a pointer to it would be one more file that can be torn, and would still need
        the same checks."""
        skipped: list[str] = []
        for path, problem in self.iter_checkpoints():
            if not problem:
                return path, skipped
            skipped.append(f"{CHECKPOINTS_DIR}/{path.name}: {problem}")
        return None, skipped

    def find_checkpoint(self, step: int) -> Path:
        """Raises InputError if there is none of this step, or if it is damaged."""
        paths = dict(self._list_checkpoints())
        if step not in paths:
            saved_steps = ", ".join(str(number) for number in sorted(paths)) or "none"
            raise InputError(
                f"there is no checkpoint of step {step}",
                where=str(self.path),
                fix=f"there are: {saved_steps}",
            )
        if problem := _verify_checkpoint(paths[step], step):
            fix = "leave the step out: the newest checkpoint that can be trusted is taken"
            raise InputError(problem, where=str(paths[step]), fix=fix)
        return paths[step]

    def _list_checkpoints(self) -> list[tuple[int, Path]]:
        matches = [
            (re.fullmatch(r"step-(\d+)", path.name), path)
            for path in (self.path / CHECKPOINTS_DIR).glob("step-*")
        ]
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def list_saved_steps(self) -> list[int]:
        """Steps with a checkpoint whose files are there in full, newest first."""
        return [
            step
            for step, path in self._list_checkpoints()
            if not verify_dir(path, should_hash=False)
        ]

    def record_rollback(self, rollback: Rollback) -> tuple[Rollback, ...]:
        """From here on all counts that comes after the step which the run goes back to. Returns all
        rollbacks."""
        for step, path in self._list_checkpoints():
            if step > rollback.to:
                with disk_errors(path):
                    remove_folder(path)
        rollbacks = (
            *read_rollbacks(self.path),
            dataclasses.replace(rollback, attempt=self.attempt),
        )
        self.write_json(ROLLBACKS_FILE, rollbacks)
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
    return "" if manifest_step == step else f"its manifest is of step {manifest_step}"


def _refuse_nonempty(path: Path) -> None:
    """Raises InputError if the folder holds anything but what a process leaves that is killed
    before it has a plan."""
    content = sorted(entry.name for entry in path.iterdir() if not _is_startup_file(entry))
    if not content:
        return
    if (path / LOCK_FILE).exists():
        os.close(_acquire_lock(path))  # in use is the better answer, if it is true
    names = ", ".join(content[:3]) + (", ..." if len(content) > 3 else "")
    fix = "choose another output_dir" + (
        ", or `tunesmith resume` this run" if PLAN_FILE in content else ""
    )
    raise InputError(f"the output folder is not empty: {names}", where=str(path), fix=fix)


def _is_startup_file(entry: Path) -> bool:
    if entry.name == EVENTS_FILE:
        return entry.is_file() and not entry.stat().st_size
    return entry.name in (
        LOCK_FILE,
        FINGERPRINT_FILE,
        REJECTED_FILE,
        SELF_REHEARSAL_FILE,
    ) or entry.name.startswith(TEMP_PREFIX)


def _acquire_lock(path: Path) -> int:
    """The descriptor that holds the lock. The system drops it when the process ends, so a stale
    lock is no lock."""
    lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 20, 0).decode().strip()
        os.close(lock)
        raise InputError(
            f"in use by process {owner}", where=str(path), fix="wait for it, or stop it"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def require_run(path: Path) -> None:
    """Raises InputError for what is no run folder."""
    if not is_run(path):
        fix = "name a run folder; `tunesmith train` makes one"
        raise InputError(f"not a run folder: there is no {PLAN_FILE}", where=str(path), fix=fix)


def is_run(path: Path) -> bool:
    return (path / PLAN_FILE).is_file() or is_staged(path)


def read_run_plan(path: Path) -> Plan:
    """Raises InputError when it is missing, broken, or of another version."""
    return parse_as(Plan, read_json(path / PLAN_FILE), where=str(path / PLAN_FILE))


def is_staged(path: Path) -> bool:
    return (path / STAGES_FILE).is_file()


def find_weights_dir(path: Path) -> Path:
    """Where the weights of a run are: of several stages, in the folder of the last one."""
    if not is_staged(path):
        return path
    if not (path / RECORD_FILE).is_file():
        raise InputError(
            "not all of its stages are finished", where=str(path), fix=f"tunesmith resume {path}"
        )
    return max((path / STAGES_DIR).iterdir(), key=lambda folder: int(folder.name.partition("-")[0]))


def find_parent_run(path: Path) -> Path:
    """The run that a stage is part of, or the run itself."""
    parent = path.absolute().parent
    return path.parent.parent if parent.name == STAGES_DIR and is_staged(parent.parent) else path


def read_events(path: Path) -> list[Json]:
    """The events of a run folder by step, of each kind the last attempt at that step, without those
    of a way that the run has given up; that it went back is kept. Takes no lock."""
    events = _drop_rolled_back(read_all_events(path), read_rollbacks(path))
    last_attempts: dict[tuple[str, int], int] = {}
    for event in events:
        last_attempts[event["type"], event["step"]] = event["attempt"]
    latest = [
        event
        for event in events
        if last_attempts[event["type"], event["step"]] == event["attempt"] or _is_rollback(event)
    ]
    return sorted(latest, key=lambda event: event["step"])


def read_rollbacks(path: Path) -> tuple[Rollback, ...]:
    """Those of a run folder, in order. Raises InputError for a damaged file."""
    file = path / ROLLBACKS_FILE
    return parse_as(tuple[Rollback, ...], read_json(file), where=str(file)) if file.exists() else ()


def _drop_rolled_back(events: list[Json], rollbacks: Sequence[Rollback]) -> list[Json]:
    """The events without those of a way that was given up."""
    abandoned = [(rollback.attempt, rollback.to) for rollback in rollbacks]
    return [
        event
        for event in events
        if _is_rollback(event)
        or not any(event["attempt"] <= attempt and event["step"] > to for attempt, to in abandoned)
    ]


def _is_rollback(event: Json) -> bool:
    return event.get("level") == "rollback"


def read_all_events(path: Path) -> list[Json]:
    """The events of all attempts, in the order in which they were written. Raises InputError with
    file:line.

    What stands behind the last line break is left out: it was cut off by a kill, or is just being
    written."""
    file = path / EVENTS_FILE
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    events: list[Json] = []
    for line_number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            raise InputError("not JSON", where=f"{file}:{line_number}") from None
    return events


def read_failure(path: Path) -> str:
    """Why a gate ended the last attempt at this run; empty if none did."""
    last_event = next(reversed(read_all_events(path)), None)
    return (
        last_event["evidence"]
        if last_event and last_event["type"] == "verdict" and last_event["kind"] == FAILED_CHECK
        else ""
    )


def pick_run_folder(parent: Path, name: str) -> Path:
    """The first of name-1, name-2, ... that does not exist yet, or holds only the rejected rows of
    an attempt."""
    number = 1
    while (folder := parent / f"{name}-{number}").exists() and not _has_only_rejected(folder):
        number += 1
    return folder


def is_free(path: Path) -> bool:
    """Whether a run could begin there."""
    return not path.exists() or (
        path.is_dir() and all(_is_startup_file(entry) for entry in path.iterdir())
    )


def _has_only_rejected(path: Path) -> bool:
    return path.is_dir() and [entry.name for entry in path.iterdir()] == [REJECTED_FILE]
