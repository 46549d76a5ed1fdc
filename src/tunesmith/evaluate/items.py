"""What is evaluated: prompts, documents and texts, read and checked before anything is computed.

In: a plan and the run's inputs. Out: EvalItems.
`test_data` is read here only, and never for a decision. Left out: evaluating (measure.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tunesmith.core.errors import InputError
from tunesmith.core.types import Document, Example, Plan
from tunesmith.data.hashing import hash_text
from tunesmith.data.labels import read_labels
from tunesmith.data.readers.sources import open_source
from tunesmith.data.sampler import permute_rows
from tunesmith.evaluate.custom_metric import refuse_code
from tunesmith.evaluate.general_text import GeneralText, read_texts, sample_texts
from tunesmith.evaluate.generate_until import EvalPrompt, build_prompts, check_prompts
from tunesmith.evaluate.metrics import MULTIPLE_CHOICE
from tunesmith.evaluate.multiple_choice import build_choices
from tunesmith.evaluate.results import RETENTION_DATA
from tunesmith.plan.guard import count_affordable_answers
from tunesmith.plan.memory import GENERAL_TEXT_TOKENS
from tunesmith.session.inputs import RunInputs
from tunesmith.session.row_groups import map_groups

MIN_SELECTION_PROMPTS = 16  # and answers that are generated at once
MAX_SELECTION_PROMPTS = 256
# Answered too where a field of few answers seems to be constant: they are too few to show it.
NUM_CONFIRMED = 64
MAX_HELD_OUT_CHARS = 300_000  # per held-out file of a pretraining corpus, about 75,000 tokens
MAX_TEXT_CHARS = 30_000  # per text; longer ones are truncated
MAX_SAMPLES = 3  # answers that the record shows
MAX_TASK_SAMPLES = 8  # of a run with named tasks


@dataclass(frozen=True, eq=False)
class EvalItems:
    """Everything that is evaluated before, during and after training."""

    prompts: tuple[EvalPrompt, ...]
    test_documents: tuple[Document, ...]
    eval_documents: tuple[Document, ...]
    general_texts: tuple[GeneralText, ...]
    # Role -> held-out texts of a pretraining corpus.
    held_out_texts: dict[str, tuple[GeneralText, ...]] = field(
        default_factory=dict[str, tuple[GeneralText, ...]]
    )
    # A few rows of eval_data, answered during training.
    selection_prompts: tuple[EvalPrompt, ...] = ()
    # Further ones, answered where the answers to those seem to have a constant.
    confirmation_prompts: tuple[EvalPrompt, ...] = ()
    # Their answers are checked against the constraints, and not graded.
    eliciting_prompts: tuple[EvalPrompt, ...] = ()
    # Whether the general texts are evaluated during training, too.
    should_track_general: bool = False
    # Role -> row id -> name of its task.
    row_tasks: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    # Role -> row id -> digest of its content.
    digests: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    # Role -> row id -> its group: rows of one are not independent.
    row_groups: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    # Prompt id -> one document per label, the correct one first.
    choices: dict[str, tuple[Document, ...]] = field(
        default_factory=dict[str, tuple[Document, ...]]
    )

    @property
    def has_training_eval(self) -> bool:
        """Whether there is anything to evaluate during training."""
        has_texts = "eval_data" in self.held_out_texts
        return bool(self.eval_documents or has_texts or self.should_track_general)

    def select_sample_indices(self) -> list[int]:
        """Return which prompts are shown with their answers: the first ones, or the first of each
        named task."""
        tasks = self.row_tasks.get("test_data", {})
        first_by_task: dict[str, int] = {}
        for index, prompt in enumerate(self.prompts):
            first_by_task.setdefault(tasks.get(prompt.id, prompt.id), index)
        return list(first_by_task.values())[: MAX_TASK_SAMPLES if tasks else MAX_SAMPLES]


def build_eval_items(plan: Plan, inputs: RunInputs, *, allow_code: bool = False) -> EvalItems:
    """Read and check the items of a plan.

    Raises InputError for a metric that the rows do not fit, for a kind of item with a single one,
    and for a custom metric without `allow_code`: every way to run one leads through here.
    """
    refuse_code(plan.config.metrics, allow_code=allow_code)
    general_texts = load_general_texts(inputs)
    held_out = inputs.datasets.keys() & {"eval_data", "test_data"}
    row_groups = {role: map_groups(inputs.datasets[role], inputs.recipe.group) for role in held_out}
    digests = _compute_digests(inputs, general_texts)
    is_adaptive = plan.config.rehearsal_margin is not None
    if inputs.corpus is not None:
        held_out_texts = _load_held_out_texts(inputs)
        has_both = "eval_data" in held_out_texts and bool(general_texts)
        return EvalItems(
            prompts=(),
            test_documents=(),
            eval_documents=(),
            general_texts=general_texts,
            held_out_texts=held_out_texts,
            should_track_general=is_adaptive or has_both,
            digests=digests,
            row_groups=row_groups,
        )
    eval_prompts = _build_eval_prompts(plan, inputs)
    lengths = [(len(each.prompt_ids), each.num_expected_tokens) for each in eval_prompts]
    num_selected = count_affordable_answers(plan, lengths, MIN_SELECTION_PROMPTS)
    examples = load_test_prompts(inputs)
    all_prompts = build_prompts(examples, inputs.renderer)
    prompts = tuple(prompt for prompt in all_prompts if not prompt.negative)
    choices: dict[str, tuple[Document, ...]] = {}
    if "test_data" in inputs.datasets:
        check_prompts(prompts, plan.config.metrics, inputs.response_schema)
        if MULTIPLE_CHOICE in plan.config.metrics:
            labels = read_labels(inputs.datasets["data"]) if plan.data["data"].labels else ()
            choices = build_choices(examples[: len(prompts)], inputs.renderer, labels)
        _refuse_single(len(prompts), "test_data", "prompt")
    documents = {role: _collect_documents(inputs, role) for role in ("eval_data", "test_data")}
    for role in documents.keys() & inputs.datasets.keys():
        rows = {document.id for document in documents[role] if document.side != "banned"}
        is_empty = not documents[role]
        _refuse_single(len(rows), role, "row", " with a supervised token", refuse_empty=is_empty)
    return EvalItems(
        prompts=prompts,
        test_documents=documents["test_data"],
        eval_documents=documents["eval_data"],
        general_texts=general_texts,
        selection_prompts=eval_prompts[:num_selected],
        confirmation_prompts=eval_prompts[num_selected : max(num_selected, NUM_CONFIRMED)],
        eliciting_prompts=all_prompts[len(prompts) :] if inputs.recipe.never else (),
        should_track_general=is_adaptive,
        row_tasks={role: _map_row_tasks(inputs, role, documents[role]) for role in documents},
        digests=digests,
        row_groups=row_groups,
        choices=choices,
    )


def load_test_prompts(inputs: RunInputs) -> list[Example]:
    """Return the rows of `test_data` with a prompt; rows with a bad answer come last."""
    dataset = inputs.datasets.get("test_data")
    if dataset is None:
        return []
    examples: list[Example] = []
    for index in range(len(dataset)):
        example, prepared = dataset.render_row(index)
        # A row that cannot be rendered has no documents.
        if prepared.documents and (example.messages or example.prompt):
            examples.append(example)
    return sorted(examples, key=lambda example: example.is_bad)


def load_general_texts(inputs: RunInputs) -> tuple[GeneralText, ...]:
    """Return a sample of `retention_data`, even over its domains; long texts are truncated.

    Raises InputError for a domain with fewer than two texts to evaluate.
    """
    path = inputs.recipe.general_texts
    if path is None:
        return ()
    source = open_source(path)
    all_texts = read_texts(source.read_row(i) for i in range(len(source)))
    tokenize = inputs.renderer.encode_text
    truncated = [replace(text, text=text.text[:MAX_TEXT_CHARS]) for text in all_texts]
    chosen = sample_texts(truncated, tokenize, GENERAL_TEXT_TOKENS)
    # A single token has nothing to predict.
    texts = tuple(text for text in chosen if len(tokenize(text.text)) > 1)
    counts = Counter(text.domain for text in texts)
    for domain in dict.fromkeys(text.domain for text in truncated):
        where = f"retention_data: {path}"
        _refuse_single(counts[domain], where, "text", f" of domain {domain!r}", refuse_empty=True)
    return texts


def _load_held_out_texts(inputs: RunInputs) -> dict[str, tuple[GeneralText, ...]]:
    """Return a random sample of each held-out role of a pretraining corpus."""
    texts_by_role: dict[str, tuple[GeneralText, ...]] = {}
    for role in inputs.datasets.keys() & {"eval_data", "test_data"}:
        rows = inputs.datasets[role]
        remaining_chars = MAX_HELD_OUT_CHARS
        texts: list[GeneralText] = []
        for row in permute_rows(0, 0, len(rows)).tolist():
            text = (rows.read_example(row).text or "")[:MAX_TEXT_CHARS]
            texts.append(GeneralText(rows.get_id(row), text, "texts"))
            remaining_chars -= len(text)
            if remaining_chars <= 0:
                break
        texts_by_role[role] = tuple(texts)
        _refuse_single(len(texts), role, "text", refuse_empty=True)
    return texts_by_role


def _build_eval_prompts(plan: Plan, inputs: RunInputs) -> tuple[EvalPrompt, ...]:
    """Return a few random rows of `eval_data` as prompts; none without a metric to grade them, or
    with named tasks, which would have too few each."""
    rows = inputs.datasets.get("eval_data")
    if rows is None or rows.tasks or not plan.config.metrics:
        return ()
    examples: list[Example] = []
    for row in permute_rows(0, 0, len(rows)).tolist():
        example, prepared = rows.render_row(row)
        if prepared.documents and (example.messages or example.prompt) and not example.is_bad:
            examples.append(example)
        if len(examples) == MAX_SELECTION_PROMPTS:
            break
    return build_prompts(examples, inputs.renderer) if len(examples) > 1 else ()


def _compute_digests(inputs: RunInputs, texts: Sequence[GeneralText]) -> dict[str, dict[str, str]]:
    """Return role -> item id -> digest of its content."""
    digests: dict[str, dict[str, str]] = {}
    if texts:
        digests[RETENTION_DATA] = {text.id: f"{hash_text(text.text):016x}" for text in texts}
    rows = inputs.datasets.get("test_data")
    if rows is not None:
        digests["test_data"] = {
            rows.get_id(row): f"{rows.contents_N[row]:016x}" for row in range(len(rows))
        }
    return digests


def _map_row_tasks(inputs: RunInputs, role: str, documents: Sequence[Document]) -> dict[str, str]:
    """Return row id -> task name. Raises InputError for a task with fewer than two rows."""
    dataset = inputs.datasets.get(role)
    if dataset is None or not dataset.tasks:
        return {}
    row_tasks = {dataset.get_id(row): dataset.get_part(row).task for row in range(len(dataset))}
    correct_rows = {document.id for document in documents if document.is_correct}
    counts = Counter(row_tasks[row] for row in correct_rows)
    present_tasks = {row_tasks[document.id] for document in documents}
    for task in dataset.tasks:
        subject = f" of task {task!r} with a supervised token"
        _refuse_single(counts[task], role, "row", subject, refuse_empty=task not in present_tasks)
    return row_tasks


def _collect_documents(inputs: RunInputs, role: str) -> tuple[Document, ...]:
    documents: list[Document] = []
    dataset = inputs.datasets.get(role)
    if dataset is not None:
        for index in range(len(dataset)):
            documents += dataset.render_documents(index)
    return tuple(documents)


def _refuse_single(
    count: int, where: str, noun: str, suffix: str = "", *, refuse_empty: bool = False
) -> None:
    """Raise InputError for a single item, and for none if `refuse_empty`."""
    if count == 1 or (refuse_empty and count == 0):
        plural = "" if count == 1 else "s"
        message = f"{count} {noun}{plural}{suffix}: an interval needs at least two"
        raise InputError(message, where=where, fix="provide at least two, better a hundred")
