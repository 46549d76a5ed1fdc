"""Which arms fit into the minutes: from a quick measure of this model on this machine.

    Subject -> Speed (seconds a token: read, written, trained) -> seconds of an arm -> the arms that fit

The longest measure is a few prompts read and a few tokens written. Training counts as `TRAINED` times reading until a
training has been timed. Left out: running (measured.py), which looks at the clock again before every arm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import TIMED, Subject, small_plan
from tunesmith.evaluate.generate_until import Question, ask, questions_of

ASKED, WRITTEN = 8, 12  # prompts and tokens of the quick measure
PASSAGE_TOKENS = 180
TRAINED = 3.0  # times reading a token: forward, and backward for the adapter and what lies between
LEAST_ITEMS, ITEM_SHARE = 20, 0.03  # items are as many as one plain arm asks in this share of the minutes


@dataclass(frozen=True)
class Speed:
    """Seconds a token, and how many tokens there are of each kind."""

    read: float
    written: float  # when many answers are written side by side
    written_alone: float
    trained: float
    prompt_tokens: float  # of an item alone
    row_tokens: float  # of a training row
    answer_tokens: float  # of an answer as expected
    room: int  # of an answer that does not come to its end


def measure_speed(subject: Subject) -> Speed:
    questions = questions_of(subject.items, subject.facts.renderer)
    few = questions[:ASKED]
    _seconds(subject, few[:1], 1)  # the first forward is slower than all others
    read = _seconds(subject, few, 1) / sum(len(question.prompt) for question in few)
    # Floors against the noise of a busy machine: a token is read before it is written, and a batch saves only so much.
    alone = _seconds(subject, few[:1], WRITTEN) - read * len(few[0].prompt)
    written_alone = max(read, alone / (WRITTEN - 1))
    both = _seconds(subject, few, WRITTEN) - read * sum(len(question.prompt) for question in few)
    report = subject.plan.data["data"]
    return Speed(
        read=read,
        written=max(written_alone, both / (WRITTEN - 1)) / len(few),
        written_alone=written_alone,
        trained=TRAINED * read,
        prompt_tokens=statistics.fmean(len(question.prompt) for question in questions),
        row_tokens=report.tokens / max(1, report.rows),
        answer_tokens=statistics.fmean(question.expected_tokens for question in questions),
        room=subject.room,
    )


def _seconds(subject: Subject, questions: Sequence[Question], tokens: int) -> float:
    started = time.perf_counter()
    list(ask(subject.model, questions, subject.facts.renderer, max_new_tokens=tokens))
    return time.perf_counter() - started


def seconds_of(subject: Subject, speed: Speed, arm: Arm) -> float:
    """What an arm will take: examples are read once for all items, passages for each."""
    items, passages = len(subject.items), arm.passages * PASSAGE_TOKENS
    shots, prompt = arm.shots * (speed.row_tokens + passages), speed.prompt_tokens + passages
    answer = speed.room if not (arm.shots or arm.examples or arm.constrained) else 1.3 * speed.answer_tokens
    asked = items * (prompt * speed.read + answer * speed.written) + shots * speed.read
    alone = min(TIMED, items) * ((prompt + shots) * speed.read + answer * speed.written_alone)
    return asked + alone + tokens_trained(subject, speed, arm) * speed.trained


def tokens_trained(subject: Subject, speed: Speed, arm: Arm) -> float:
    if not arm.examples:
        return 0.0
    plan = small_plan(subject, arm.examples)
    rows = min(plan.steps * plan["batch_size"], arm.examples * plan["num_train_epochs"])
    return rows * (speed.row_tokens + arm.passages * PASSAGE_TOKENS)


def items_that_fit(subject: Subject, speed: Speed, seconds: float) -> int:
    """Of the items so many that a plain arm takes its share of the time; all of them if they fit, never under 20."""
    one = seconds_of(subject, speed, Arm()) / len(subject.items)
    return min(len(subject.items), max(LEAST_ITEMS, int(ITEM_SHARE * seconds / max(one, 1e-9))))


def fitting(arms: Sequence[Arm], seconds: float, cost: Callable[[Arm], float]) -> tuple[list[Arm], list[Arm]]:
    """In their order those that still fit, and those that are left out. The first always stands: the rest is compared
    with it."""
    kept: list[Arm] = []
    left: list[Arm] = []
    for arm in arms:
        needed = cost(arm)
        if kept and needed > seconds:
            left.append(arm)
        else:
            kept.append(arm)
            seconds -= needed
    return kept, left
