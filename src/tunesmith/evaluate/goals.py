"""What the verdict on a run looks at, by the kind of the run.

A pretraining run is judged by bits per byte of its test texts next to what general text lost; pairs
by which answer is likelier, with longer and shorter answers weighing alike too; KTO by its margin;
a mixture by the tasks that it trains. Left out: the other rules of the verdict (run_verdict.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.evidence import ErrorAnalysis
from tunesmith.core.types import Comparison, Plan
from tunesmith.data.answer_values import LOPSIDED_SHARE
from tunesmith.evaluate.metrics import BITS_PER_BYTE, MULTIPLE_CHOICE

JudgedComparison = tuple[Comparison, str]  # with its verdict, after Holm correction

ACCURACY = "preference_accuracy"
MOST_FREQUENT = "most frequent answer"  # a floor
# the first that was measured decides
STAGE_METRICS = {"cpt": (BITS_PER_BYTE,), "preference": (ACCURACY, "margin")}
LENGTH_CONTROLLED = "length_controlled_accuracy"
MEAN_OF_TASKS = re.compile(r"test: mean of (held-out )?tasks$")
HELD_OUT_TASK = re.compile(r"test: (mean of held-out tasks|.* \(held out\))$")


def drop_held_out(tests: Sequence[JudgedComparison]) -> list[JudgedComparison]:
    """Return the tests of trained tasks; all if none is: what transfers is no part of the score."""
    trained = [pair for pair in tests if not HELD_OUT_TASK.search(pair[0].task)]
    return trained or list(tests)


def select_deciding(
    tests: Sequence[JudgedComparison], errors: ErrorAnalysis | None, plan: Plan
) -> list[JudgedComparison]:
    """Return the comparisons of the metric that decides: of several tasks, their mean."""
    measured = {comparison.metric for comparison, _ in tests}
    of_stage = [name for name in STAGE_METRICS.get(plan.config.stage, ()) if name in measured]
    of_answers = [errors.metric] if errors else [comparison.metric for comparison, _ in tests]
    metrics = of_stage or of_answers
    selected = [pair for pair in tests if pair[0].metric == metrics[0]]
    means = [pair for pair in selected if MEAN_OF_TASKS.search(pair[0].task)]
    return means or selected


def is_decided_by_likelihood(deciding: Sequence[JudgedComparison], plan: Plan) -> bool:
    metrics = STAGE_METRICS.get(plan.config.stage, ())
    return any(comparison.metric in metrics for comparison, _ in deciding)


def describe_likelihood(comparison: Comparison) -> str:
    before = comparison.before.value
    after = comparison.after.value
    n = comparison.after.n
    if comparison.metric == ACCURACY:
        return f"The chosen answer is likelier in {after:.0%} of {n} pairs, {before:.0%} before"
    if comparison.metric == BITS_PER_BYTE:
        return f"{n} test texts take {after:.3f} bits per byte, {before:.3f} before"
    return f"{comparison.metric} on {n} test rows: {before:.3f} -> {after:.3f}"


def describe_choices(tests: Sequence[JudgedComparison]) -> str:
    """Return how many labels are the likeliest, whatever the form of the answers."""
    scores = [(c.before.value, c.after) for c, _ in tests if c.metric == MULTIPLE_CHOICE]
    texts = [f"; by likelihood {now.value:.0%} of {now.n}, {was:.0%} before" for was, now in scores]
    return texts[0] if len(texts) == 1 else ""  # the tasks of a mixture are in the table


def find_form_alone(errors: ErrorAnalysis | None, tests: Sequence[JudgedComparison]) -> str:
    """Return that neither answers nor likelihoods are shown to beat the most frequent label; "" if
    nearly all rows have that one, which tells nothing of the others."""
    floors = errors.floors if errors is not None and errors.metric == "accuracy" else ()
    majority = next((floor for floor in floors if floor.name == MOST_FREQUENT), None)
    choices = [c.after.low for c, _ in tests if c.metric == MULTIPLE_CHOICE]
    if majority is None or majority.is_beaten or majority.value > LOPSIDED_SHARE:
        return ""
    if not choices or max(choices) > majority.value:
        return ""
    return (
        "more than the form is not shown to be learned: neither answers nor likelihoods beat the "
        f"most frequent label, {majority.value:.0%}"
    )


def list_likelihood_problems(
    judged: Iterable[JudgedComparison], deciding: Sequence[JudgedComparison]
) -> list[str]:
    """Return why a model that is judged by likelihood is not ready although it got better."""
    comparison, _ = deciding[0]
    if comparison.metric == BITS_PER_BYTE:
        return [
            f"general text lost {general.difference:.3f} bits per byte, more than the test texts "
            f"gained ({-comparison.difference:.3f})"
            for general, _ in judged
            if (general.task, general.metric) == (GENERAL_TASK, BITS_PER_BYTE)
            and general.difference > max(0.0, -comparison.difference)
        ]
    if comparison.metric != ACCURACY:
        return []
    problems: list[str] = []
    after = comparison.after
    if after.low <= 0.5:  # as a coin orders them
        interval = f"{after.value:.0%} of the pairs [{after.low:.0%}, {after.high:.0%}]"
        problems.append(f"{interval} are ordered as in the rows; ready needs over half")
    maybe = "the gain may be of length alone"
    for c, verdict in judged:
        if c.metric == LENGTH_CONTROLLED:
            change = f"{c.before.value:.2f} -> {c.after.value:.2f} ({verdict})"
            gain = f"{maybe}: with longer and shorter answers weighing alike, {change}"
            return problems if verdict == "better" else [*problems, gain]
    return [*problems, f"{maybe}: nearly all chosen answers are longer, or shorter"]
