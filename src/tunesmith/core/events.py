"""The events of a run: one line of events.jsonl each.

In: what the training loop, the guard and the evaluation yield. Out: frozen dataclasses of plain
values, and their JSON lines back as such (`parse_event`). A rollback is not an event: it changes
the steps that follow, and appears as a CheckResult. Left out: files (`core/run_dir.py`).
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.json_io import load_finite_json

CHECKSUM_KEY = "crc32"  # of a line of events.jsonl: that of its other fields
GENERAL_TASK = "general text"  # the task of scores on retention_data
DATA_CHECK = "data check"  # the kind of results that are about rows, not about steps
PROBE_TASK = "probes"  # of the answers generated during training
EXPECTED_TASK = "expected answers"  # of the expected answers to the same prompts
EVAL_TASK = "eval"  # of answers to rows of eval_data


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step."""

    step: int  # from 1
    loss: float  # mean over the target weights, nats
    tokens: int  # of the documents; a shared prefix counts once per document
    supervised_tokens: int
    seconds: float
    learning_rate: float
    grad_norm: float  # before clipping
    peak_bytes: int  # of this process so far
    # task -> tokens, part of `tokens`
    task_tokens: dict[str, int] = field(default_factory=dict[str, int])
    shared_tokens: int = 0  # part of `tokens`, computed once in another document


@dataclass(frozen=True)
class Score:
    """A metric with its 95% confidence interval."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int  # items
    step: int  # optimizer steps before it
    truncated: int = 0  # answers that reached the limit of new tokens
    groups: int = 0  # of items that are not independent; 0 if all items are

    @property
    def size(self) -> str:
        """The number of items, and of their groups: `80`, or `80 in 20 groups`."""
        return f"{self.n} in {self.groups} groups" if self.groups else f"{self.n}"

    @property
    def independent(self) -> int:
        """The number of items, or groups of items, that are independent of each other."""
        return self.groups or self.n


@dataclass(frozen=True)
class GenerationSample:
    """An answer of the model to a prompt of the data."""

    step: int
    id: str  # of the row
    prompt: str
    answer: str
    expected: str = ""
    task: str = ""  # "eval" for complete answers to rows of eval_data during training
    context: str = ""  # messages before the prompt, such as the system message


@dataclass(frozen=True)
class CheckResult:
    """The verdict of a preflight check or a guard detector, with its evidence.

    A check of nothing is no "ok": it raises ValueError."""

    kind: str
    level: Literal["ok", "warn", "rollback", "stop"]
    evidence: str
    step: int = 0
    num_checked: int | None = None  # items that the check compared; None for other verdicts

    def __post_init__(self) -> None:
        if self.level == "ok" and self.num_checked == 0:
            raise ValueError(f"{self.kind}: nothing was checked, so it is not ok")

    @classmethod
    def from_items(cls, kind: str, num_checked: int, evidence: str, *, if_none: str) -> CheckResult:
        """Return the result of a check that passed: a warning if there was no item to check.

        `if_none` says why there may be none."""
        if num_checked:
            return cls(kind, "ok", evidence, num_checked=num_checked)
        return cls(kind, "warn", f"not checked: {if_none}", num_checked=0)


@dataclass(frozen=True)
class Rollback:
    """A return from `step` to the checkpoint of step `to`, and what changes from there on."""

    step: int
    to: int
    kind: str  # of the detector
    evidence: str
    change: str  # in words
    lr_factor: float = 1.0  # of the learning rate
    rows: tuple[str, ...] = ()  # that are skipped
    rehearsal_ratio: float | None = None
    attempt: int = 1  # that ended here; its events after `to` do not count
    is_end: bool = False  # of the training, with the weights of step `to`

    @property
    def check_result(self) -> CheckResult:
        return CheckResult(
            self.kind,
            "rollback",
            f"{self.evidence}; back to step {self.to}, {self.change}",
            self.step,
        )


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written."""

    step: int
    path: str  # relative to the run folder


@dataclass(frozen=True)
class TrainingEnd:
    """Training has ended; evaluation follows."""

    step: int
    reason: Literal["finished", "max_steps", "stopped"]
    seconds: float


@dataclass(frozen=True)
class StageStart:
    """A stage of several starts or resumes."""

    step: int  # number of the stage, from 1
    num_stages: int
    name: str
    steps: int  # optimizer steps
    path: str  # relative to the run folder


Event = (
    TrainStep | Score | GenerationSample | CheckResult | CheckpointSaved | TrainingEnd | StageStart
)

# the `type` of a line of events.jsonl
EVENT_TYPES: dict[str, type[Event]] = {
    "step": TrainStep,
    "score": Score,
    "sample": GenerationSample,
    "verdict": CheckResult,
    "saved": CheckpointSaved,
    "done": TrainingEnd,
    "stage": StageStart,
}


@dataclass(frozen=True)
class LoggedEvent:
    """An event as a line of events.jsonl has it."""

    event: Event
    attempt: int  # counts processes that worked on the run, and rollbacks, from 1
    time: float  # seconds since the epoch


def get_event_type(event: Event) -> str:
    for name, event_class in EVENT_TYPES.items():
        if type(event) is event_class:
            return name
    raise TypeError(f"{type(event).__name__} is not an event")


def compute_checksum(fields: dict[str, Any]) -> str:
    """Return the checksum of the fields of a line, which shows that no number in it was changed."""
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"


def parse_event(line: bytes) -> LoggedEvent:
    """Return the event of a line of events.jsonl. Raises ValueError for any other text."""
    try:
        content = load_finite_json(line)
    except RecursionError:
        raise ValueError("not an event: nested too deeply") from None
    fields = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if CHECKSUM_KEY in fields and fields.pop(CHECKSUM_KEY) != compute_checksum(fields):
        raise ValueError("changed since it was written: its checksum does not match")
    if str(fields.get("type")) not in EVENT_TYPES:
        raise ValueError("not an event: it has no known type")
    try:
        event = _make_adapter(fields["type"]).validate_python(fields)
        return LoggedEvent(event, int(fields["attempt"]), float(fields["time"]))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"not an event of type {fields['type']}: {name}: {first['msg']}") from None
    except (KeyError, TypeError):
        raise ValueError("not an event: it has no attempt or time") from None


@cache
def _make_adapter(event_type: str) -> TypeAdapter[Event]:
    return TypeAdapter(EVENT_TYPES[event_type])
