"""What a run measures, before and after: the tasks, the held-out loss, what was known before.

In: a Workbench. Out: `Measured`: one Measurement a metric, with a value for every item so that before and after can be
paired, and a few answers to look at. `test_data` is read here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL, Score
from tunesmith.core.types import Document, Example, Plan
from tunesmith.data.hashing import text_digest
from tunesmith.data.readers.sources import open_source
from tunesmith.data.sampler import order
from tunesmith.evaluate.answer_cache import Store, answers_cached
from tunesmith.evaluate.by_task import by_task
from tunesmith.evaluate.constraint_baselines import bad_strings, bans, rules, told
from tunesmith.evaluate.constraint_violations import ELICITING, bad_logp, violations
from tunesmith.evaluate.custom_metric import refuse_code
from tunesmith.evaluate.general_text import GeneralText, chosen_texts, read_texts, retention, retention_beside
from tunesmith.evaluate.generate_until import (
    Question,
    answer_length,
    check_questions,
    grade,
    questions_of,
    requests_of,
    samples_of,
)
from tunesmith.evaluate.kl_divergence import Base, held_out_beside
from tunesmith.evaluate.loglikelihood import held_out_loss, per_byte
from tunesmith.evaluate.metrics import BITS_PER_BYTE, LIKELIHOODS, MULTIPLE_CHOICE
from tunesmith.evaluate.multiple_choice import choices_of, multiple_choice
from tunesmith.evaluate.preference import preference
from tunesmith.evaluate.relearning import SHOTS, after_shots
from tunesmith.evaluate.results import RETENTION, Measured, Measurement, score
from tunesmith.plan.disk import GENERAL_TOKENS
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench

SHOWN_ANSWERS, SHOWN_TASKS = 3, 8
SELECTING = 16  # questions of `eval_data` at a look: their answers take about as long as the held-out loss of 60 rows
MEASURED_CHARACTERS = 300_000  # of the texts of a role; about 75,000 tokens
LONGEST_TEXT = 30_000  # characters
Bases = Mapping[str, Base]
NO_BASES: Bases = {}


@dataclass(frozen=True, eq=False)
class Items:
    """Everything that will be measured, read and checked before anything is computed."""

    questions: tuple[Question, ...]
    test_documents: tuple[Document, ...]
    eval_documents: tuple[Document, ...]
    texts: tuple[GeneralText, ...]
    held_out: dict[str, tuple[GeneralText, ...]] = field(default_factory=dict[str, tuple[GeneralText, ...]])  # by role
    selecting_questions: tuple[Question, ...] = ()  # a few of `eval_data`, answered while training
    eliciting: tuple[Question, ...] = ()  # their answers are looked at for what they should not say, and not graded
    watched: bool = False  # general texts are looked at while training, too
    tasks: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])  # role -> row -> its named task
    contents: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])  # role -> row -> its digest
    choices: dict[str, tuple[Document, ...]] = field(default_factory=dict[str, tuple[Document, ...]])  # right one first

    @property
    def selecting(self) -> bool:
        """There is something to look at while training."""
        return bool(self.eval_documents or "eval_data" in self.held_out or self.watched)


def items_of(plan: Plan, facts: Facts, *, allow_code: bool = False) -> Items:
    """Raises InputError for a metric that the rows cannot be measured with, for a single item of a kind, and for a
    metric of the user's own without `allow_code`: every way to run one leads through here."""
    refuse_code(plan["metrics"], allowed=allow_code)
    texts, adaptive = general_texts(facts), "rehearsal_margin" in plan.choices
    if facts.corpus is not None:
        held_out = held_out_texts(facts)
        watched = adaptive or ("eval_data" in held_out and bool(texts))
        return Items((), (), (), texts, held_out, watched=watched, contents=contents_of(facts, texts))
    examples = asking(facts)
    asked = questions_of(examples, facts.renderer)
    questions = tuple(question for question in asked if not question.negative)
    choices: dict[str, tuple[Document, ...]] = {}
    if "test_data" in facts.datasets:
        check_questions(questions, plan["metrics"], facts.schema)
        if MULTIPLE_CHOICE in plan["metrics"]:
            choices = choices_of(examples[: len(questions)], facts.renderer)
        _refuse_single(len(questions), "test_data", "questions")
    documents = {role: documents_of(facts, role) for role in ("eval_data", "test_data")}
    for role in documents.keys() & facts.datasets.keys():
        rows = {document.id for document in documents[role] if document.side != "banned"}
        _refuse_single(len(rows), role, "rows with something to predict", empty=not documents[role])
    return Items(
        questions,
        documents["test_data"],
        documents["eval_data"],
        texts,
        selecting_questions=_selecting(plan, facts),
        eliciting=asked[len(questions) :] if facts.recipe.never else (),
        watched=adaptive,
        tasks={role: tasks_of(facts, role, found) for role, found in documents.items()},
        contents=contents_of(facts, texts),
        choices=choices,
    )


def _selecting(plan: Plan, facts: Facts) -> tuple[Question, ...]:
    """By chance a few rows of `eval_data` whose answers are graded at each look; none where nothing grades them, and of
    named tasks, each of which would have too few."""
    rows = facts.datasets.get("eval_data")
    if rows is None or rows.tasks or not plan["metrics"]:
        return ()
    found: list[Example] = []
    for row in order(0, 0, len(rows)).tolist():
        example, prepared = rows.understand(row)
        if prepared.documents and (example.messages or example.prompt) and not example.negative:
            found.append(example)
        if len(found) == SELECTING:
            break
    return questions_of(found, facts.renderer) if len(found) > 1 else ()


def contents_of(facts: Facts, texts: Sequence[GeneralText]) -> dict[str, dict[str, str]]:
    """A digest of every item by its id, for each role that the before/after is measured on."""
    found = {RETENTION: {text.id: f"{text_digest(text.text):016x}" for text in texts}} if texts else {}
    if (rows := facts.datasets.get("test_data")) is not None:
        found["test_data"] = {rows.id(row): f"{rows.contents_N[row]:016x}" for row in range(len(rows))}
    return found


def asking(facts: Facts) -> list[Example]:
    """The rows of `test_data` that ask something, those last whose answer is bad."""
    if "test_data" not in facts.datasets:
        return []
    dataset = facts.datasets["test_data"]
    understood = (dataset.understand(i) for i in range(len(dataset)))  # those that cannot be rendered ask nothing
    found = [one for one, prepared in understood if prepared.documents and (one.messages or one.prompt)]
    return sorted(found, key=lambda example: bool(example.negative))


def tasks_of(facts: Facts, role: str, documents: Sequence[Document]) -> dict[str, str]:
    """The named task of each row of a role. Raises InputError for one with less than two rows to measure."""
    dataset = facts.datasets.get(role)
    if dataset is None or not dataset.tasks:
        return {}
    task_of = {dataset.id(row): dataset.part(row).task for row in range(len(dataset))}
    measured = {document.id for document in documents if document.right}
    counts, left = Counter(task_of[row] for row in measured), {task_of[document.id] for document in documents}
    for task in dataset.tasks:
        what = f"rows of the task '{task}' with something to predict"
        _refuse_single(counts[task], role, what, empty=task not in left)
    return task_of


def general_texts(facts: Facts) -> tuple[GeneralText, ...]:
    """The texts of `retention_data`, at least two that can be measured in each domain: all, or as many as are measured,
    evenly of each domain and in an order by chance. Of a long text its beginning."""
    path = facts.recipe.retention_data
    if path is None:
        return ()
    source = open_source(path)
    read = read_texts(source.row(i) for i in range(len(source)))
    tokens = facts.renderer.text_tokens
    cut = [dataclasses.replace(one, text=one.text[:LONGEST_TEXT]) for one in read]
    chosen = chosen_texts(cut, tokens, GENERAL_TOKENS)
    texts = tuple(one for one in chosen if len(tokens(one.text)) > 1)  # of one token nothing is predicted
    for domain in dict.fromkeys(one.domain for one in cut):
        count = sum(text.domain == domain for text in texts)
        _refuse_single(count, f"retention_data: {path}", f"texts of the domain {domain!r}", empty=True)
    return texts


def held_out_texts(facts: Facts) -> dict[str, tuple[GeneralText, ...]]:
    """Of each held-out role of texts as many as are measured, in an order by chance; of a long text its beginning."""
    found: dict[str, tuple[GeneralText, ...]] = {}
    for role in facts.datasets.keys() & {"eval_data", "test_data"}:
        rows, left = facts.datasets[role], MEASURED_CHARACTERS
        texts: list[GeneralText] = []
        for row in order(0, 0, len(rows)).tolist():
            text = (rows.example(row).text or "")[:LONGEST_TEXT]
            texts.append(GeneralText(rows.id(row), text, "texts"))
            left -= len(text)
            if left <= 0:
                break
        found[role] = tuple(texts)
        _refuse_single(len(texts), role, "texts", empty=True)
    return found


def _refuse_single(count: int, where: str, what: str, *, empty: bool = False) -> None:
    if count == 1 or (empty and count == 0):
        fix = "give at least two, better a hundred"
        raise InputError(f"{count} {what}: at least two are needed for an interval", where=where, fix=fix)


def documents_of(facts: Facts, role: str) -> tuple[Document, ...]:
    dataset = facts.datasets.get(role)
    return () if dataset is None else tuple(d for i in range(len(dataset)) for d in dataset.documents(i))


def measure(
    bench: Workbench, items: Items, *, step: int, bases: Bases = NO_BASES, store: Store | None = None
) -> Measured:
    """Everything that the recipe gives items for. `bases`: what the training started from, by task; without them the
    model is it, and has not moved. `store`: where its answers are kept."""
    bench.model.network.eval()
    found: list[Measurement] = []
    graded = set(bench.plan["metrics"]) - set(LIKELIHOODS) or bench.facts.recipe.never
    shown = shown_of(items)
    questions = (*items.questions, *items.eliciting) if graded else tuple(items.questions[i] for i in shown)
    answers = answers_to(bench, questions, store=store)
    found += grades(bench, questions, answers)
    shown = [*(shown if graded else range(len(questions))), *range(len(items.questions), len(questions))[:1]]
    samples = samples_of(questions, answers, step=step)
    found += _likelihoods(bench, items.test_documents, "test", bases.get("test"))
    found += _chosen(bench, items, found)
    found = _by_task(bench, items, "test_data", found)
    if "test_data" in items.held_out:
        found.append(_bits(bench, items.held_out["test_data"], "test"))
    if items.texts:
        found += _general(bench, items.texts, bases.get(GENERAL))
    return Measured(tuple(found), samples, items.contents, tuple(questions[i].id for i in shown))


def shown_of(items: Items) -> list[int]:
    """Which questions are shown with their answers: the first ones, or the first of each named task."""
    tasks, first = items.tasks.get("test_data", {}), dict[str, int]()
    for place, question in enumerate(items.questions):
        first.setdefault(tasks.get(question.id, question.id), place)
    return list(first.values())[: SHOWN_TASKS if tasks else SHOWN_ANSWERS]


def answers_to(
    bench: Workbench,
    questions: Sequence[Question],
    banned: tuple[tuple[int, ...], ...] = (),
    *,
    store: Store | None = None,
) -> list[str]:
    """Greedy ones. `banned`: token sequences that no answer may hold."""
    if not questions:
        return []
    requests, renderer = requests_of(questions, answer_length(questions), banned), bench.renderer
    found = answers_cached(bench.model, requests, decode=renderer.decode, end_ids=renderer.end_ids, store=store)
    return [one.text for one in found]


def grades(bench: Workbench, questions: Sequence[Question], answers: Sequence[str]) -> list[Measurement]:
    """What answers show by themselves. Bad answers have no grade: whatever is said instead may be right."""
    metrics, schema, never = bench.plan["metrics"], bench.facts.schema, bench.facts.recipe.never
    right = [place for place, question in enumerate(questions) if not question.negative]
    asked, given = [questions[i] for i in right], [answers[i] for i in right]
    graded = grade(asked, given, task="test", metrics=metrics, schema=schema) if asked else ()
    return [*graded, *violations(never, questions, answers)]


def untrained(bench: Workbench, items: Items) -> dict[str, Measured]:
    """What the answers show without training: as they are, with the rules in the prompt, with bad tokens banned. The
    same items in each, and the model as it was before training."""
    bench.model.network.eval()
    constraints, renderer = bench.facts.recipe.never, bench.renderer
    questions = (*items.questions, *items.eliciting)
    plain = answers_to(bench, questions)
    known = [(question.id, question.expected) for question in items.eliciting]
    own = [
        (question.id, answer)
        for question, answer in zip(questions, plain, strict=True)
        if question.negative is not False
    ]
    bad = bad_strings(constraints, [*known, *own])
    asked = questions_of([told(one, rules(constraints, bad)) for one in asking(bench.facts)], renderer)
    answers = {
        "base": plain,
        "told": answers_to(bench, asked[: len(questions)]),
        "banned": answers_to(bench, questions, bans(bad, renderer)),
    }
    return {name: Measured(tuple(grades(bench, questions, given))) for name, given in answers.items()}


def answered(bench: Workbench, items: Items) -> Measured:
    """What the answers show, to be compared with the baselines."""
    bench.model.network.eval()
    questions = (*items.questions, *items.eliciting)
    return Measured(tuple(grades(bench, questions, answers_to(bench, questions))))


def _by_task(bench: Workbench, items: Items, role: str, found: Iterable[Measurement]) -> list[Measurement]:
    """What is measured on all rows of a role, divided; the rest, such as constraints, as it is."""
    tasks, trained, own = items.tasks.get(role, {}), bench.facts.datasets["data"].tasks, role.removesuffix("_data")
    return [part for whole in found for part in by_task(whole, tasks if whole.task == own else {}, trained)]


def _bits(bench: Workbench, texts: Sequence[GeneralText], task: str) -> Measurement:
    return retention(bench.model, texts, bench.renderer.text_tokens, window=text_window(bench), task=task)


def _general(bench: Workbench, texts: Sequence[GeneralText], base: Base | None) -> tuple[Measurement, ...]:
    """Bits per byte, and how far the model is from its base."""
    if base is None:
        return (general_measurement(bench, texts),)
    return retention_beside(bench.model, texts, bench.renderer.text_tokens, base, window=text_window(bench))


def general_measurement(bench: Workbench, texts: Sequence[GeneralText]) -> Measurement:
    """Bits per byte."""
    return _bits(bench, texts, GENERAL)


def recovery_measurements(bench: Workbench, texts: Sequence[GeneralText]) -> Measured:
    """Each domain's texts by themselves, and after others of it."""
    bench.model.network.eval()
    found: list[Measurement] = []
    for domain in dict.fromkeys(text.domain for text in texts):
        own = [text for text in texts if text.domain == domain]
        for shots, name in ((0, domain), (SHOTS, f"{domain}, after {SHOTS} texts of it")):
            asked = {"shots": shots, "window": text_window(bench), "task": f"{GENERAL}: {name}"}
            found.append(after_shots(bench.model, own, bench.renderer.text_tokens, **asked))
    return Measured(tuple(found))


def text_window(bench: Workbench) -> int:
    """Texts of continued pretraining are read in windows as trained."""
    return bench.plan["max_length"] - 1 if bench.facts.corpus else bench.plan["pack_length"]


def _likelihoods(
    bench: Workbench, documents: Sequence[Document], task: str, base: Base | None = None
) -> Iterator[Measurement]:
    """The loss of right answers; of pairs, how they are ranked too. Beside a `base`, how far the model is from it."""
    plan = bench.plan
    packing = {"pack_length": plan["pack_length"], "share": plan["share_prefixes"]}
    answers = answers_of(documents)
    if answers and base is not None:
        yield from held_out_beside(bench.model, answers, base, task=task, **packing)
    elif answers:
        yield held_out_loss(bench.model, answers, task=task, **packing)
    bad = [document for document in documents if document.side == "banned"]
    if len({document.id for document in bad}) > 1:
        asked = ELICITING if task == "test" else f"{task} {ELICITING}"
        yield bad_logp(bench.model, bad, task=asked, **packing)
    if pairs := [document for document in documents if document.side in ("chosen", "rejected")]:
        whole = plan["loss"] == "dpo"
        yield from preference(bench.model, pairs, task=task, whole=whole, **packing)


def answers_of(documents: Sequence[Document]) -> list[Document]:
    """Those with a right answer."""
    return [document for document in documents if document.right]


def _chosen(bench: Workbench, items: Items, found: Sequence[Measurement]) -> list[Measurement]:
    """The metrics of the plan that are likelihoods, beside the loss that is always measured."""
    plan, chosen = bench.plan, list[Measurement]()
    if items.choices:
        packing = {"pack_length": plan["pack_length"], "share": plan["share_prefixes"]}
        chosen.append(multiple_choice(bench.model, items.choices, task="test", **packing))
    if BITS_PER_BYTE in plan["metrics"]:
        chosen += [per_byte(one, items.test_documents, bench.renderer) for one in found if one.metric == "loss"]
    return chosen


def eval_measurement(bench: Workbench, items: Items) -> Measurement:
    """The held-out loss, row by row: of answers in nats a token, of texts in bits a byte."""
    bench.model.network.eval()
    if "eval_data" in items.held_out:
        return _bits(bench, items.held_out["eval_data"], "eval")
    return next(_likelihoods(bench, items.eval_documents, "eval"))


def eval_scores(bench: Workbench, items: Items, *, step: int) -> list[Score]:
    """What is looked at while training: the likelihoods on `eval_data`, a few answers, and general texts where they are
    watched."""
    bench.model.network.eval()
    found = _by_task(bench, items, "eval_data", _likelihoods(bench, items.eval_documents, "eval"))
    if "eval_data" in items.held_out:
        found.append(_bits(bench, items.held_out["eval_data"], "eval"))
    if items.selecting_questions:
        asked, metrics, schema = items.selecting_questions, bench.plan["metrics"], bench.facts.schema
        found += grade(asked, answers_to(bench, asked), task="eval", metrics=metrics, schema=schema)
    if items.watched:
        found.append(general_measurement(bench, items.texts))
    return [score(measured, step=step) for measured in found]


def general_bits(scores: Iterable[Score]) -> float:
    """Bits per byte of the general texts among them."""
    return next(score.value for score in scores if (score.task, score.metric) == (GENERAL, BITS_PER_BYTE))
