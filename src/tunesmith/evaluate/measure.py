"""What a run measures, before and after: the tasks, the held-out loss, what was known before.

In: a Workbench. Out: `Measured`: one Measurement a metric, with a value for every item so that
before and after can be paired, and a few answers to look at. `test_data` is read here and nowhere
else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.types import Document, Example, Plan
from tunesmith.data.hashing import hash_text
from tunesmith.data.readers.sources import open_source
from tunesmith.data.sampler import permutation
from tunesmith.evaluate.answer_cache import AnswerCache, generate_cached
from tunesmith.evaluate.by_task import split_by_task
from tunesmith.evaluate.constraint_baselines import (
    add_rules,
    collect_bad_strings,
    format_rules,
    tokenize_bans,
)
from tunesmith.evaluate.constraint_violations import ELICITING, measure_bad_logp, measure_violations
from tunesmith.evaluate.custom_metric import refuse_code
from tunesmith.evaluate.general_text import (
    GeneralText,
    measure_bits_and_kl,
    measure_bits_per_byte,
    read_texts,
    sample_texts,
)
from tunesmith.evaluate.generate_until import (
    EvalPrompt,
    apply_metrics,
    build_prompts,
    build_requests,
    build_samples,
    check_prompts,
    compute_max_new_tokens,
)
from tunesmith.evaluate.kl_divergence import BaseReference, measure_loss_and_kl
from tunesmith.evaluate.loglikelihood import measure_loss, to_bits_per_byte
from tunesmith.evaluate.metrics import BITS_PER_BYTE, LIKELIHOODS, MULTIPLE_CHOICE
from tunesmith.evaluate.multiple_choice import build_choices, measure_multiple_choice
from tunesmith.evaluate.preference import measure_preference
from tunesmith.evaluate.relearning import NUM_SHOTS, measure_after_shots
from tunesmith.evaluate.results import RETENTION_DATA, EvalResults, MetricValues, compute_score
from tunesmith.plan.disk import GENERAL_TEXT_TOKENS
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session

MAX_SAMPLES, MAX_TASK_SAMPLES = 3, 8
# questions of `eval_data` at a look: their answers take about as long as the held-out loss of 60
# rows
MAX_SELECTION_PROMPTS = 16
MAX_HELD_OUT_CHARS = 300_000  # of the texts of a role; about 75,000 tokens
MAX_TEXT_CHARS = 30_000  # characters
BaseReferences = Mapping[str, BaseReference]
NO_BASE_REFERENCES: BaseReferences = {}


@dataclass(frozen=True, eq=False)
class EvalItems:
    """Everything that will be measured, read and checked before anything is computed."""

    prompts: tuple[EvalPrompt, ...]
    test_documents: tuple[Document, ...]
    eval_documents: tuple[Document, ...]
    general_texts: tuple[GeneralText, ...]
    held_out_texts: dict[str, tuple[GeneralText, ...]] = field(
        default_factory=dict[str, tuple[GeneralText, ...]]
    )  # by role
    selection_prompts: tuple[EvalPrompt, ...] = ()  # a few of `eval_data`, answered while training
    eliciting_prompts: tuple[
        EvalPrompt, ...
    ] = ()  # their answers are looked at for what they should not say, and not graded
    should_track_general: bool = False  # general texts are looked at while training, too
    row_tasks: dict[str, dict[str, str]] = field(
        default_factory=dict[str, dict[str, str]]
    )  # role -> row -> its named task
    digests: dict[str, dict[str, str]] = field(
        default_factory=dict[str, dict[str, str]]
    )  # role -> row -> its digest
    choices: dict[str, tuple[Document, ...]] = field(
        default_factory=dict[str, tuple[Document, ...]]
    )  # right one first

    @property
    def has_training_eval(self) -> bool:
        """There is something to look at while training."""
        return bool(
            self.eval_documents or "eval_data" in self.held_out_texts or self.should_track_general
        )


def build_eval_items(plan: Plan, inputs: RunInputs, *, allow_code: bool = False) -> EvalItems:
    """Raises InputError for a metric that the rows cannot be measured with, for a single item of a
    kind, and for a metric of the user's own without `allow_code`: every way to run one leads
    through here."""
    refuse_code(plan.config.metrics, allow_code=allow_code)
    texts, is_adaptive = load_general_texts(inputs), plan.config.rehearsal_margin is not None
    if inputs.corpus is not None:
        held_out = load_held_out_texts(inputs)
        should_track = is_adaptive or ("eval_data" in held_out and bool(texts))
        return EvalItems(
            (),
            (),
            (),
            texts,
            held_out,
            should_track_general=should_track,
            digests=compute_digests(inputs, texts),
        )
    examples = load_test_prompts(inputs)
    all_prompts = build_prompts(examples, inputs.renderer)
    prompts = tuple(prompt for prompt in all_prompts if not prompt.negative)
    choices: dict[str, tuple[Document, ...]] = {}
    if "test_data" in inputs.datasets:
        check_prompts(prompts, plan.config.metrics, inputs.response_schema)
        if MULTIPLE_CHOICE in plan.config.metrics:
            choices = build_choices(examples[: len(prompts)], inputs.renderer)
        _refuse_single(len(prompts), "test_data", "questions")
    documents = {role: collect_documents(inputs, role) for role in ("eval_data", "test_data")}
    for role in documents.keys() & inputs.datasets.keys():
        rows = {document.id for document in documents[role] if document.side != "banned"}
        _refuse_single(
            len(rows), role, "rows with something to predict", refuse_empty=not documents[role]
        )
    return EvalItems(
        prompts,
        documents["test_data"],
        documents["eval_data"],
        texts,
        selection_prompts=_build_selection_prompts(plan, inputs),
        eliciting_prompts=all_prompts[len(prompts) :] if inputs.recipe.never else (),
        should_track_general=is_adaptive,
        row_tasks={
            role: map_row_tasks(inputs, role, role_documents)
            for role, role_documents in documents.items()
        },
        digests=compute_digests(inputs, texts),
        choices=choices,
    )


def _build_selection_prompts(plan: Plan, inputs: RunInputs) -> tuple[EvalPrompt, ...]:
    """By chance a few rows of `eval_data` whose answers are graded at each look; none where nothing
    grades them, and of named tasks, each of which would have too few."""
    rows = inputs.datasets.get("eval_data")
    if rows is None or rows.tasks or not plan.config.metrics:
        return ()
    examples: list[Example] = []
    for row in permutation(0, 0, len(rows)).tolist():
        example, prepared = rows.render_row(row)
        if prepared.documents and (example.messages or example.prompt) and not example.negative:
            examples.append(example)
        if len(examples) == MAX_SELECTION_PROMPTS:
            break
    return build_prompts(examples, inputs.renderer) if len(examples) > 1 else ()


def compute_digests(inputs: RunInputs, texts: Sequence[GeneralText]) -> dict[str, dict[str, str]]:
    """A digest of every item by its id, for each role that the before/after is measured on."""
    digests = (
        {RETENTION_DATA: {text.id: f"{hash_text(text.text):016x}" for text in texts}}
        if texts
        else {}
    )
    if (rows := inputs.datasets.get("test_data")) is not None:
        digests["test_data"] = {
            rows.get_id(row): f"{rows.contents_N[row]:016x}" for row in range(len(rows))
        }
    return digests


def load_test_prompts(inputs: RunInputs) -> list[Example]:
    """The rows of `test_data` that ask something, those last whose answer is bad."""
    if "test_data" not in inputs.datasets:
        return []
    dataset = inputs.datasets["test_data"]
    rendered = (
        dataset.render_row(i) for i in range(len(dataset))
    )  # those that cannot be rendered ask nothing
    examples = [
        example
        for example, prepared in rendered
        if prepared.documents and (example.messages or example.prompt)
    ]
    return sorted(examples, key=lambda example: bool(example.negative))


def map_row_tasks(inputs: RunInputs, role: str, documents: Sequence[Document]) -> dict[str, str]:
    """The named task of each row of a role. Raises InputError for one with less than two rows to
    measure."""
    dataset = inputs.datasets.get(role)
    if dataset is None or not dataset.tasks:
        return {}
    row_tasks = {dataset.get_id(row): dataset.get_part(row).task for row in range(len(dataset))}
    measured_rows = {document.id for document in documents if document.is_correct}
    counts, present_tasks = (
        Counter(row_tasks[row] for row in measured_rows),
        {row_tasks[document.id] for document in documents},
    )
    for task in dataset.tasks:
        subject = f"rows of the task '{task}' with something to predict"
        _refuse_single(counts[task], role, subject, refuse_empty=task not in present_tasks)
    return row_tasks


def load_general_texts(inputs: RunInputs) -> tuple[GeneralText, ...]:
    """The texts of `retention_data`, at least two that can be measured in each domain: all, or as
    many as are measured, evenly of each domain and in an order by chance. Of a long text its
    beginning."""
    path = inputs.recipe.retention_data
    if path is None:
        return ()
    source = open_source(path)
    all_texts = read_texts(source.read_row(i) for i in range(len(source)))
    tokenize = inputs.renderer.encode_text
    truncated = [dataclasses.replace(text, text=text.text[:MAX_TEXT_CHARS]) for text in all_texts]
    chosen = sample_texts(truncated, tokenize, GENERAL_TEXT_TOKENS)
    texts = tuple(
        text for text in chosen if len(tokenize(text.text)) > 1
    )  # of one token nothing is predicted
    for domain in dict.fromkeys(text.domain for text in truncated):
        count = sum(text.domain == domain for text in texts)
        _refuse_single(
            count, f"retention_data: {path}", f"texts of the domain {domain!r}", refuse_empty=True
        )
    return texts


def load_held_out_texts(inputs: RunInputs) -> dict[str, tuple[GeneralText, ...]]:
    """Of each held-out role of texts as many as are measured, in an order by chance; of a long text
    its beginning."""
    texts_by_role: dict[str, tuple[GeneralText, ...]] = {}
    for role in inputs.datasets.keys() & {"eval_data", "test_data"}:
        rows, remaining_chars = inputs.datasets[role], MAX_HELD_OUT_CHARS
        texts: list[GeneralText] = []
        for row in permutation(0, 0, len(rows)).tolist():
            text = (rows.read_example(row).text or "")[:MAX_TEXT_CHARS]
            texts.append(GeneralText(rows.get_id(row), text, "texts"))
            remaining_chars -= len(text)
            if remaining_chars <= 0:
                break
        texts_by_role[role] = tuple(texts)
        _refuse_single(len(texts), role, "texts", refuse_empty=True)
    return texts_by_role


def _refuse_single(count: int, where: str, subject: str, *, refuse_empty: bool = False) -> None:
    if count == 1 or (refuse_empty and count == 0):
        fix = "give at least two, better a hundred"
        raise InputError(
            f"{count} {subject}: at least two are needed for an interval", where=where, fix=fix
        )


def collect_documents(inputs: RunInputs, role: str) -> tuple[Document, ...]:
    dataset = inputs.datasets.get(role)
    return (
        ()
        if dataset is None
        else tuple(
            document for i in range(len(dataset)) for document in dataset.render_documents(i)
        )
    )


def measure_items(
    session: Session,
    items: EvalItems,
    *,
    step: int,
    base_references: BaseReferences = NO_BASE_REFERENCES,
    cache: AnswerCache | None = None,
) -> EvalResults:
    """Everything that the recipe gives items for. `bases`: what the training started from, by task;
    without them the model is it, and has not moved. `store`: where its answers are kept."""
    session.model.network.eval()
    measurements: list[MetricValues] = []
    should_grade = set(session.plan.config.metrics) - set(LIKELIHOODS) or session.inputs.recipe.never
    indices = select_sample_indices(items)
    prompts = (
        (*items.prompts, *items.eliciting_prompts)
        if should_grade
        else tuple(items.prompts[i] for i in indices)
    )
    answers = generate_answers(session, prompts, cache=cache)
    measurements += grade_answers(session, prompts, answers)
    indices = [
        *(indices if should_grade else range(len(prompts))),
        *range(len(items.prompts), len(prompts))[:1],
    ]
    samples = build_samples(prompts, answers, step=step)
    measurements += _measure_likelihoods(
        session, items.test_documents, "test", base_references.get("test")
    )
    measurements += _measure_plan_likelihoods(session, items, measurements)
    measurements = _split_measurements(session, items, "test_data", measurements)
    if "test_data" in items.held_out_texts:
        measurements.append(_measure_texts(session, items.held_out_texts["test_data"], "test"))
    if items.general_texts:
        measurements += _measure_general(
            session, items.general_texts, base_references.get(GENERAL_TASK)
        )
    return EvalResults(
        tuple(measurements), samples, items.digests, tuple(prompts[i].id for i in indices)
    )


def select_sample_indices(items: EvalItems) -> list[int]:
    """Which questions are shown with their answers: the first ones, or the first of each named
    task."""
    tasks, first_by_task = items.row_tasks.get("test_data", {}), dict[str, int]()
    for index, prompt in enumerate(items.prompts):
        first_by_task.setdefault(tasks.get(prompt.id, prompt.id), index)
    return list(first_by_task.values())[: MAX_TASK_SAMPLES if tasks else MAX_SAMPLES]


def generate_answers(
    session: Session,
    prompts: Sequence[EvalPrompt],
    banned: tuple[tuple[int, ...], ...] = (),
    *,
    cache: AnswerCache | None = None,
) -> list[str]:
    """Greedy ones. `banned`: token sequences that no answer may hold."""
    if not prompts:
        return []
    requests, renderer = (
        build_requests(prompts, compute_max_new_tokens(prompts), banned),
        session.renderer,
    )
    generations = generate_cached(
        session.model, requests, decode=renderer.decode, end_ids=renderer.end_ids, cache=cache
    )
    return [generation.text for generation in generations]


def grade_answers(
    session: Session, prompts: Sequence[EvalPrompt], answers: Sequence[str]
) -> list[MetricValues]:
    """What answers show by themselves. Bad answers have no grade: whatever is said instead may be
    right."""
    metrics, schema, never = (
        session.plan.config.metrics,
        session.inputs.response_schema,
        session.inputs.recipe.never,
    )
    indices = [index for index, prompt in enumerate(prompts) if not prompt.negative]
    graded_prompts, graded_answers = [prompts[i] for i in indices], [answers[i] for i in indices]
    measurements = (
        apply_metrics(graded_prompts, graded_answers, task="test", metrics=metrics, schema=schema)
        if graded_prompts
        else ()
    )
    return [*measurements, *measure_violations(never, prompts, answers)]


def measure_baselines(session: Session, items: EvalItems) -> dict[str, EvalResults]:
    """What the answers show without training: as they are, with the rules in the prompt, with bad
    tokens banned. The same items in each, and the model as it was before training."""
    session.model.network.eval()
    constraints, renderer = session.inputs.recipe.never, session.renderer
    prompts = (*items.prompts, *items.eliciting_prompts)
    base_answers = generate_answers(session, prompts)
    eliciting_answers = [(prompt.id, prompt.expected) for prompt in items.eliciting_prompts]
    bad_answers = [
        (prompt.id, answer)
        for prompt, answer in zip(prompts, base_answers, strict=True)
        if prompt.negative is not False
    ]
    bad_texts = collect_bad_strings(constraints, [*eliciting_answers, *bad_answers])
    rule_prompts = build_prompts(
        [
            add_rules(example, format_rules(constraints, bad_texts))
            for example in load_test_prompts(session.inputs)
        ],
        renderer,
    )
    answers = {
        "base": base_answers,
        "told": generate_answers(session, rule_prompts[: len(prompts)]),
        "banned": generate_answers(session, prompts, tokenize_bans(bad_texts, renderer)),
    }
    return {
        name: EvalResults(tuple(grade_answers(session, prompts, baseline_answers)))
        for name, baseline_answers in answers.items()
    }


def measure_answers(session: Session, items: EvalItems) -> EvalResults:
    """What the answers show, to be compared with the baselines."""
    session.model.network.eval()
    prompts = (*items.prompts, *items.eliciting_prompts)
    return EvalResults(tuple(grade_answers(session, prompts, generate_answers(session, prompts))))


def _split_measurements(
    session: Session, items: EvalItems, role: str, measurements: Iterable[MetricValues]
) -> list[MetricValues]:
    """What is measured on all rows of a role, divided; the rest, such as constraints, as it is."""
    tasks, trained_tasks, task_name = (
        items.row_tasks.get(role, {}),
        session.inputs.datasets["data"].tasks,
        role.removesuffix("_data"),
    )
    return [
        part
        for measurement in measurements
        for part in split_by_task(
            measurement, tasks if measurement.task == task_name else {}, trained_tasks
        )
    ]


def _measure_texts(session: Session, texts: Sequence[GeneralText], task: str) -> MetricValues:
    return measure_bits_per_byte(
        session.model,
        texts,
        session.renderer.encode_text,
        window=compute_text_window(session),
        task=task,
    )


def _measure_general(
    session: Session, texts: Sequence[GeneralText], base: BaseReference | None
) -> tuple[MetricValues, ...]:
    """Bits per byte, and how far the model is from its base."""
    if base is None:
        return (measure_general_text(session, texts),)
    return measure_bits_and_kl(
        session.model,
        texts,
        session.renderer.encode_text,
        base,
        window=compute_text_window(session),
    )


def measure_general_text(session: Session, texts: Sequence[GeneralText]) -> MetricValues:
    """Bits per byte."""
    return _measure_texts(session, texts, GENERAL_TASK)


def measure_relearning(session: Session, texts: Sequence[GeneralText]) -> EvalResults:
    """Each domain's texts by themselves, and after others of it."""
    session.model.network.eval()
    measurements: list[MetricValues] = []
    for domain in dict.fromkeys(text.domain for text in texts):
        domain_texts = [text for text in texts if text.domain == domain]
        for shots, name in ((0, domain), (NUM_SHOTS, f"{domain}, after {NUM_SHOTS} texts of it")):
            options = {
                "shots": shots,
                "window": compute_text_window(session),
                "task": f"{GENERAL_TASK}: {name}",
            }
            measurements.append(
                measure_after_shots(
                    session.model, domain_texts, session.renderer.encode_text, **options
                )
            )
    return EvalResults(tuple(measurements))


def compute_text_window(session: Session) -> int:
    """Texts of continued pretraining are read in windows as trained."""
    return session.plan.config.max_length - 1 if session.inputs.corpus else session.plan.config.pack_length


def _measure_likelihoods(
    session: Session, documents: Sequence[Document], task: str, base: BaseReference | None = None
) -> Iterator[MetricValues]:
    """The loss of right answers; of pairs, how they are ranked too. Beside a `base`, how far the
    model is from it."""
    plan = session.plan
    packing = {"pack_length": plan.config.pack_length, "share": plan.config.share_prefixes}
    answers = select_answers(documents)
    if answers and base is not None:
        yield from measure_loss_and_kl(session.model, answers, base, task=task, **packing)
    elif answers:
        yield measure_loss(session.model, answers, task=task, **packing)
    banned = [document for document in documents if document.side == "banned"]
    if len({document.id for document in banned}) > 1:
        bad_task = ELICITING if task == "test" else f"{task} {ELICITING}"
        yield measure_bad_logp(session.model, banned, task=bad_task, **packing)
    if pairs := [document for document in documents if document.side in ("chosen", "rejected")]:
        should_sum = plan.config.loss == "dpo"
        yield from measure_preference(
            session.model, pairs, task=task, should_sum=should_sum, **packing
        )


def select_answers(documents: Sequence[Document]) -> list[Document]:
    """Those with a right answer."""
    return [document for document in documents if document.is_correct]


def _measure_plan_likelihoods(
    session: Session, items: EvalItems, measurements: Sequence[MetricValues]
) -> list[MetricValues]:
    """The metrics of the plan that are likelihoods, beside the loss that is always measured."""
    plan, likelihoods = session.plan, list[MetricValues]()
    if items.choices:
        packing = {"pack_length": plan.config.pack_length, "share": plan.config.share_prefixes}
        likelihoods.append(
            measure_multiple_choice(session.model, items.choices, task="test", **packing)
        )
    if BITS_PER_BYTE in plan.config.metrics:
        likelihoods += [
            to_bits_per_byte(measurement, items.test_documents, session.renderer)
            for measurement in measurements
            if measurement.metric == "loss"
        ]
    return likelihoods


def measure_eval_loss(session: Session, items: EvalItems) -> MetricValues:
    """The held-out loss, row by row: of answers in nats a token, of texts in bits a byte."""
    session.model.network.eval()
    if "eval_data" in items.held_out_texts:
        return _measure_texts(session, items.held_out_texts["eval_data"], "eval")
    return next(_measure_likelihoods(session, items.eval_documents, "eval"))


def eval_during_training(session: Session, items: EvalItems, *, step: int) -> list[Score]:
    """What is looked at while training: the likelihoods on `eval_data`, a few answers, and general
    texts where they are watched."""
    session.model.network.eval()
    measurements = _split_measurements(
        session, items, "eval_data", _measure_likelihoods(session, items.eval_documents, "eval")
    )
    if "eval_data" in items.held_out_texts:
        measurements.append(_measure_texts(session, items.held_out_texts["eval_data"], "eval"))
    if items.selection_prompts:
        prompts, metrics, schema = (
            items.selection_prompts,
            session.plan.config.metrics,
            session.inputs.response_schema,
        )
        measurements += apply_metrics(
            prompts, generate_answers(session, prompts), task="eval", metrics=metrics, schema=schema
        )
    if items.should_track_general:
        measurements.append(measure_general_text(session, items.general_texts))
    return [compute_score(measurement, step=step) for measurement in measurements]


def get_general_bits(scores: Iterable[Score]) -> float:
    """Bits per byte of the general texts among them."""
    return next(
        score.value
        for score in scores
        if (score.task, score.metric) == (GENERAL_TASK, BITS_PER_BYTE)
    )
