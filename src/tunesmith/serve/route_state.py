"""What the canaries of a server have decided, in a folder that survives it.

    store = RouteStore(folder);  store.read() -> {"prod": CanaryState}
    store.write(states, events)

In: the state of each canary, and events. Out: canaries.json, replaced as a whole, and events.jsonl,
which is only appended to: who decided what, when, and from which numbers. One server uses a folder
at a time. Left out: decisions (canary.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.core.atomic import disk_errors, open_unlinked, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, parse_as, read_json_object
from tunesmith.core.types import Json
from tunesmith.serve.canary import Canary, CanaryState, Event
from tunesmith.serve.feedback import append_lines

STATE_FILE = "canaries.json"
EVENTS_FILE = "events.jsonl"
LOCK_FILE = "lock"
STATE_FORMAT = 1
SETTING = "state_dir"
BY_RULE = "rule"  # who has decided, where no person did


@dataclass(frozen=True)
class StateFile:
    """The content of canaries.json: route -> state."""

    format: int
    canaries: dict[str, CanaryState]


class RouteStore:
    """The two files of one server. Raises InputError or MachineError if the folder is in use or
    cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors(folder, key=SETTING):
            if folder.exists() and not folder.is_dir():
                raise InputError("not a folder", where=str(folder), fix=f"set another {SETTING}")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(open_unlinked(folder / LOCK_FILE, os.O_RDWR))  # raises for a link
            self._lock = FileLock(folder / LOCK_FILE, thread_local=False, fallback_to_soft=False)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                fix = f"stop it, or set another {SETTING}"
                raise InputError("another server uses this", where=str(folder), fix=fix) from None

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.release()

    def read(self) -> dict[str, CanaryState]:
        """Return the state of each route. Raises InputError for a damaged file."""
        path = self.folder / STATE_FILE
        if not path.exists():
            return {}
        content = parse_as(StateFile, read_json_object(path), where=str(path))
        if content.format != STATE_FORMAT:
            message = (
                f"format {content.format} is not supported; this version reads format "
                f"{STATE_FORMAT}"
            )
            raise InputError(message, where=str(path), fix="remove it: canaries start again")
        return content.canaries

    def write(self, states: Mapping[str, Json], events: Sequence[Json]) -> None:
        """Append events, then replace the state. Raises MachineError if the disk refuses."""
        if events:
            lines = b"".join(map(dump_json, events))
            append_lines({self.folder / EVENTS_FILE: lines}, key=SETTING)
        content = {"format": STATE_FORMAT, "canaries": states}
        write_file(self.folder / STATE_FILE, dump_json(content, indent=1))


def describe_canary(canary: Canary) -> Json:
    """Return a canary as the admin API shows it and as events hold it."""
    state = canary.state
    harms: dict[str, Json] = {}
    for harm in canary.list_harms():
        tallies = harm.tallies
        harms[harm.check] = {
            "canary": [tallies.canary.total, tallies.canary.count],  # bad, all
            "stable": [tallies.stable.total, tallies.stable.count],
            "pairs": [tallies.pairs.total, tallies.pairs.count],
            "harm": None if harm.low is None else [harm.low, harm.high],
            "margin": harm.margin,
        }
    return {
        "model": state.canary,
        "stable": state.stable,
        "status": state.status,
        "share": canary.share,
        "step": state.step,
        "steps": list(canary.settings.steps),
        "answers": state.num_answers,
        "at_least": canary.settings.at_least,
        "checks": harms,
        "reason": state.reason,
    }


def make_event(route: str, event: Event, canary: Canary, by: str) -> Json:
    """Return an audit line."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"time": now, "route": route, "event": event, "by": by, **describe_canary(canary)}
