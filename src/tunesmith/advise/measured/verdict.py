"""From the arms' answers to a table and a verdict.

    outcomes -> Row of each kind of arm -> the cheapest that is not shown to be worse than the best -> Verdict

All arms were asked the same items, so they are compared item by item. Prompts of one kind count by their best wording,
beside the mean over wordings; trainings of one size count by their mean over seeds. Cost goes by what must be built and
kept: nothing, a schema, a longer prompt, an index, a model (Arm.effort). Left out: words for people (measuredview.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.run_arm import Outcome
from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, Json
from tunesmith.evaluate.generate_until import Question
from tunesmith.evaluate.metrics import given_to, graded
from tunesmith.evaluate.results import Measurement, compare, score
from tunesmith.evaluate.significance import smallest_difference

FORM_ONLY = ("json_valid", "schema_valid")  # say nothing of what an answer holds
FEW = 20  # items under which a verdict is no more than a look
LITTLE = 0.1  # of a score: below it no arm has done the task
Answer = Literal["prompt", "constrained decoding", "retrieval", "sft", "nothing", "undecided"]


@dataclass(frozen=True)
class Row:
    """One kind of arm. `arm`: its best wording; `mean`, `least`: over wordings and seeds. `change`: against the best
    row, paired by item, with its interval; empty for the best one."""

    name: str
    arm: Arm
    variants: int
    score: Score
    mean: float
    least: float
    others: tuple[Score, ...]  # the other metrics
    prompt_tokens: float
    seconds: float  # of a request alone
    train_minutes: float
    change: tuple[float, ...] = ()


@dataclass(frozen=True)
class Decision:
    """`row`: of what was tried, the cheapest that is not shown to be worse than `best`. `smallest`: the least
    difference that so many items show in four of five cases. `untried`: kinds of ways that had no room, any of which
    may be better; then the answer is "undecided", unless a training wins anyway."""

    answer: Answer
    row: Row
    best: Row
    smallest: float
    items: int
    doubts: tuple[str, ...]
    would_change: tuple[str, ...]
    untried: tuple[str, ...] = ()


def deciding_metric(metrics: Sequence[str]) -> str:
    """The first that looks at what an answer holds."""
    return next((name for name in metrics if name not in FORM_ONLY), metrics[0])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, eq=False)
class Graded:
    """Answers of arms as values by item."""

    questions: tuple[Question, ...]
    metric: str
    metrics: tuple[str, ...]
    schema: Json | None

    def values(self, outcome: Outcome, metric: str = "") -> tuple[float, ...]:
        metric = metric or self.metric
        given = given_to(metric, self.schema)
        return tuple(graded(metric, outcome.answers[q.id], q.expected, given) for q in self.questions)

    def measured(self, outcomes: Sequence[Outcome], metric: str = "") -> Measurement:
        """The mean over outcomes, by item."""
        values = np.mean([self.values(outcome, metric) for outcome in outcomes], axis=0)
        ids = tuple(question.id for question in self.questions)
        return Measurement("items", metric or self.metric, ids, tuple(values.tolist()))


def table_of(outcomes: Sequence[Outcome], graded: Graded) -> tuple[Row, ...]:
    """From the cheapest kind to the dearest, each against the best."""
    kinds: dict[Arm, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.arm.row, []).append(outcome)
    counted = {kind: _counted(found, graded) for kind, found in kinds.items()}
    measured = {kind: graded.measured(found) for kind, found in counted.items()}
    best = _best(measured)
    rows: list[Row] = []
    for kind in sorted(kinds, key=lambda arm: arm.effort):
        against = None if kind == best else compare(measured[best], measured[kind])
        rows.append(_row(kinds[kind], counted[kind], graded, against))
    return tuple(rows)


def _counted(outcomes: Sequence[Outcome], graded: Graded) -> Sequence[Outcome]:
    """The wording that did best; of trainings all."""
    if outcomes[0].arm.examples:
        return outcomes
    return [max(outcomes, key=lambda outcome: statistics.fmean(graded.values(outcome)))]


def _best(measured: Mapping[Arm, Measurement]) -> Arm:
    """The highest mean; of equal ones the cheapest."""
    return max(measured, key=lambda arm: (score(measured[arm]).value, [-x for x in arm.effort]))


def _row(found: Sequence[Outcome], counted: Sequence[Outcome], graded: Graded, against: Comparison | None) -> Row:
    means = [statistics.fmean(graded.values(outcome)) for outcome in found]
    others = [name for name in graded.metrics if name != graded.metric]
    return Row(
        name=found[0].arm.row.name,
        arm=counted[0].arm,
        variants=len(found),
        score=score(graded.measured(counted)),
        mean=statistics.fmean(means),
        least=min(means),
        others=tuple(score(graded.measured(counted, name)) for name in others),
        prompt_tokens=statistics.fmean(outcome.prompt_tokens for outcome in counted),
        seconds=statistics.median(outcome.seconds for outcome in counted),
        train_minutes=statistics.fmean(outcome.train_seconds for outcome in counted) / 60,
        change=() if against is None else (against.difference, against.low, against.high),
    )


# ---------------------------------------------------------------- the verdict


def decision_of(rows: Sequence[Row], target: float | None, left_out: Sequence[Arm] = ()) -> Decision:
    """`rows` as `table_of` gave them; `left_out`: what had no room in the time."""
    best = next(row for row in rows if not row.change)
    chosen = next(row for row in rows if not row.change or row.change[2] >= 0)
    smallest, items = _smallest(chosen, rows), best.score.n
    answer, untried = _answer(chosen, best, target), _untried(rows, left_out)
    return Decision(
        answer="undecided" if untried and answer != "sft" else answer,
        row=chosen,
        best=best,
        smallest=smallest,
        items=items,
        doubts=tuple(_doubts(chosen, best, rows, items, smallest)),
        would_change=tuple(_would_change(chosen, best, rows, smallest, target)),
        untried=untried,
    )


def _untried(rows: Sequence[Row], left_out: Sequence[Arm]) -> tuple[str, ...]:
    """Kinds of ways without a row: what was left out of a kind that has one is another wording, or another size."""
    missing = {kind for arm in left_out for kind in _kinds(arm)}
    return tuple(sorted(missing - {kind for row in rows for kind in _kinds(row.arm)}))


def _kinds(arm: Arm) -> list[str]:
    kinds = {"retrieval": arm.passages, "training": arm.examples, "the schema": arm.constrained, "prompts": arm.shots}
    return [kind for kind, there in kinds.items() if there]


def _answer(chosen: Row, best: Row, target: float | None) -> Answer:
    if best.score.high < (LITTLE if target is None else target) or best.score.value < LITTLE:
        return "nothing"
    if chosen.arm.examples:
        return "sft"
    if chosen.arm.passages:
        return "retrieval"
    return "constrained decoding" if chosen.arm.constrained and not chosen.arm.shots else "prompt"


def _smallest(chosen: Row, rows: Sequence[Row]) -> float:
    """Difference between the chosen row and the best, or the first other one, that is seen in 80% of samples."""
    against = next((row for row in (chosen, *rows) if row.change), None)
    if against is None:
        return 1.0  # nothing to compare with
    _, low, high = against.change
    return smallest_difference(low, high)


def _doubts(chosen: Row, best: Row, rows: Sequence[Row], items: int, smallest: float) -> Iterator[str]:
    if items < FEW:
        yield (
            f"{items} items are few: only a difference of about {smallest:.2f} or more is likely to be seen. "
            "That an arm fails on nearly all of them, or on none, can be concluded; of two near ones, none"
        )
    if chosen.variants > 1 and not chosen.arm.examples:
        yield (
            f"{chosen.arm.variant} is the best of {chosen.variants} wordings, picked on the items that score it: "
            f"their mean is {chosen.mean:.3f}, the worst {chosen.least:.3f}"
        )
    if any(row.arm.examples for row in rows) and all(row.variants == 1 for row in rows if row.arm.examples):
        yield "each size was trained once: another seed may differ by more than the interval says"
    if chosen is not best and chosen.change[1] < -0.1:
        low, high = chosen.change[1:]
        yield f"not shown to be worse is not shown to be as good: the difference lies in [{low:+.3f}, {high:+.3f}]"


def _would_change(chosen: Row, best: Row, rows: Sequence[Row], smallest: float, target: float | None) -> Iterator[str]:
    if chosen is not best:
        needed = math.ceil(chosen.score.n * (smallest / max(0.02, abs(chosen.change[0]))) ** 2)
        if needed > chosen.score.n and chosen.change[0] < 0:
            ahead = f"{best.name} stays {-chosen.change[0]:.3f} ahead"
            yield f"{needed:,} items, if {ahead}: then that is seen, and it wins"
    trained = [row for row in rows if row.arm.examples]
    as_good = [row for row in trained if not row.change or row.change[2] >= 0]
    if not chosen.arm.examples and as_good:
        near = max(as_good, key=lambda row: row.score.value)
        saved, tokens = chosen.seconds - near.seconds, chosen.prompt_tokens - near.prompt_tokens
        if tokens > 0.2 * chosen.prompt_tokens and saved > 0:
            yield f"many requests: {near.name} saves {tokens:.0f} prompt tokens and {saved:.2f} s on each"
    if not trained and not chosen.arm.examples:
        yield "a training: none was tried"
    if target is not None and chosen.score.value < target:
        yield f"a target lower than {target:g}: {chosen.name} has {chosen.score.value:.3f}"
