"""The run folder: the only thing that a run leaves behind, and the interface that every other program reads.

    with RunFolder.create(path) as folder:          refuses a folder that is in use or not empty
        folder.write_json("plan.json", plan)
        folder.append_event(step)                   a line of events.jsonl
        with folder.checkpoint(step, facts={...}) as target: ...   checkpoints/step-N

One process at a time may write; the lock dies with its process. Events are only ever appended; a line that the disk has
no room for waits in memory, and the next checkpoint is not written before it. A run that was killed goes on with
`RunFolder.open`, under the next attempt number, and so does one that goes back; readers take the last attempt of a
step. Reading events needs no lock.
What the files mean is the business of whoever writes them.
"""

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
    TEMPORARY,
    damage,
    disk_errors,
    make_folder,
    new_folder,
    read_manifest,
    remove_folder,
    remove_leftovers,
    write_file,
)
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.events import Done, Event, Rollback, Sample, Saved, Score, Stage, StepResult, Verdict
from tunesmith.core.json_io import from_json, json_bytes, read_json, to_json
from tunesmith.core.types import Json, Plan

LOCK, EVENTS, CHECKPOINTS, RECIPE = ".lock", "events.jsonl", "checkpoints", "recipe.yaml"
PLAN, IDENTITY, RECORD = "plan.json", "identity.json", "record.json"
BEFORE, AFTER = "before.json", "after.json"  # what was measured, item by item
ADAPTER, MODEL = "adapter", "model"  # what a run leaves: the model where it trains all weights
STAGES, OF_STAGES = "stages.json", "stages"  # the plans of several stages, and the folder of their runs
OWN_ROWS = "rehearsal.jsonl"  # what the model wrote before it was trained, to rehearse it
REJECTED = "rejected.jsonl"  # rows that could not be used; all that a refused attempt leaves
ROLLBACKS = "rollbacks.json"  # written before the first step of the new way: it alone says which way a run went
FAILED = "failed"  # the kind of the verdict that ends a run which a gate has stopped

EVENT_TYPES: dict[type[Any], str] = {
    StepResult: "step",
    Score: "score",
    Sample: "sample",
    Verdict: "verdict",
    Saved: "saved",
    Done: "done",
    Stage: "stage",
}


class RunFolder:
    """An open, locked run folder. `attempt` counts from 1 the processes that worked on it, and the times that one of
    them went back to an earlier step."""

    def __init__(self, path: Path, lock: int, attempt: int) -> None:
        self.path, self.attempt, self._lock = path, attempt, lock
        self._waiting = b""  # lines that the disk did not take yet
        with disk_errors(path / EVENTS):
            self._events = os.open(path / EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            whole = (path / EVENTS).read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._events, whole)  # without the line that a killed process has left unfinished

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new run. Raises InputError if the folder is in use or holds anything, MachineError if it cannot be made."""
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise InputError("the output folder is a file", where=str(path), fix="choose another output_dir")
            make_folder(path)
            _refuse_content(path)
            lock = _locked(path)
            try:
                _refuse_content(path)  # another process may have come and gone between the two lines above
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
            lock = _locked(path)
            remove_leftovers(path)
            remove_leftovers(path / CHECKPOINTS)
        told = [*(event["attempt"] for event in every_event(path)), *(one.attempt for one in read_rollbacks(path))]
        return cls(path, lock, attempt=1 + max(told, default=0))

    def close(self) -> None:
        os.close(self._events)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------ files and events

    def write_json(self, name: str, value: Any) -> None:
        write_file(self.path / name, json_bytes(value, indent=2))

    def write_text(self, name: str, text: str) -> None:
        write_file(self.path / name, text.encode())

    def append_event(self, event: Event) -> str:
        """Appends at once; all but steps are forced to the disk, since they are few and answer for what they name.

        Returns what the system said if the disk does not take the line. It waits then, with those after it, for the
        next event, or for `settle`.
        """
        kind = EVENT_TYPES[type(event)]
        head = {"type": kind, "time": round(time.time(), 3), "attempt": self.attempt}
        self._waiting += json_bytes({**head, **to_json(event, kind)})
        try:
            self._write_waiting()
            if not isinstance(event, StepResult):
                os.fsync(self._events)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def settle(self) -> None:
        """Writes what waits, and forces all lines to the disk. Raises MachineError if it still does not take them."""
        with disk_errors(self.path / EVENTS, len(self._waiting)):
            self._write_waiting()
            os.fsync(self._events)

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._events, self._waiting) :]

    def events(self) -> list[Json]:
        return read_events(self.path)

    def rollbacks(self) -> tuple[Rollback, ...]:
        return read_rollbacks(self.path)

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def checkpoint(
        self, step: int, *, facts: Json, needed_bytes: int = 0, keep_last: int = 2, keep: Collection[int] = ()
    ) -> Generator[Path]:
        """Fill the yielded folder: it becomes checkpoints/step-N, whole or not at all.

        `facts` go into its manifest (recipe hash, data fingerprint, versions). Older ones beyond `keep_last` are
        removed once this one is verified, which means read again from end to end; those of the steps `keep` stay.
        """
        self.settle()
        target = self.path / CHECKPOINTS / f"step-{step}"
        with new_folder(target, facts={"step": step, **facts}, needed_bytes=needed_bytes) as temporary:
            yield temporary
        if problem := damage(target):
            raise MachineError(f"was written and reads back differently: {problem}", where=str(target))
        self._purge(step, keep_last, keep)

    def checkpoints(self) -> Iterator[tuple[Path, str]]:
        """Newest first, each with what is wrong with it, empty if nothing is. Lazy, since it reads every byte."""
        for step, path in self._by_step():
            yield path, _trouble(path, step)

    def latest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest one that can be trusted, and for each newer one what is wrong with it. It is found by name: a
        pointer to it would be one more file that can be torn, and would still need the same checks."""
        skipped: list[str] = []
        for path, problem in self.checkpoints():
            if not problem:
                return path, skipped
            skipped.append(f"{CHECKPOINTS}/{path.name}: {problem}")
        return None, skipped

    def checkpoint_of(self, step: int) -> Path:
        """Raises InputError if there is none of this step, or if it is damaged."""
        paths = dict(self._by_step())
        if step not in paths:
            there = ", ".join(str(number) for number in sorted(paths)) or "none"
            raise InputError(f"there is no checkpoint of step {step}", where=str(self.path), fix=f"there are: {there}")
        if problem := _trouble(paths[step], step):
            fix = "leave the step out: the newest checkpoint that can be trusted is taken"
            raise InputError(problem, where=str(paths[step]), fix=fix)
        return paths[step]

    def _by_step(self) -> list[tuple[int, Path]]:
        named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (self.path / CHECKPOINTS).glob("step-*")]
        return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)

    def steps_saved(self) -> list[int]:
        """Steps with a checkpoint whose files are there in full, newest first."""
        return [step for step, path in self._by_step() if not damage(path, hashes=False)]

    def go_back(self, rollback: Rollback) -> tuple[Rollback, ...]:
        """From here on all counts that comes after the step which the run goes back to. Returns all rollbacks."""
        for step, path in self._by_step():
            if step > rollback.to:
                with disk_errors(path):
                    remove_folder(path)
        every = (*read_rollbacks(self.path), dataclasses.replace(rollback, attempt=self.attempt))
        self.write_json(ROLLBACKS, every)
        self.attempt += 1
        return every

    def _purge(self, step: int, keep_last: int, keep: Collection[int]) -> None:
        kept = 0
        for number, path in self._by_step():
            if kept >= keep_last and number < step and number not in keep:
                with disk_errors(path):
                    remove_folder(path)
            elif not damage(path, hashes=False):
                kept += 1


def _trouble(checkpoint: Path, step: int) -> str:
    if problem := damage(checkpoint):
        return problem
    written = read_manifest(checkpoint).get("step")
    return "" if written == step else f"its manifest is of step {written}"


def _refuse_content(path: Path) -> None:
    """Raises InputError if the folder holds anything but what a process leaves that is killed before it has a plan."""
    content = sorted(entry.name for entry in path.iterdir() if not _of_a_start(entry))
    if not content:
        return
    if (path / LOCK).exists():
        os.close(_locked(path))  # in use is the better answer, if it is true
    names = ", ".join(content[:3]) + (", ..." if len(content) > 3 else "")
    fix = "choose another output_dir" + (", or `tunesmith resume` this run" if PLAN in content else "")
    raise InputError(f"the output folder is not empty: {names}", where=str(path), fix=fix)


def _of_a_start(entry: Path) -> bool:
    if entry.name == EVENTS:
        return entry.is_file() and not entry.stat().st_size
    return entry.name in (LOCK, IDENTITY, REJECTED, OWN_ROWS) or entry.name.startswith(TEMPORARY)


def _locked(path: Path) -> int:
    """The descriptor that holds the lock. The system drops it when the process ends, so a stale lock is no lock."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 20, 0).decode().strip()
        os.close(lock)
        raise InputError(f"in use by process {owner}", where=str(path), fix="wait for it, or stop it") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def require_run(path: Path) -> None:
    """Raises InputError for what is no run folder."""
    if not is_run(path):
        fix = "name a run folder; `tunesmith train` makes one"
        raise InputError(f"not a run folder: there is no {PLAN}", where=str(path), fix=fix)


def is_run(path: Path) -> bool:
    return (path / PLAN).is_file() or is_staged(path)


def plan_in(path: Path) -> Plan:
    """Raises InputError when it is missing, broken, or of another version."""
    return from_json(Plan, read_json(path / PLAN), where=str(path / PLAN))


def is_staged(path: Path) -> bool:
    return (path / STAGES).is_file()


def trained_in(path: Path) -> Path:
    """Where the weights of a run are: of several stages, in the folder of the last one."""
    if not is_staged(path):
        return path
    if not (path / RECORD).is_file():
        raise InputError("not all of its stages are finished", where=str(path), fix=f"tunesmith resume {path}")
    return max((path / OF_STAGES).iterdir(), key=lambda folder: int(folder.name.partition("-")[0]))


def whole_run(path: Path) -> Path:
    """The run that a stage is part of, or the run itself."""
    above = path.absolute().parent
    return path.parent.parent if above.name == OF_STAGES and is_staged(above.parent) else path


def read_events(path: Path) -> list[Json]:
    """The events of a run folder by step, of each kind the last attempt at that step, without those of a way that the
    run has given up; that it went back is kept. Takes no lock."""
    events = _that_count(every_event(path), read_rollbacks(path))
    last: dict[tuple[str, int], int] = {}
    for event in events:
        last[event["type"], event["step"]] = event["attempt"]
    kept = [e for e in events if last[e["type"], e["step"]] == e["attempt"] or _goes_back(e)]
    return sorted(kept, key=lambda event: event["step"])


def read_rollbacks(path: Path) -> tuple[Rollback, ...]:
    """Those of a run folder, in order. Raises InputError for a damaged file."""
    file = path / ROLLBACKS
    return from_json(tuple[Rollback, ...], read_json(file), where=str(file)) if file.exists() else ()


def _that_count(events: list[Json], rollbacks: Sequence[Rollback]) -> list[Json]:
    """The events without those of a way that was given up."""
    given_up = [(one.attempt, one.to) for one in rollbacks]
    return [
        event
        for event in events
        if _goes_back(event) or not any(event["attempt"] <= attempt and event["step"] > to for attempt, to in given_up)
    ]


def _goes_back(event: Json) -> bool:
    return event.get("level") == "rollback"


def every_event(path: Path) -> list[Json]:
    """The events of all attempts, in the order in which they were written. Raises InputError with file:line.

    What stands behind the last line break is left out: it was cut off by a kill, or is just being written.
    """
    file = path / EVENTS
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    events: list[Json] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            raise InputError("not JSON", where=f"{file}:{number}") from None
    return events


def failure_of(path: Path) -> str:
    """Why a gate ended the last attempt at this run; empty if none did."""
    last = next(reversed(every_event(path)), None)
    return last["evidence"] if last and last["type"] == "verdict" and last["kind"] == FAILED else ""


def next_run_folder(parent: Path, name: str) -> Path:
    """The first of name-1, name-2, ... that does not exist yet, or holds only the rejected rows of an attempt."""
    number = 1
    while (folder := parent / f"{name}-{number}").exists() and not _only_rejected(folder):
        number += 1
    return folder


def is_free(path: Path) -> bool:
    """Whether a run could begin there."""
    return not path.exists() or (path.is_dir() and all(_of_a_start(entry) for entry in path.iterdir()))


def _only_rejected(path: Path) -> bool:
    return path.is_dir() and [entry.name for entry in path.iterdir()] == [REJECTED]
