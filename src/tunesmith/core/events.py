"""The events of a run: one line of events.jsonl each.

In: what the training loop, the guard and the evaluation yield. Out: frozen dataclasses of plain
values, and their JSON lines back as such (`parse_event`). A rollback is not an event: it changes
the steps that follow, and appears as a CheckResult. Left out: files (`core/run_dir.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

GENERAL_TASK = "general text"  # the task of scores on retention_data
PROBE_TASK = "probes"  # of the answers generated during training
EXPECTED_TASK = "expected answers"  # of the expected answers to the same prompts


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step. `loss` is the mean over the step's target weights; bytes are the peak so
    far."""

    step: int
    loss: float
    tokens: int
    supervised_tokens: int
    seconds: float
    learning_rate: float
    grad_norm: float
    peak_bytes: int
    task_tokens: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # of `tokens`, those of a named task
    # of `tokens`, those that another document begins with too: computed once, there
    shared_tokens: int = 0


@dataclass(frozen=True)
class Score:
    """A measured value with its 95% interval; `n` items, `step` optimizer steps after the start."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    step: int


@dataclass(frozen=True)
class GenerationSample:
    step: int
    id: str
    prompt: str
    answer: str
    expected: str = ""


@dataclass(frozen=True)
class CheckResult:
    """What a guard or a proof has to say, with its evidence."""

    kind: str
    level: Literal["ok", "warn", "rollback", "stop"]
    evidence: str
    step: int = 0


@dataclass(frozen=True)
class Rollback:
    """A run went from `step` back to its checkpoint of step `to`. The steps after that are taken
    with `factor` times the learning rate, without `rows`, with the share `ratio` of rehearsal.
    `attempt`: the one that ended so; what it did after `to` does not count."""

    step: int
    to: int
    kind: str  # the detector that said so
    evidence: str
    change: str  # what is done differently, for people
    lr_factor: float = 1.0
    rows: tuple[str, ...] = ()
    rehearsal_ratio: float | None = None
    attempt: int = 1

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
    step: int
    path: str


@dataclass(frozen=True)
class TrainingEnd:
    step: int
    reason: Literal["finished", "max_steps", "stopped"]
    seconds: float


@dataclass(frozen=True)
class StageStart:
    """One of several stages begins or goes on. `step` is its number, `steps` are its optimizer
    steps."""

    step: int
    num_stages: int
    name: str
    steps: int
    path: str


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


def parse_event(line: bytes) -> LoggedEvent:
    """Return the event of a line of events.jsonl. Raises ValueError for any other text."""
    content = json.loads(line)
    fields = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if fields.get("type") not in EVENT_TYPES:
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
