"""Which arms fit into the minutes: from a quick measure of this model on this machine.

    Subject -> Speed (seconds a token: read, written, trained) -> seconds of an arm -> the arms that fit

The longest measure is a few prompts read and a few tokens written. Training counts as `TRAINED`
times reading until a training has been timed. Left out: running (measured.py), which looks at the
clock again before every arm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import TIMED_REQUESTS, ArmRunner, plan_for_size
from tunesmith.core.types import require
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts, iter_answers

TIMED_PROMPTS, TIMED_TOKENS = 8, 12  # prompts and tokens of the quick measure
PASSAGE_TOKENS = 180
# times reading a token: forward, and backward for the adapter and what lies between
TRAIN_COST_FACTOR = 3.0
MIN_ITEMS, ITEM_TIME_SHARE = (
    20,
    0.03,
)  # items are as many as one plain arm asks in this share of the minutes


@dataclass(frozen=True)
class TokenTimings:
    """Seconds a token, and how many tokens there are of each kind."""

    prefill_seconds: float
    decode_seconds: float  # when many answers are written side by side
    single_decode_seconds: float
    train_seconds: float
    prompt_tokens: float  # of an item alone
    row_tokens: float  # of a training row
    answer_tokens: float  # of an answer as expected
    max_answer_tokens: int  # of an answer that does not come to its end


def measure_timings(runner: ArmRunner) -> TokenTimings:
    questions = build_prompts(runner.items, runner.inputs.renderer)
    timed_questions = questions[:TIMED_PROMPTS]
    _time_answers(runner, timed_questions[:1], 1)  # the first forward is slower than all others
    prefill_seconds = _time_answers(runner, timed_questions, 1) / sum(
        len(question.prompt_ids) for question in timed_questions
    )
    # Floors against the noise of a busy machine: a token is read before it is written, and a batch
    # saves only so much.
    single_seconds = _time_answers(
        runner, timed_questions[:1], TIMED_TOKENS
    ) - prefill_seconds * len(timed_questions[0].prompt_ids)
    single_decode_seconds = max(prefill_seconds, single_seconds / (TIMED_TOKENS - 1))
    batch_seconds = _time_answers(runner, timed_questions, TIMED_TOKENS) - prefill_seconds * sum(
        len(question.prompt_ids) for question in timed_questions
    )
    report = runner.plan.data["data"]
    return TokenTimings(
        prefill_seconds=prefill_seconds,
        decode_seconds=max(single_decode_seconds, batch_seconds / (TIMED_TOKENS - 1))
        / len(timed_questions),
        single_decode_seconds=single_decode_seconds,
        train_seconds=TRAIN_COST_FACTOR * prefill_seconds,
        prompt_tokens=statistics.fmean(len(question.prompt_ids) for question in questions),
        row_tokens=report.tokens / max(1, report.rows),
        answer_tokens=statistics.fmean(question.num_expected_tokens for question in questions),
        max_answer_tokens=runner.max_answer_tokens,
    )


def _time_answers(runner: ArmRunner, questions: Sequence[EvalPrompt], max_new_tokens: int) -> float:
    started = time.perf_counter()
    list(
        iter_answers(runner.model, questions, runner.inputs.renderer, max_new_tokens=max_new_tokens)
    )
    return time.perf_counter() - started


def estimate_seconds(runner: ArmRunner, timings: TokenTimings, arm: Arm) -> float:
    """What an arm will take: examples are read once for all items, passages for each."""
    num_items, passage_tokens = len(runner.items), arm.passages * PASSAGE_TOKENS
    shot_tokens, prompt_tokens = (
        arm.shots * (timings.row_tokens + passage_tokens),
        timings.prompt_tokens + passage_tokens,
    )
    answer_tokens = (
        timings.max_answer_tokens
        if not (arm.shots or arm.examples or arm.is_constrained)
        else 1.3 * timings.answer_tokens
    )
    batch_seconds = (
        num_items
        * (prompt_tokens * timings.prefill_seconds + answer_tokens * timings.decode_seconds)
        + shot_tokens * timings.prefill_seconds
    )
    single_seconds = min(TIMED_REQUESTS, num_items) * (
        (prompt_tokens + shot_tokens) * timings.prefill_seconds
        + answer_tokens * timings.single_decode_seconds
    )
    return (
        batch_seconds
        + single_seconds
        + count_train_tokens(runner, timings, arm) * timings.train_seconds
    )


def count_train_tokens(runner: ArmRunner, timings: TokenTimings, arm: Arm) -> float:
    if not arm.examples:
        return 0.0
    plan = plan_for_size(runner, arm.examples)
    step_rows = plan.steps * require(plan.config.batch_size)
    num_rows = min(step_rows, arm.examples * plan.config.num_train_epochs)
    return num_rows * (timings.row_tokens + arm.passages * PASSAGE_TOKENS)


def count_fitting_items(runner: ArmRunner, timings: TokenTimings, seconds: float) -> int:
    """Of the items so many that a plain arm takes its share of the time; all of them if they fit,
    never under 20."""
    item_seconds = estimate_seconds(runner, timings, Arm()) / len(runner.items)
    return min(
        len(runner.items), max(MIN_ITEMS, int(ITEM_TIME_SHARE * seconds / max(item_seconds, 1e-9)))
    )


def split_by_budget(
    arms: Sequence[Arm], seconds: float, estimate: Callable[[Arm], float]
) -> tuple[list[Arm], list[Arm]]:
    """In their order those that still fit, and those that are left out. The first always stands:
    the rest is compared with it."""
    selected: list[Arm] = []
    skipped: list[Arm] = []
    for arm in arms:
        arm_seconds = estimate(arm)
        if selected and arm_seconds > seconds:
            skipped.append(arm)
        else:
            selected.append(arm)
            seconds -= arm_seconds
    return selected, skipped
