"""What a run measures, before and after: the task, the held-out loss, what was known before.

In: a Workbench. Out: `Measured`: one Measurement a metric, with a value for every item so that before and after can be
paired, and a few answers to look at. `test_data` is read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.data.sources import open_source
from tunesmith.evaluate.compare import Measurement, compare, score
from tunesmith.evaluate.likelihood import held_out_loss
from tunesmith.evaluate.retention import GeneralText, read_texts, retention
from tunesmith.evaluate.tasks import Question, answer_length, ask, check_questions, grade, questions_of, samples_of
from tunesmith.facts import Facts
from tunesmith.types import Comparison, Document, Plan, Sample, Score
from tunesmith.workbench import Workbench

SHOWN_ANSWERS = 3


@dataclass(frozen=True, eq=False)
class Items:
    """Everything that will be measured, read and checked before anything is computed."""

    questions: tuple[Question, ...]
    test_documents: tuple[Document, ...]
    eval_documents: tuple[Document, ...]
    texts: tuple[GeneralText, ...]


@dataclass(frozen=True)
class Measured:
    measurements: tuple[Measurement, ...]
    samples: tuple[Sample, ...] = ()

    def scores(self, *, step: int) -> Iterator[Score]:
        for measurement in self.measurements:
            yield score(measurement, step=step)


def items_of(plan: Plan, facts: Facts) -> Items:
    """Raises InputError for a metric that the rows cannot be measured with."""
    questions: tuple[Question, ...] = ()
    if "test_data" in facts.datasets:
        dataset = facts.datasets["test_data"]
        asking = [example for i in range(len(dataset)) if (example := dataset.example(i)).messages or example.prompt]
        questions = questions_of(asking, facts.renderer)
        check_questions(questions, plan["metrics"], facts.schema)
    path = facts.recipe.retention_data
    source = open_source(path) if path is not None else None
    return Items(
        questions=questions,
        test_documents=documents_of(facts, "test_data"),
        eval_documents=documents_of(facts, "eval_data"),
        texts=read_texts(source.row(i) for i in range(len(source))) if source is not None else (),
    )


def documents_of(facts: Facts, role: str) -> tuple[Document, ...]:
    dataset = facts.datasets.get(role)
    return () if dataset is None else tuple(d for i in range(len(dataset)) for d in dataset.documents(i))


def measure(bench: Workbench, items: Items, *, step: int) -> Measured:
    """Everything that the recipe gives items for."""
    model, plan = bench.model, bench.plan
    model.network.eval()
    found: list[Measurement] = []
    samples: tuple[Sample, ...] = ()
    if items.questions:
        length = answer_length(items.questions)
        answers = [""] * len(items.questions)
        for place, generation in ask(model, items.questions, bench.renderer, max_new_tokens=length):
            answers[place] = generation.text
        found += grade(items.questions, answers, task="test", metrics=plan["metrics"], schema=bench.facts.schema)
        samples = samples_of(items.questions[:SHOWN_ANSWERS], answers[:SHOWN_ANSWERS], step=step)
    if items.test_documents:
        found.append(held_out_loss(model, items.test_documents, task="test", pack_length=plan["pack_length"]))
    if items.texts:
        found.append(retention(model, items.texts, bench.renderer.text_tokens, window=plan["pack_length"]))
    return Measured(tuple(found), samples)


def compare_all(before: Measured, after: Measured, *, step: int) -> tuple[Comparison, ...]:
    pairs = zip(before.measurements, after.measurements, strict=True)
    return tuple(compare(first, second, step=step) for first, second in pairs)


def eval_loss(bench: Workbench, items: Items, *, step: int) -> Score:
    """The loss on `eval_data` while training."""
    bench.model.network.eval()
    measured = held_out_loss(bench.model, items.eval_documents, task="eval", pack_length=bench.plan["pack_length"])
    return score(measured, step=step)
