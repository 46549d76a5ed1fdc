"""Should this be fine-tuned, by measure: every way that fits into the minutes, on the user's items. Read this first.

    Plan, Facts, documents, minutes -> Begun, then each Outcome as it ends, then MeasuredAdvice

The model is loaded once. What was found before is taken from the folder and costs nothing, so a measure that was killed
goes on where it was. Only `eval_data` is asked; `test_data` stays unread.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.advise.measured.arms import Arm, Given, arms_of
from tunesmith.advise.measured.knowledge_check import ROWS, SAMPLED, SETS, Knowledge, check_knowledge, no_facts
from tunesmith.advise.measured.learning_curve import Curve, fit_curve
from tunesmith.advise.measured.prompting import question_of
from tunesmith.advise.measured.result_store import Kept
from tunesmith.advise.measured.retrieval import RECALL_AT, Passages
from tunesmith.advise.measured.run_arm import Outcome, Subject, drawn, items_of, outcome_of
from tunesmith.advise.measured.time_budget import (
    Speed,
    fitting,
    items_that_fit,
    measure_speed,
    seconds_of,
    tokens_trained,
)
from tunesmith.advise.measured.verdict import Decision, Graded, Row, deciding_metric, decision_of, table_of
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import Score
from tunesmith.core.types import Json, Plan
from tunesmith.evaluate.generate_until import check_questions, questions_of
from tunesmith.evaluate.intervals import wilson
from tunesmith.evaluate.metrics import METRICS, split
from tunesmith.model.hub.provenance import hashes_of
from tunesmith.session.inputs import Facts

KNOWLEDGE_SHARE, LEAST_ROWS = 0.1, 10  # of the minutes; training rows under which their knowledge is not looked at
MOST_SHOWN = 400  # training rows that are looked through for what can be shown or trained


@dataclass(frozen=True)
class Begun:
    """What is going to be tried, and what has no room in the minutes. `test_rows`: held-out rows that are kept for the
    test of a run, where the recipe names no test_data."""

    model: str
    items: int
    of_items: int
    test_rows: int
    seconds: float  # expected, of what is not there yet
    arms: tuple[Arm, ...]
    left_out: tuple[Arm, ...]


@dataclass(frozen=True)
class LeftOut:
    arm: Arm
    why: str


@dataclass(frozen=True)
class MeasuredAdvice:
    """`recall`: of the right answer among the first k passages, by k; empty without documents. `no_knowledge`: why
    the knowledge of training answers was not looked at. `loose`: what the grammar leaves of the schema to the model."""

    model: str
    metric: str
    items: int
    of_items: int
    training_rows: int
    decision: Decision
    rows: tuple[Row, ...]
    curve: Curve | None
    knowledge: Knowledge | None
    no_knowledge: str
    recall: dict[int, Score]
    left_out: tuple[LeftOut, ...]
    loose: tuple[str, ...]
    target: float | None
    minutes: float  # that this call took
    folder: str


@dataclass(frozen=True)
class Wanted:
    minutes: float = 10.0
    target: float | None = None
    metric: str | None = None
    folder: Path = Path("runs/advise")


@dataclass(frozen=True)
class Pace:
    """Measured once for a folder, so that a measure that goes on asks the same items."""

    speed: Speed
    items: int


def advise_measured(
    plan: Plan, facts: Facts, passages: Passages | None, wanted: Wanted
) -> Iterator[Begun | Outcome | MeasuredAdvice]:
    """Raises InputError without items, for a metric or schema that cannot be used, and where an item has no room."""
    began = time.perf_counter()
    metrics = _checked(plan, wanted)
    every = items_of(facts)
    check_questions(questions_of(every, facts.renderer), metrics, facts.schema)
    kept = Kept(wanted.folder, _identity(plan, facts, passages))
    subject = Subject.of(plan, facts, every, passages, kept.answers)
    subject, speed = _paced(subject, kept, wanted.minutes)
    given = Given(len(drawn(subject.rows, 0, MOST_SHOWN)), passages is not None, facts.schema is not None)
    run = _Run(subject, kept, speed, began + 60 * wanted.minutes)
    arms = arms_of(given)
    yield run.begun(arms, len(every))
    yield from run.arms(arms[:1])
    run.know()
    yield from run.arms(arms[1:])
    yield _advice(run, metrics, len(every), wanted, time.perf_counter() - began)


def _checked(plan: Plan, wanted: Wanted) -> tuple[str, ...]:
    """The metrics, the deciding one first."""
    if plan["stage"] != "sft":
        what = f"questions are asked and answered; stage: {plan['stage']} has none"
        raise InputError(what, where="stage", fix="measure with `stage: sft` and rows of questions with answers")
    if not 0 < wanted.minutes < math.inf:
        raise InputError("there is no time to measure in", where="--minutes", fix="give some: --minutes 10")
    if wanted.target is not None and not 0 < wanted.target <= 1:
        raise InputError(f"a score lies between 0 and 1, not {wanted.target:g}", where="--target")
    if wanted.metric is not None and split(wanted.metric)[0] not in METRICS:
        raise InputError(f"there is no metric {wanted.metric!r:.60}", where="--metric", fix=f"use {', '.join(METRICS)}")
    metrics = tuple(name for name in plan["metrics"] if split(name)[0] in METRICS)  # likelihoods and code are not asked
    if not metrics and wanted.metric is None:
        what = "none of the metrics grades an answer by itself"
        raise InputError(what, where="metrics", fix=f"name one with --metric: {', '.join(METRICS)}")
    first = wanted.metric or deciding_metric(metrics)
    return (first, *(name for name in metrics if name != first))


def _identity(plan: Plan, facts: Facts, passages: Passages | None) -> Json:
    """All that answers depend on, but the items and the arm."""
    free = ("output_dir", "metrics", "eval_steps", "save_steps", "guard")
    return {
        "recipe": {key: value for key, value in plan.recipe.items() if key not in free},
        "model": hashes_of(facts.model.path),
        "renderer": facts.renderer.fingerprint,
        "day": plan["now"][:10] if facts.renderer.dated else "",
        "rows": {role: facts.datasets[role].fingerprint for role in ("data", "eval_data")},
        "schema": facts.schema,
        "documents": "" if passages is None else passages.fingerprint,
    }


def _paced(subject: Subject, kept: Kept, minutes: float) -> tuple[Subject, Speed]:
    """With as many items as the minutes allow, and how fast they go."""
    pace = kept.get("pace", Pace)
    if pace is None:
        speed = measure_speed(subject)
        pace = Pace(speed, items_that_fit(subject, speed, 60 * minutes))
        kept.put("pace", pace)
    return dataclasses.replace(subject, items=subject.items[: pace.items]), pace.speed


class _Run:
    """What has been found, and the clock."""

    def __init__(self, subject: Subject, kept: Kept, speed: Speed, until: float) -> None:
        self.subject, self.kept, self.speed, self.until = subject, kept, speed, until
        self.ids = [example.id for example in subject.items]
        self.outcomes: list[Outcome] = []
        self.ratio = 1.0  # of what the last arms took to what was expected: a busy machine changes its pace
        self.left_out: list[LeftOut] = []
        self.knowledge: Knowledge | None = None
        self.no_knowledge = no_facts(subject)

    def begun(self, arms: Sequence[Arm], of_items: int) -> Begun:
        missing = [arm for arm in arms if self._found(arm) is None]
        left = self.until - time.perf_counter()
        fit, out = fitting(missing, left, self._seconds)
        seconds = sum(map(self._seconds, fit))
        kept = tuple(arm for arm in arms if arm not in out)
        known = self.subject.facts
        test_rows = 0 if known.recipe.test_data else len(known.datasets["test_data"])
        return Begun(self.subject.plan.model.name, len(self.ids), of_items, test_rows, seconds, kept, tuple(out))

    def arms(self, arms: Sequence[Arm]) -> Iterator[Outcome]:
        """Each as it ends; those without room in the time that is left are left out."""
        for arm in arms:
            if (found := self._found(arm)) is None:
                needed, left = self._seconds(arm), self.until - time.perf_counter()
                if self.outcomes and needed > left:
                    self.left_out.append(LeftOut(arm, f"about {needed:.0f} s, {max(0, left):.0f} s were left"))
                    continue
                found = self._tried(arm)
            if found is not None:
                self.outcomes.append(found)
                yield found

    def _tried(self, arm: Arm) -> Outcome | None:
        try:
            found = outcome_of(self.subject, arm)
        except (InputError, GateError) as error:
            if not self.outcomes:
                raise  # the plain question itself cannot be asked
            self.left_out.append(LeftOut(arm, error.what))
            return None
        self.kept.put(self._name(arm), found)
        if arm.examples:
            tokens = self.ratio * tokens_trained(self.subject, self.speed, arm)
            self.speed = dataclasses.replace(self.speed, trained=found.train_seconds / max(tokens, 1e-9))
        else:
            self.ratio *= (found.took / max(self._seconds(arm), 1e-9)) ** 0.5  # half of the way, in logarithms
        return found

    def know(self) -> None:
        """The knowledge check, on as many rows as its share of the time allows."""
        if self.no_knowledge:
            return
        self.knowledge = self.kept.get("knowledge", Knowledge)
        if self.knowledge is not None:
            return
        speed, left = self.speed, self.until - time.perf_counter()
        each = (
            self.ratio
            * SETS
            * (1 + SAMPLED)
            * (speed.row_tokens * speed.read + 1.3 * speed.answer_tokens * speed.written)
        )
        rows = min(ROWS, int(KNOWLEDGE_SHARE * left / max(each, 1e-9)))
        if rows < LEAST_ROWS:
            self.no_knowledge = f"{LEAST_ROWS} rows would take {LEAST_ROWS * each:.0f} s, over a tenth of the time"
            return
        self.knowledge = check_knowledge(self.subject, rows)
        self.kept.put("knowledge", self.knowledge)

    def _seconds(self, arm: Arm) -> float:
        return self.ratio * seconds_of(self.subject, self.speed, arm)

    def _found(self, arm: Arm) -> Outcome | None:
        return self.kept.get(self._name(arm), Outcome)

    def _name(self, arm: Arm) -> Json:
        return {"arm": dataclasses.asdict(arm), "items": self.ids}


def _advice(run: _Run, metrics: tuple[str, ...], of_items: int, wanted: Wanted, seconds: float) -> MeasuredAdvice:
    subject, facts = run.subject, run.subject.facts
    graded = Graded(questions_of(subject.items, facts.renderer), metrics[0], metrics, facts.schema)
    rows = table_of(run.outcomes, graded)
    constrained = any(outcome.arm.constrained for outcome in run.outcomes)
    return MeasuredAdvice(
        model=subject.plan.model.name,
        metric=metrics[0],
        items=len(run.ids),
        of_items=of_items,
        training_rows=len(subject.rows),
        decision=decision_of(rows, wanted.target, [out.arm for out in run.left_out]),
        rows=rows,
        curve=_curve(run.outcomes, graded, wanted.target),
        knowledge=run.knowledge,
        no_knowledge=run.no_knowledge,
        recall=_recall(subject),
        left_out=tuple(run.left_out),
        loose=subject.grammar.loose if constrained else (),
        target=wanted.target,
        minutes=seconds / 60,
        folder=str(wanted.folder),
    )


def _curve(outcomes: Sequence[Outcome], graded: Graded, target: float | None) -> Curve | None:
    """Through plain trainings: those with passages learn something else."""
    scores: dict[int, list[Sequence[float]]] = {}
    for outcome in outcomes:
        if outcome.arm.examples and not outcome.arm.passages:
            scores.setdefault(outcome.arm.examples, []).append(graded.values(outcome))
    return fit_curve(scores, target)


def _recall(subject: Subject) -> dict[int, Score]:
    if subject.passages is None:
        return {}
    questions = questions_of(subject.items, subject.facts.renderer)
    asked = zip(subject.items, questions, strict=True)
    ranks = [subject.passages.place_of(question_of(item), question.expected) for item, question in asked]
    found: dict[int, Score] = {}
    for most in RECALL_AT:
        hits = sum(rank is not None and rank <= most for rank in ranks)
        low, high = wilson(hits, len(ranks))
        found[most] = Score("passages", f"recall@{most}", hits / len(ranks), low, high, len(ranks), 0)
    return found
