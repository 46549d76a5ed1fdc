"""What a run's answers show: where they are wrong, constants, floors, and the verdict.

Plain values that evaluate/ computes and that record.json, the terminal, the model card and the page
read. All are bounded, and names and values of strangers shortened. Left out: computing them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import model_validator

MAX_GROUPS = 30  # of a table other than that of labels; the worst ones
MAX_GROUP_ROWS = 20  # row ids of a group or a shortcut

Rate = tuple[float, float, float]  # value, 95% CI
VerdictName = Literal["ready", "useful, not ready", "no effect", "harmful", "not measured"]


@dataclass(frozen=True)
class ErrorGroup:
    """Answers that have something in common, such as the expected value of a field.

    `error` is the share of wrong answers; for a metric between 0 and 1, 1 minus its mean."""

    name: str
    n: int
    wrong: int  # answers below 1
    error: float
    low: float  # of the 95% CI of `error`
    high: float
    wrong_before: int | None = None  # of the same answers before training
    only_here: int = 0  # wrong answers that are right in every other field
    training_rows: int | None = None  # training rows with this value
    rows: tuple[str, ...] = ()  # ids of the first wrong answers
    answered: int = 0  # of a label: rows that are answered with it
    no_label: int = 0  # rows that expect it and are answered with no label
    precision: Rate | None = None  # this and the next: None where too few rows tell
    recall: Rate | None = None
    f1: Rate | None = None


@dataclass(frozen=True)
class ErrorTable:
    """Errors by label, field, value, task or another property of the items."""

    by: str
    groups: tuple[ErrorGroup, ...]
    omitted: int = 0  # groups that are not shown


@dataclass(frozen=True)
class Confusion:
    """How often each wrong value was answered; `field` is empty for the answer itself."""

    field: str
    expected: str
    answered: str | None  # None: no label
    n: int


@dataclass(frozen=True)
class TrainingValues:
    """How often each value occurs in training rows, for fields with few values."""

    rows: int  # that were read
    total_rows: int
    # field ("" for the answer itself) -> value -> rows
    counts: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])


@dataclass(frozen=True)
class Shortcut:
    """A field or answer that is nearly always the same, although others are expected:
    `count` of `n` answers are, `expected` should be. `field` is empty for the answer."""

    field: str
    value: str
    n: int
    count: int
    expected: int
    p_value: float  # after Holm correction over the fields
    training_rows: int | None = None  # training rows with another value
    total_rows: int | None = None  # training rows that were read
    rows: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        subject = f"{self.field} is" if self.field else "the answer is"
        value = self.value or "empty"
        text = f"{subject} {value} in {self.count} of {self.n} answers, expected in {self.expected}"
        if self.training_rows is None or self.total_rows is None:
            return text
        have = "has" if self.training_rows == 1 else "have"
        rows = f"{self.training_rows:,} of {self.total_rows:,} training rows"
        return f"{text}; {rows} {have} another value"


@dataclass(frozen=True)
class Floor:
    """Hold what a rule without a model reaches on the same items, and the model's lead."""

    name: str
    value: float
    n: int
    lead: float
    low: float
    high: float
    is_beaten: bool

    @property
    def description(self) -> str:
        model_value = self.value + self.lead
        interval = f"[{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.name}, {model_value:.3f} against {self.value:.3f} {interval}"


@dataclass(frozen=True)
class ErrorAnalysis:
    """The errors that are left in the answers to the test rows, by one metric."""

    metric: str  # that decides what is wrong
    is_binary: bool  # its values are 0 or 1
    n: int
    right: int  # answers of value 1
    right_before: int | None  # on the same items
    fixed: int | None  # wrong before, right now
    broken: int | None
    mean: float  # of the metric
    low: float
    high: float
    mean_before: float | None
    tables: tuple[ErrorTable, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    other_answers: dict[str, int] = field(default_factory=dict[str, int])  # that are no label
    shortcuts: tuple[Shortcut, ...] = ()
    floors: tuple[Floor, ...] = ()
    floors_note: str = ""  # why some are missing
    training: TrainingValues | None = None

    @model_validator(mode="after")
    def _check_changes(self) -> ErrorAnalysis:
        """Refuse a stored analysis that tells a part of the changes only."""
        changes = (self.right_before, self.fixed, self.broken)
        if any(change is None for change in changes) and changes != (None, None, None):
            raise ValueError("right_before, fixed and broken must be set together")
        return self

    def get_table(self, by: str) -> ErrorTable | None:
        return next((table for table in self.tables if table.by == by), None)


@dataclass(frozen=True)
class NextStep:
    """A command to run next, and why; if it trains, what that takes and what it should bring.

    low, high: of `metric` after the step minus its value now, on the same test rows."""

    reason: str
    command: str
    metric: str = ""  # task and metric
    low: float | None = None
    high: float | None = None
    steps: int | None = None  # of the optimizer
    seconds: float | None = None  # of the whole command
    forecast: str = ""  # all of these in words, with the reason of the interval


@dataclass(frozen=True)
class RunVerdict:
    """Whether a run's model may be used, by the rules of evaluate/run_verdict.py."""

    name: VerdictName
    level: str  # how many answers are right
    change: str = ""
    cost: str = ""
    reasons: tuple[str, ...] = ()  # why it is not better
    next_steps: tuple[NextStep, ...] = ()
