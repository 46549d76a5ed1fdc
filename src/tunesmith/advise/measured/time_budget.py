"""Choose the arms that fit in the minutes, from a quick benchmark of this model on this machine.

    ArmRunner -> TokenTimings (seconds per token) -> seconds of an arm -> the arms that fit

The benchmark reads a few prompts and generates a few tokens. Training counts as TRAIN_COST_FACTOR
times prefill until a training has been timed. Left out: running (experiment.py), which checks the
clock again before every arm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import TIMED_REQUESTS, ArmRunner, plan_for_size
from tunesmith.core.types import require
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts, iter_answers

TIMED_PROMPTS = 8
TIMED_TOKENS = 12
PASSAGE_TOKENS = 180
# training per prefill token: a forward pass, and a backward pass through adapter and base
TRAIN_COST_FACTOR = 3.0
ANSWER_MARGIN = 1.3  # generated per expected answer tokens, of a model that stops
MIN_ITEMS = 20
ITEM_TIME_SHARE = 0.03  # of the minutes, for one zero-shot arm


@dataclass(frozen=True)
class TokenTimings:
    """Seconds per token, and mean numbers of tokens."""

    prefill_seconds: float
    decode_seconds: float  # in a batch
    single_decode_seconds: float
    train_seconds: float
    prompt_tokens: float  # of an item, zero-shot
    row_tokens: float  # of a training row
    answer_tokens: float  # of an expected answer
    max_answer_tokens: int  # of an answer that does not stop


def measure_timings(runner: ArmRunner) -> TokenTimings:
    questions = build_prompts(runner.items, runner.inputs.renderer)
    timed = questions[:TIMED_PROMPTS]
    timed_tokens = sum(len(question.prompt_ids) for question in timed)
    # warm up: the first forward pass is slower
    _time_answers(runner, timed[:1], 1)
    prefill_seconds = _time_answers(runner, timed, 1) / timed_tokens
    # floors against the noise of a busy machine: decoding a token costs at least its prefill, and a
    # batch at least a single answer
    single_prefill = prefill_seconds * len(timed[0].prompt_ids)
    single_seconds = _time_answers(runner, timed[:1], TIMED_TOKENS) - single_prefill
    single_decode_seconds = max(prefill_seconds, single_seconds / (TIMED_TOKENS - 1))
    batch_prefill = prefill_seconds * timed_tokens
    batch_seconds = _time_answers(runner, timed, TIMED_TOKENS) - batch_prefill
    batch_step_seconds = max(single_decode_seconds, batch_seconds / (TIMED_TOKENS - 1))
    report = runner.plan.data["data"]
    return TokenTimings(
        prefill_seconds=prefill_seconds,
        decode_seconds=batch_step_seconds / len(timed),
        single_decode_seconds=single_decode_seconds,
        train_seconds=TRAIN_COST_FACTOR * prefill_seconds,
        prompt_tokens=statistics.fmean(len(question.prompt_ids) for question in questions),
        row_tokens=report.tokens / max(1, report.rows),
        answer_tokens=statistics.fmean(question.num_expected_tokens for question in questions),
        max_answer_tokens=runner.max_answer_tokens,
    )


def _time_answers(runner: ArmRunner, questions: Sequence[EvalPrompt], max_new_tokens: int) -> float:
    start = time.perf_counter()
    renderer = runner.inputs.renderer
    list(iter_answers(runner.model, questions, renderer, max_new_tokens=max_new_tokens))
    return time.perf_counter() - start


def estimate_seconds(runner: ArmRunner, timings: TokenTimings, arm: Arm) -> float:
    """Estimate an arm: shots are read once for all items, passages for each item."""
    num_items = len(runner.items)
    passage_tokens = arm.passages * PASSAGE_TOKENS
    shot_tokens = arm.shots * (timings.row_tokens + passage_tokens)
    prompt_tokens = timings.prompt_tokens + passage_tokens
    answer_tokens = ANSWER_MARGIN * timings.answer_tokens
    if not (arm.shots or arm.examples or arm.is_constrained):
        answer_tokens = timings.max_answer_tokens
    item_prefill = prompt_tokens * timings.prefill_seconds
    shots_prefill = shot_tokens * timings.prefill_seconds
    item_seconds = item_prefill + answer_tokens * timings.decode_seconds
    single_decode = answer_tokens * timings.single_decode_seconds
    single_seconds = item_prefill + shots_prefill + single_decode
    train_seconds = count_train_tokens(runner, timings, arm) * timings.train_seconds
    batch_seconds = num_items * item_seconds + shots_prefill
    return batch_seconds + min(TIMED_REQUESTS, num_items) * single_seconds + train_seconds


def count_train_tokens(runner: ArmRunner, timings: TokenTimings, arm: Arm) -> float:
    if not arm.examples:
        return 0.0
    plan = plan_for_size(runner, arm.examples)
    step_rows = plan.steps * require(plan.config.batch_size)
    num_rows = min(step_rows, arm.examples * plan.config.num_train_epochs)
    return num_rows * (timings.row_tokens + arm.passages * PASSAGE_TOKENS)


def count_fitting_items(runner: ArmRunner, timings: TokenTimings, seconds: float) -> int:
    """Return how many items zero-shot answers in its share of the time, at least MIN_ITEMS."""
    item_seconds = estimate_seconds(runner, timings, Arm()) / len(runner.items)
    num_fitting = int(ITEM_TIME_SHARE * seconds / max(item_seconds, 1e-9))
    return min(len(runner.items), max(MIN_ITEMS, num_fitting))


def split_by_budget(
    arms: Sequence[Arm], seconds: float, estimate: Callable[[Arm], float]
) -> tuple[list[Arm], list[Arm]]:
    """Return the arms that fit, and the others; the first arm, the baseline, always fits."""
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
