"""What happens in a run, as it happens; a line of events.jsonl each. Other files name them by
types.py.

All are frozen and hold plain values. A rollback is no event: it changes the steps that follow,
and is told as a Verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

GENERAL_TASK = "general text"  # the task of what retention_data measures
PROBE_TASK, EXPECTED_TASK = (
    "probes",
    "expected answers",
)  # tasks of what the model says while it trains, and of what it should


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
