"""Running one arm: the items asked its way, after its training if it has one.

    Subject.of(plan, facts, ...) -> Subject; outcome_of(subject, arm) -> Outcome (the answers, and what they cost)

Held-out items come from `eval_data`; `test_data` is not looked at. Examples that are shown or trained are training
rows, the same for the same seed. Every training starts from the same weights and leaves them as they were. Seconds a
request are those of a few requests answered alone, since that is what one user waits. Left out: grades (decide.py).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.prompting import looked_up, prompted, question_of
from tunesmith.advise.measured.retrieval import Passages
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import Document, Example, Generation, Plan, Request
from tunesmith.data.dataset import Dataset
from tunesmith.data.sampler import Schedule, order
from tunesmith.evaluate.answer_cache import Store, answers_cached
from tunesmith.evaluate.generate_until import Question, answer_length, ask, questions_of
from tunesmith.model.adapters import put_back, weights_of
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.generation.engine import Allowed
from tunesmith.model.generation.grammar import Grammar
from tunesmith.plan.build import decide
from tunesmith.session.inputs import Facts
from tunesmith.session.session import model_at_start
from tunesmith.train.loop import Settings, Training

TIMED = 3  # requests answered alone
MOST_ITEMS = 1000  # more narrow an interval little


@dataclass(frozen=True)
class Outcome:
    """`answers` by item; tokens are the mean of a prompt, seconds the median of a request answered alone."""

    arm: Arm
    answers: dict[str, str]
    prompt_tokens: float
    seconds: float
    train_seconds: float
    took: float  # all in all, asking and training


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the rows that it is tried on. `items`: held-out rows that ask something; `store`: where answers of
    the untrained model are kept."""

    plan: Plan
    facts: Facts
    model: LanguageModel
    rows: Dataset
    items: tuple[Example, ...]
    passages: Passages | None
    store: Store | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        facts: Facts,
        items: Sequence[Example],
        passages: Passages | None,
        store: Store | None = None,
    ) -> Subject:
        rows = facts.datasets["data"].limited(plan["max_length"], plan["overlong"])
        return cls(plan, facts, model_at_start(plan, facts), rows, tuple(items), passages, store)

    @cached_property
    def start(self) -> dict:
        return weights_of(self.model.network)

    @cached_property
    def room(self) -> int:
        """Tokens for an answer."""
        return answer_length(questions_of(self.items, self.facts.renderer))

    @cached_property
    def grammar(self) -> Grammar:
        assert self.facts.schema is not None
        width, ends = self.model.head.weight.shape[0], self.facts.renderer.end_ids
        return Grammar(self.facts.schema, self.facts.model.path, width=width, end_ids=ends)

    def questions(self, arm: Arm) -> tuple[Question, ...]:
        shots = [self._looked_up(example, arm) for example in drawn(self.rows, arm.seed, arm.shots)]
        asked = [prompted(self._looked_up(example, arm), shots, arm.form) for example in self.items]
        return questions_of(asked, self.facts.renderer)

    def documents(self, arm: Arm) -> list[tuple[Document, ...]]:
        """What is trained, by row: asked as the items are."""
        return [
            self.facts.renderer.documents(self._looked_up(example, arm)).documents
            for example in drawn(self.rows, arm.seed, arm.examples)
        ]

    def _looked_up(self, example: Example, arm: Arm) -> Example:
        found = self.passages.best(question_of(example), arm.passages) if self.passages and arm.passages else ()
        return looked_up(example, found)


def items_of(facts: Facts) -> list[Example]:
    """Rows of `eval_data` that ask something and have a right answer, in an order by chance, at most MOST_ITEMS. Raises
    InputError if there are none."""
    if "eval_data" not in facts.datasets:
        what = "no held-out items to ask; test_data is for the end"
        raise InputError(what, where="eval_data", fix="give eval_data, or --eval-split 0.1")
    rows = facts.datasets["eval_data"]
    found = usable(rows, order(0, 0, len(rows)).tolist(), MOST_ITEMS)
    if len(found) < 2:
        what = f"{len(found)} rows of eval_data ask something: at least two are needed for an interval"
        raise InputError(what, where=f"eval_data: {rows.path}", fix="give rows with questions and answers, 20 at least")
    return found


def drawn(rows: Dataset, seed: int, count: int) -> list[Example]:
    """The first `count` usable rows of an order that depends on the seed alone: more are the same and others."""
    return usable(rows, order(seed, 0, len(rows)).tolist(), count) if count else []


def usable(rows: Dataset, places: Sequence[int], most: int) -> list[Example]:
    """Examples that ask something, and whose answer is right."""
    found: list[Example] = []
    for place in places:
        if len(found) == most:
            break
        example, prepared = rows.understand(place)
        if prepared.documents and (example.messages or example.prompt) and not (example.negative or example.banned):
            found.append(example)
    return found


# ---------------------------------------------------------------- one arm


def outcome_of(subject: Subject, arm: Arm) -> Outcome:
    """Raises InputError when a prompt and its answer have no room in the model's context, GateError for numbers that
    are not finite."""
    started = time.perf_counter()
    questions = subject.questions(arm)
    _check_room(subject, questions)
    subject.start  # noqa: B018 - taken before anything is trained
    try:
        trained = _train(subject, arm) if arm.examples else 0.0
        seconds = _seconds_alone(subject, questions, subject.grammar if arm.constrained else None)
        answers = _answers(subject, questions, arm)
    finally:
        if arm.examples:
            put_back(subject.model.network, subject.start)
    given = dict(zip((question.id for question in questions), answers, strict=True))
    tokens = statistics.fmean(len(question.prompt) for question in questions)
    return Outcome(arm, given, tokens, seconds, trained, time.perf_counter() - started)


def _check_room(subject: Subject, questions: Sequence[Question]) -> None:
    longest, context = max(len(question.prompt) for question in questions), subject.model.context_length
    if longest + subject.room > context:
        what = f"a prompt of {longest:,} tokens and an answer of {subject.room} exceed the context of {context:,}"
        raise InputError(what, where="advise", fix="shorter items, or fewer examples in the prompt")


def _seconds_alone(subject: Subject, questions: Sequence[Question], allowed: Allowed | None) -> float:
    """Of one request, with nothing beside it."""
    found: list[float] = []
    subject.model.network.eval()
    for question in questions[:TIMED]:
        began = time.perf_counter()
        list(ask(subject.model, [question], subject.facts.renderer, max_new_tokens=subject.room, allowed=allowed))
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _answers(subject: Subject, questions: Sequence[Question], arm: Arm) -> list[str]:
    if arm.constrained:
        renderer, allowed = subject.facts.renderer, subject.grammar
        found = ask(subject.model, questions, renderer, max_new_tokens=subject.room, allowed=allowed)
        return [answer.text for _, answer in sorted(found)]
    requests = [Request(question.prompt, subject.room) for question in questions]
    return [answer.text for answer in generated(subject, requests, trained=bool(arm.examples))]


def generated(subject: Subject, requests: Sequence[Request], *, trained: bool = False) -> list[Generation]:
    """The answers of the model as it is now; those of the untrained one are kept."""
    renderer, store = subject.facts.renderer, None if trained else subject.store
    return answers_cached(subject.model, requests, decode=renderer.decode, end_ids=renderer.end_ids, store=store)


def _train(subject: Subject, arm: Arm) -> float:
    """Trains on so many rows as a run on them would be planned; returns the seconds of its steps."""
    rows, plan = subject.documents(arm), small_plan(subject, arm.examples)
    steps = Schedule(len(rows), plan["batch_size"], plan["num_train_epochs"], arm.seed, plan.steps)
    settings = dataclasses.replace(Settings.of(plan), steps=steps.steps, share_prefixes=subject.plan["share_prefixes"])
    training = Training(subject.model, _documents_of(steps, rows), settings)
    try:
        for _ in training:
            pass
    except GateError as error:
        raise GateError(f"{arm.name}: {error.what}", fix=error.fix) from error
    return training.seconds


def _documents_of(schedule: Schedule, rows: Sequence[tuple[Document, ...]]) -> Callable[..., Sequence[Document]]:
    return lambda step: [document for row in schedule.rows_of(step) for document in rows[row]]


def small_plan(subject: Subject, examples: int) -> Plan:
    """What the rules decide for so many rows; the adapter is that of the whole."""
    plan, report = subject.plan, subject.plan.data["data"]
    share = examples / max(1, report.rows)
    tokens = {
        name: max(1, round(getattr(report, name) * share)) for name in ("documents", "tokens", "supervised_tokens")
    }
    kept = {key: choice for key, choice in plan.choices.items() if choice.by == "checkpoint" or key in FIXED}
    return decide(
        subject.facts.recipe,
        machine=plan.machine,
        model=plan.model,
        data={**plan.data, "data": dataclasses.replace(report, rows=examples, **tokens)},
        output_dir=subject.facts.output_dir,
        now=plan["now"],
        fixed=kept,
    )


FIXED = ("method", "optim", "dtype", "max_length", "pack_length", "lora_r", "lora_alpha", "use_rslora", "attention")
