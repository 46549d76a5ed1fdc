"""The run folder: the only thing that a run leaves behind, and the interface that every other program reads.

    with RunFolder.create(path) as folder:          refuses a folder that is in use or not empty
        folder.write_json("plan.json", plan)
        folder.append_event(step)                   a line of events.jsonl
        with folder.checkpoint(step, facts={...}) as target: ...   checkpoints/step-N

One process at a time may write; the lock dies with its process. Events are only ever appended. A run that was killed
goes on with `RunFolder.open`, under the next attempt number; readers take the last attempt of a step. Reading events
needs no lock. What the files mean is the business of whoever writes them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any, Self

from tunesmith.atomic import damage, disk_errors, new_folder, remove_folder, remove_leftovers, write_file
from tunesmith.errors import InputError, MachineError
from tunesmith.jsonfile import json_bytes, to_json
from tunesmith.types import Done, Event, Json, Sample, Saved, Score, StepResult, Verdict

LOCK, EVENTS, CHECKPOINTS, PLAN = ".lock", "events.jsonl", "checkpoints", "plan.json"

EVENT_TYPES: dict[type[Any], str] = {
    StepResult: "step",
    Score: "score",
    Sample: "sample",
    Verdict: "verdict",
    Saved: "saved",
    Done: "done",
}


class RunFolder:
    """An open, locked run folder. `attempt` counts the processes that worked on it, from 1."""

    def __init__(self, path: Path, lock: int, attempt: int) -> None:
        self.path, self.attempt, self._lock = path, attempt, lock
        with disk_errors(path / EVENTS):
            self._events = os.open(path / EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._events).st_size
            if size and os.pread(self._events, 1, size - 1) != b"\n":  # a torn line: let the next event start its own
                os.write(self._events, b"\n")

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new run. Raises InputError if the folder is in use or holds anything, MachineError if it cannot be made."""
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise InputError("the output folder is a file", where=str(path), fix="choose another output_dir")
            path.mkdir(parents=True, exist_ok=True)
            _refuse_content(path)
            lock = _locked(path)
        try:
            _refuse_content(path)  # another process may have come and gone between the two lines above
        except InputError:
            os.close(lock)
            raise
        return cls(path, lock, attempt=1)

    @classmethod
    def open(cls, path: Path) -> Self:
        """An earlier run, to go on with. Raises InputError if it is none or in use."""
        if not (path / PLAN).is_file():
            raise InputError(f"not a run folder: there is no {PLAN}", where=str(path))
        with disk_errors(path):
            lock = _locked(path)
            remove_leftovers(path)
            remove_leftovers(path / CHECKPOINTS)
        return cls(path, lock, attempt=1 + max((event["attempt"] for event in read_events(path)), default=0))

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

    def append_event(self, event: Event) -> None:
        """Appends at once; all but steps are forced to the disk, since they are few and answer for what they name."""
        kind = EVENT_TYPES[type(event)]
        head = {"type": kind, "time": round(time.time(), 3), "attempt": self.attempt}
        line = json_bytes({**head, **to_json(event, kind)})
        with disk_errors(self.path / EVENTS, len(line)):
            if os.write(self._events, line) < len(line):
                raise OSError(ENOSPC, "no room")
            if not isinstance(event, StepResult):
                os.fsync(self._events)

    def events(self) -> list[Json]:
        return read_events(self.path)

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def checkpoint(self, step: int, *, facts: Json, needed_bytes: int = 0, keep_last: int = 2) -> Generator[Path]:
        """Fill the yielded folder: it becomes checkpoints/step-N, whole or not at all.

        `facts` go into its manifest (recipe hash, data fingerprint, versions). Older ones beyond `keep_last` are
        removed once this one is verified.
        """
        target = self.path / CHECKPOINTS / f"step-{step}"
        with new_folder(target, facts={"step": step, **facts}, needed_bytes=needed_bytes) as temporary:
            yield temporary
        if problem := damage(target):
            raise MachineError(f"was written and reads back differently: {problem}", where=str(target))
        self._purge(step, keep_last)

    def checkpoints(self) -> Iterator[tuple[Path, str]]:
        """Newest first, each with what is wrong with it, empty if nothing is. Lazy, since it reads every byte."""
        for _, path in self._by_step():
            yield path, damage(path)

    def latest_checkpoint(self) -> Path | None:
        """The newest one that can be trusted."""
        return next((path for path, problem in self.checkpoints() if not problem), None)

    def _by_step(self) -> list[tuple[int, Path]]:
        named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in (self.path / CHECKPOINTS).glob("step-*")]
        return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)

    def _purge(self, step: int, keep_last: int) -> None:
        kept = 0
        for number, path in self._by_step():
            if kept >= keep_last and number < step:
                with disk_errors(path):
                    remove_folder(path)
            elif not damage(path, hashes=False):
                kept += 1


def _refuse_content(path: Path) -> None:
    content = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if not content:
        return
    if (path / LOCK).exists():
        os.close(_locked(path))  # in use is the better answer, if it is true
    names = ", ".join(content[:3]) + (", ..." if len(content) > 3 else "")
    fix = "choose another output_dir" + (", or `tunesmith resume` this run" if PLAN in content else "")
    raise InputError(f"the output folder is not empty: {names}", where=str(path), fix=fix)


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


def read_events(path: Path) -> list[Json]:
    """The events of a run folder by step, of each kind the last attempt at that step. Takes no lock.

    A line that was cut off (by a kill, or because it is being written) is left out where an attempt ends; elsewhere
    it is an InputError with file:line.
    """
    file = path / EVENTS
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    events: list[Json] = []
    torn = 0
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            torn = number
            continue
        if torn and event["attempt"] == (events[-1]["attempt"] if events else 1):
            raise InputError("not JSON", where=f"{file}:{torn}")
        torn = 0
        events.append(event)
    last: dict[tuple[str, int], int] = {}
    for event in events:
        last[event["type"], event["step"]] = event["attempt"]
    kept = [event for event in events if last[event["type"], event["step"]] == event["attempt"]]
    return sorted(kept, key=lambda event: event["step"])


def next_run_folder(parent: Path, name: str) -> Path:
    """The first of name-1, name-2, ... that does not exist yet."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
