"""Turn the answers of the arms into a table and a decision.

    ArmResults -> an ArmRow per kind, an Option per approach -> Decision

The items are split: one part chooses the arm of each approach (wording, number of shots, size of a
training), the other judges it, so the best of many is not judged by its luck. The decision is by
non-inferiority: the cheapest approach that reaches the target, or without one is at most `margin`
worse than each costlier one, with its whole interval. A costlier one replaces it if it is better by
more than `margin`. Anything else is undecided. Where more items follow until it is decided, all
intervals are wide enough to hold at every look. Left out: the words of the report
(cli/views/measured_advice.py).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.special import stdtrit

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import ArmResult
from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, Json
from tunesmith.evaluate.generate_until import EvalPrompt
from tunesmith.evaluate.metrics import grade_answer, parse_metric_arg
from tunesmith.evaluate.results import (
    MetricValues,
    compare_measurements,
    compute_score,
    select_items,
)
from tunesmith.evaluate.statistics import (
    ALPHA,
    MIN_ITEMS,
    compute_padded_interval,
    compute_t_quantile,
)

FORMAT_METRICS = ("json_valid", "schema_valid")  # blind to the content of an answer
MIN_USEFUL_SCORE = 0.1  # below it no arm solves the task
DEFAULT_MARGIN = 0.1  # one answer in ten: what a cheaper approach may be worse by
CHOOSING_SHARE = 1 / 3  # of the items choose the arms; the others judge them
MAX_NEEDED_ITEMS = 10_000
Approach = Literal["prompt", "constrained decoding", "retrieval", "another base", "sft"]
APPROACHES: tuple[Approach, ...] = get_args(Approach)
Conclusion = Literal[Approach, "nothing", "undecided"]


def choose_primary_metric(metrics: Sequence[str]) -> str:
    """Return the first metric that grades content rather than format."""
    return next((name for name in metrics if name not in FORMAT_METRICS), metrics[0])


def get_approach(arm: Arm) -> Approach:
    if arm.examples:
        return "sft"
    if arm.base:
        return "another base"
    if arm.passages:
        return "retrieval"
    return "constrained decoding" if arm.is_constrained else "prompt"


@dataclass(frozen=True)
class ArmRow:
    """One kind of arm, on all items: the mean over its wordings or seeds."""

    name: str
    arm: Arm
    variants: int  # wordings or seeds
    score: Score
    prompt_tokens: float
    request_seconds: float  # of a single request
    train_minutes: float


@dataclass(frozen=True)
class Option:
    """An approach, by the arm that was best on the choosing items, judged on the others."""

    approach: Approach
    arm: Arm
    candidates: int  # arms that it was chosen from
    score: Score
    gains: tuple[Comparison, ...] = ()  # of each costlier option over this one


@dataclass(frozen=True)
class Decision:
    conclusion: Conclusion
    options: tuple[Option, ...]  # from the cheapest approach to the most expensive
    chosen: Option  # the cheapest that is not ruled out
    margin: float
    choosing_items: int
    judging_items: int
    looks: int  # that the intervals hold at, each with more items
    needed_items: int | None  # to judge on, if the estimates stay; None: decided, or none would do
    untried: tuple[str, ...] = ()  # approaches that did not fit in the time
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ArmGrader:
    """Grade the answers of arms, item by item."""

    questions: tuple[EvalPrompt, ...]
    metric: str
    schema: Json | None
    groups: tuple[str, ...] = ()  # of the questions, where some are not independent

    def grade(self, results: Sequence[ArmResult]) -> MetricValues:
        """Return the mean over results of each question that all have answered."""
        metric = self.metric
        metric_arg = parse_metric_arg(metric, self.schema)
        indices: list[int] = []
        grades: list[float] = []
        for index, question in enumerate(self.questions):
            answers = [each.answers[question.id] for each in results if question.id in each.answers]
            if len(answers) == len(results):
                graded = [grade_answer(metric, a, question.expected, metric_arg) for a in answers]
                indices.append(index)
                grades.append(statistics.fmean(graded))
        return MetricValues(
            "items",
            metric,
            tuple(self.questions[index].id for index in indices),
            tuple(grades),
            groups=tuple(self.groups[index] for index in indices) if self.groups else (),
        )


def build_table(results: Sequence[ArmResult], grader: ArmGrader) -> tuple[ArmRow, ...]:
    """Return a row per kind of arm, from the cheapest to the most expensive."""
    results_by_kind: dict[Arm, list[ArmResult]] = {}
    for result in results:
        results_by_kind.setdefault(result.arm.row_key, []).append(result)
    kinds = sorted(results_by_kind, key=lambda arm: arm.cost_key)
    return tuple(_build_row(kind, results_by_kind[kind], grader) for kind in kinds)


def _build_row(kind: Arm, results: Sequence[ArmResult], grader: ArmGrader) -> ArmRow:
    return ArmRow(
        name=kind.name,
        arm=kind,
        variants=len(results),
        score=compute_score(grader.grade(results)),
        prompt_tokens=statistics.fmean(result.prompt_tokens for result in results),
        request_seconds=statistics.median(result.request_seconds for result in results),
        train_minutes=statistics.fmean(result.train_seconds for result in results) / 60,
    )


def collect_candidates(
    results: Sequence[ArmResult], grader: ArmGrader
) -> dict[Arm, tuple[MetricValues, tuple[Arm, ...]]]:
    """Return candidate -> values, arms: each wording, but of a training the mean over its seeds."""
    grouped: dict[Arm, list[ArmResult]] = {}
    for result in results:
        candidate = result.arm.row_key if result.arm.examples else result.arm
        grouped.setdefault(candidate, []).append(result)
    candidates: dict[Arm, tuple[MetricValues, tuple[Arm, ...]]] = {}
    for candidate, each in grouped.items():
        candidates[candidate] = (grader.grade(each), tuple(result.arm for result in each))
    return candidates


def split_items(ids: Sequence[str], groups: Sequence[str] = ()) -> frozenset[str]:
    """Return the ids of the items that choose: the first third, by whole groups."""
    group_by_id = dict(zip(ids, groups or ids, strict=True))
    choosing: set[str] = set()
    for item in ids[: int(CHOOSING_SHARE * len(ids))]:
        choosing.add(group_by_id[item])
    return frozenset(item for item in ids if group_by_id[item] in choosing)


def choose_options(values: Mapping[Arm, MetricValues], choosing: frozenset[str]) -> list[Option]:
    """Return an option per approach: the candidate that is best on the items that choose, judged on
    those that all options have answered besides. Among equals, the cheapest."""
    candidates: dict[Approach, list[Arm]] = {}
    for arm in sorted(values, key=lambda arm: (APPROACHES.index(get_approach(arm)), arm.cost_key)):
        candidates.setdefault(get_approach(arm), []).append(arm)

    def rate(arm: Arm) -> float:
        pairs = zip(values[arm].ids, values[arm].values, strict=True)
        grades = [value for item, value in pairs if item in choosing]
        return statistics.fmean(grades) if grades else 0.0

    arms: dict[Approach, Arm] = {}
    for kind in candidates:
        arms[kind] = max(candidates[kind], key=rate)
    judging = frozenset.intersection(*(frozenset(values[arm].ids) for arm in arms.values()))
    judged: dict[Approach, MetricValues] = {}
    for kind, arm in arms.items():
        ids = values[arm].ids
        rows = [row for row, item in enumerate(ids) if item in judging - choosing]
        judged[kind] = select_items(values[arm], rows)
    kinds = tuple(judged)
    options: list[Option] = []
    for index, kind in enumerate(kinds):
        gains = (_compare(judged[kind], judged[other]) for other in kinds[index + 1 :])
        score = compute_score(judged[kind])
        option = Option(kind, arms[kind], len(candidates[kind]), score, gains=tuple(gains))
        options.append(option)
    return options


def _compare(cheaper: MetricValues, costlier: MetricValues) -> Comparison:
    """Return what the costlier one adds. Few grades do not show their rare large changes: the
    interval is at least that of right or wrong answers, with one more change of -1 and of 1."""
    comparison = compare_measurements(cheaper, costlier)
    changes_N = np.subtract(costlier.values, cheaper.values)
    rows_N = np.arange(len(changes_N))
    low, high = compute_padded_interval(changes_N, np.ones(len(rows_N)), [rows_N], (-1.0, 1.0))
    return dataclasses.replace(
        comparison, low=min(low, comparison.low), high=max(high, comparison.high)
    )


def count_looks(first: int, most: int) -> int:
    """Return how often it may be decided, with twice as many items each time."""
    return 1 + math.ceil(math.log2(most / first))


def compute_width_factor(looks: int, degrees: float) -> float:
    """Return by what an interval of 95% is wider if it holds at every look together (repeated
    confidence intervals, Jennison and Turnbull 1989): each look has Sidak's level (1967). Unlike
    O'Brien and Fleming's bounds (1979), these decide early where the minutes end early."""
    level = (1 + (1 - ALPHA) ** (1 / looks)) / 2
    return float(stdtrit(degrees, level)) / compute_t_quantile(degrees)


def widen(option: Option, looks: int) -> Option:
    """Return the option with intervals that hold at every look together."""
    factor = compute_width_factor(looks, max(1, option.score.independent - 1))

    def stretch(value: float, low: float, high: float, least: float) -> dict[str, float]:
        return {
            "low": max(least, value - factor * (value - low)),
            "high": min(1.0, value + factor * (high - value)),
        }

    score = option.score
    score = dataclasses.replace(score, **stretch(score.value, score.low, score.high, 0.0))
    gains: list[Comparison] = []
    for gain in option.gains:
        wide = stretch(gain.difference, gain.low, gain.high, -1.0)
        gains.append(dataclasses.replace(gain, **wide))
    return dataclasses.replace(option, score=score, gains=tuple(gains))


@dataclass(frozen=True)
class Criterion:
    """When an option is good enough, and when it is not."""

    target: float | None
    margin: float

    def is_enough(self, option: Option) -> bool:
        if self.target is not None:
            return option.score.low > self.target
        is_useful = option.score.value >= MIN_USEFUL_SCORE
        return is_useful and all(gain.high < self.margin for gain in option.gains)

    def is_ruled_out(self, option: Option) -> bool:
        is_missed = self.target is not None and option.score.high < self.target
        return is_missed or any(gain.low > self.margin for gain in option.gains)

    def count_items(self, option: Option) -> int | None:
        """Return the items that would decide about an option; None if it lies on the boundary."""
        score = option.score
        beaten = [_scale(g.difference - self.margin, g.difference - g.low) for g in option.gains]
        equal = [_scale(self.margin - g.difference, g.high - g.difference) for g in option.gains]
        ways = [min(beaten, default=math.inf)]
        if self.target is None:
            ways.append(max(equal, default=math.inf))
        else:
            ways.append(_scale(self.target - score.value, score.high - score.value))
            ways.append(_scale(score.value - self.target, score.value - score.low))
        needed = score.n * min(ways)
        return math.ceil(needed) if needed <= MAX_NEEDED_ITEMS else None


def _scale(gap: float, half_width: float) -> float:
    """Return by what the items must be multiplied for an interval to end before a limit."""
    return max(1.0, half_width / gap) ** 2 if gap > 0 else math.inf


def make_decision(
    options: Sequence[Option],
    target: float | None,
    margin: float = DEFAULT_MARGIN,
    *,
    looks: int = 1,
    choosing_items: int = 0,
    skipped: Sequence[Arm] = (),
) -> Decision:
    """Decide; `looks` is how often in all, `skipped` are the arms that did not fit in the time."""
    options = [widen(option, looks) for option in options]
    criterion = Criterion(target, margin)
    tried = {option.approach for option in options}
    skipped_approaches = {get_approach(arm) for arm in skipped}
    untried = tuple(name for name in APPROACHES if name in skipped_approaches - tried)
    open_options = [each for each in options if not criterion.is_ruled_out(each)]
    chosen = open_options[0] if open_options else max(options, key=lambda each: each.score.value)
    conclusion = _conclude(criterion, options, open_options)
    # an approach without a result may be better; a target that is reached is reached
    is_final = conclusion == "sft" or (target is not None and criterion.is_enough(chosen))
    needed: int | None = None
    if chosen.score.independent < MIN_ITEMS:
        conclusion = "undecided"
        needed = MIN_ITEMS
    elif conclusion == "undecided":
        needed = criterion.count_items(chosen)
    elif untried and not is_final:
        conclusion = "undecided"
    return Decision(
        conclusion=conclusion,
        options=tuple(options),
        chosen=chosen,
        margin=margin,
        choosing_items=choosing_items,
        judging_items=chosen.score.n,
        looks=looks,
        needed_items=needed,
        untried=untried,
    )


def _conclude(
    criterion: Criterion, options: Sequence[Option], open_options: Sequence[Option]
) -> Conclusion:
    useless = [option for option in options if option.score.high < MIN_USEFUL_SCORE]
    if not open_options or len(useless) == len(options):
        return "nothing"
    candidate = open_options[0]
    if criterion.is_enough(candidate):
        return candidate.approach
    # the most expensive need not be shown above the target to be better than all the others
    cheaper = options[:-1]
    is_best = all(option.gains[-1].low > criterion.margin for option in cheaper)
    if cheaper and candidate is options[-1] and is_best:
        return candidate.approach
    return "undecided"


def add_caveats(decision: Decision, seeds: int) -> Decision:
    """Add what the intervals do not cover; `seeds` of the training that was judged, if any."""
    return dataclasses.replace(decision, caveats=tuple(_iter_caveats(decision, seeds)))


def _iter_caveats(decision: Decision, seeds: int) -> Iterator[str]:
    if decision.needed_items is not None:
        yield f"{decision.needed_items:,} items to judge on would decide, if the estimates stay"
    elif decision.conclusion == "undecided" and not decision.untried:
        yield "the estimates lie on the margin or the target: more items would hardly decide"
    if seeds == 1:
        yield "trained once: the intervals do not cover seed-to-seed variation"
    if decision.conclusion == "nothing":
        best = max(decision.options, key=lambda option: option.score.value)
        best_here = f"the best here is {best.arm.name}, {best.score.value:.3f}"
        yield f"try another base model with --base: {best_here}"
