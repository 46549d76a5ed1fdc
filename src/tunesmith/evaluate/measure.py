"""Evaluate a model on a run's items: before, during and after training.

In: a Session and EvalItems. Out: EvalResults: MetricValues per task and metric, with a value for
every item so that before and after can be paired, and the generated answers.
Left out: which items there are (items.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tunesmith.core.events import EVAL_TASK, GENERAL_TASK, GenerationSample, Score
from tunesmith.core.types import Document, GenerationOutput
from tunesmith.data.sampler import LABELLED_SIDES
from tunesmith.evaluate.constraint_violations import ELICITING, measure_bad_logp, measure_violations
from tunesmith.evaluate.general_text import (
    GeneralText,
    measure_bits_and_kl,
    measure_bits_per_byte,
)
from tunesmith.evaluate.generate_until import (
    EvalPrompt,
    apply_metrics,
    build_requests,
    build_samples,
    compute_max_new_tokens,
)
from tunesmith.evaluate.items import MIN_SELECTION_PROMPTS, EvalItems
from tunesmith.evaluate.kl_divergence import BaseReference, measure_loss_and_kl
from tunesmith.evaluate.loglikelihood import (
    measure_loss,
    measure_loss_and_greedy_match,
    measure_preference,
    measure_side_logp,
    measure_side_margin,
    to_bits_per_byte,
)
from tunesmith.evaluate.metrics import BITS_PER_BYTE, LIKELIHOODS
from tunesmith.evaluate.multiple_choice import measure_multiple_choice
from tunesmith.evaluate.results import (
    EvalResults,
    MetricValues,
    compute_score,
    split_by_task,
)
from tunesmith.evaluate.shared_items import generate_all
from tunesmith.evaluate.shortcuts import build_answer_items, has_suspect
from tunesmith.plan.memory import needs_complete_answers
from tunesmith.session.session import Session

BaseReferences = Mapping[str, BaseReference]  # by task
NO_BASE_REFERENCES: BaseReferences = {}
MAX_SAMPLE_CHARS = 2_000  # of the prompt of an answer during training


def measure_items(
    session: Session,
    items: EvalItems,
    *,
    step: int,
    base_references: BaseReferences = NO_BASE_REFERENCES,
) -> EvalResults:
    """Evaluate everything there are items for.

    base_references: the model that training started from; without them, KL is not measured.
    """
    session.model.network.eval()
    should_grade = bool(
        set(session.plan.config.metrics) - set(LIKELIHOODS) or session.inputs.recipe.never
    )
    shown = [items.prompts[index] for index in items.select_sample_indices()]
    prompts = (*items.prompts, *items.eliciting_prompts) if should_grade else tuple(shown)
    if should_grade:
        shown += items.eliciting_prompts[:1]
    outputs = generate_answers(session, prompts)
    measurements = grade_answers(session, prompts, outputs)
    samples = build_samples(prompts, [output.text for output in outputs], step=step)
    test_base = base_references.get("test")
    measurements += _measure_likelihoods(session, items.test_documents, "test", test_base)
    measurements += _measure_plan_likelihoods(session, items, measurements)
    measurements = _split_by_task(session, items, "test_data", measurements)
    if "test_data" not in session.inputs.datasets:
        measurements += _measure_eval_likelihoods(session, items)
        measurements += _grade_selection(session, items)[0]
    if "test_data" in items.held_out_texts:
        measurements.append(_measure_texts(session, items.held_out_texts["test_data"], "test"))
    if items.general_texts:
        general_base = base_references.get(GENERAL_TASK)
        if general_base is None:
            measurements.append(measure_general_text(session, items.general_texts))
        else:
            measurements += measure_bits_and_kl(
                session.model,
                items.general_texts,
                session.renderer.encode_text,
                general_base,
                window=compute_text_window(session),
            )
    shown_ids = tuple(prompt.id for prompt in shown)
    grouped = _set_groups(items, measurements)
    return EvalResults(grouped, samples, items.digests, shown_ids)


def _set_groups(items: EvalItems, measurements: Iterable[MetricValues]) -> tuple[MetricValues, ...]:
    """Return the measurements with the groups of their rows; texts have none."""
    grouped: list[MetricValues] = []
    for measurement in measurements:
        is_eval = measurement.task.partition(":")[0].split()[0] == EVAL_TASK
        row_groups = items.row_groups.get("eval_data" if is_eval else "test_data", {})
        if row_groups and measurement.task != GENERAL_TASK:
            groups = tuple(row_groups[row] for row in measurement.ids)
            measurement = dataclasses.replace(measurement, groups=groups)
        grouped.append(measurement)
    return tuple(grouped)


def measure_eval_loss(session: Session, items: EvalItems) -> MetricValues:
    """Return the loss on `eval_data`: nats/token of each row's answer, or bits per byte of each
    text."""
    session.model.network.eval()
    if "eval_data" in items.held_out_texts:
        loss = _measure_texts(session, items.held_out_texts["eval_data"], "eval")
    else:
        loss = next(_measure_likelihoods(session, items.eval_documents, "eval"))
    return _set_groups(items, [loss])[0]


def measure_eval_answers(session: Session, items: EvalItems) -> Sequence[MetricValues]:
    """Return the loss on `eval_data`, and which of its answers greedy decoding would give, if it
    has answers."""
    documents = select_answers(items.eval_documents)
    if not documents:
        return [measure_eval_loss(session, items)]
    session.model.network.eval()
    packing = _get_packing(session)
    both = measure_loss_and_greedy_match(session.model, documents, task="eval", **packing)
    return _set_groups(items, both)


def eval_during_training(
    session: Session, items: EvalItems, *, step: int, should_confirm: bool = False
) -> Iterator[Score | GenerationSample]:
    """Yield the likelihoods on `eval_data` as soon as they are measured, then the grades of a few
    generated answers, tracked general texts, and the answers.

    should_confirm: answer further rows if the answers seem to have a constant; they get no score.
    """
    session.model.network.eval()
    for measurement in _set_groups(items, _measure_eval_likelihoods(session, items)):
        yield compute_score(measurement, step=step)
    measurements, outputs = _grade_selection(session, items)
    samples: tuple[GenerationSample, ...] = ()
    if items.selection_prompts:
        samples = _build_eval_samples(items.selection_prompts, outputs, step)
        is_suspect = should_confirm and has_suspect(build_answer_items(samples))
        if is_suspect and items.confirmation_prompts:
            further = _generate_in_parts(session, items.confirmation_prompts)
            samples += _build_eval_samples(items.confirmation_prompts, further, step)
    if items.should_track_general:
        measurements.append(measure_general_text(session, items.general_texts))
    for measurement in _set_groups(items, measurements):
        yield compute_score(measurement, step=step)
    yield from samples


def _measure_eval_likelihoods(session: Session, items: EvalItems) -> list[MetricValues]:
    likelihoods = _measure_likelihoods(session, items.eval_documents, "eval")
    measurements = _split_by_task(session, items, "eval_data", likelihoods)
    if "eval_data" in items.held_out_texts:
        measurements.append(_measure_texts(session, items.held_out_texts["eval_data"], "eval"))
    return measurements


def _grade_selection(
    session: Session, items: EvalItems
) -> tuple[list[MetricValues], list[GenerationOutput]]:
    """Return the grades of a few answers to `eval_data`, with the answers."""
    outputs = _generate_in_parts(session, items.selection_prompts)
    if not outputs:
        return [], []
    graded = _apply_plan_metrics(session, items.selection_prompts, outputs, task="eval")
    return list(_mark_truncated(graded, items.selection_prompts, outputs)), outputs


def _build_eval_samples(
    prompts: Sequence[EvalPrompt], outputs: Sequence[GenerationOutput], step: int
) -> tuple[GenerationSample, ...]:
    samples = build_samples(prompts, [output.text for output in outputs], step=step)
    return tuple(
        dataclasses.replace(sample, task=EVAL_TASK, prompt=sample.prompt[:MAX_SAMPLE_CHARS])
        for sample in samples
    )


def _generate_in_parts(session: Session, prompts: Sequence[EvalPrompt]) -> list[GenerationOutput]:
    """Generate a few answers at once, so that no more memory is needed."""
    outputs: list[GenerationOutput] = []
    for start in range(0, len(prompts), MIN_SELECTION_PROMPTS):
        outputs += generate_answers(session, prompts[start : start + MIN_SELECTION_PROMPTS])
    return outputs


def get_general_bits(scores: Iterable[Score]) -> float:
    """Return the bits per byte of general text."""
    for score in scores:
        if (score.task, score.metric) == (GENERAL_TASK, BITS_PER_BYTE):
            return score.value
    raise LookupError("no score of general text")


# ---------------------------------------------------------------- generated answers


def generate_answers(
    session: Session,
    prompts: Sequence[EvalPrompt],
    bad_words_ids: tuple[tuple[int, ...], ...] = (),
) -> list[GenerationOutput]:
    """Return greedy answers. `bad_words_ids`: token sequences that no answer may contain."""
    if not prompts:
        return []
    renderer = session.renderer
    needs_end = needs_complete_answers(
        session.plan.config.metrics, has_constraints=bool(session.inputs.recipe.never)
    )
    max_new_tokens = compute_max_new_tokens(prompts, needs_end=needs_end)
    requests = build_requests(prompts, max_new_tokens, bad_words_ids)
    return generate_all(session.model, requests, decode=renderer.decode, end_ids=renderer.end_ids)


def grade_answers(
    session: Session, prompts: Sequence[EvalPrompt], outputs: Sequence[GenerationOutput]
) -> list[MetricValues]:
    """Apply the plan's metrics and the constraints to generated answers.

    Prompts whose row has a bad answer are not graded: any other answer may be right.
    """
    measurements: list[MetricValues] = []
    indices = [index for index, prompt in enumerate(prompts) if not prompt.negative]
    if indices:
        graded_prompts = [prompts[index] for index in indices]
        graded_outputs = [outputs[index] for index in indices]
        measurements += _apply_plan_metrics(session, graded_prompts, graded_outputs, task="test")
    answers = [output.text for output in outputs]
    measurements += measure_violations(session.inputs.recipe.never, prompts, answers)
    return list(_mark_truncated(measurements, prompts, outputs))


def _apply_plan_metrics(
    session: Session,
    prompts: Sequence[EvalPrompt],
    outputs: Sequence[GenerationOutput],
    *,
    task: str,
) -> tuple[MetricValues, ...]:
    return apply_metrics(
        prompts,
        [output.text for output in outputs],
        task=task,
        metrics=session.plan.config.metrics,
        schema=session.inputs.response_schema,
    )


def _mark_truncated(
    measurements: Iterable[MetricValues],
    prompts: Sequence[EvalPrompt],
    outputs: Sequence[GenerationOutput],
) -> Iterator[MetricValues]:
    """Yield the measurements of answers, marked where the answer reached the limit."""
    reasons = {
        prompt.id: output.finish_reason for prompt, output in zip(prompts, outputs, strict=True)
    }
    for measurement in measurements:
        truncated = tuple(reasons[item] == "length" for item in measurement.ids)
        yield dataclasses.replace(measurement, truncated=truncated)


def _split_by_task(
    session: Session, items: EvalItems, role: str, measurements: Iterable[MetricValues]
) -> list[MetricValues]:
    """Split what is measured on all rows of a role by named task; keep the rest as it is."""
    row_tasks = items.row_tasks.get(role, {})
    trained_tasks = session.inputs.datasets["data"].tasks
    parts: list[MetricValues] = []
    for measurement in measurements:
        is_of_role = measurement.task == role.removesuffix("_data")
        parts += split_by_task(measurement, row_tasks if is_of_role else {}, trained_tasks)
    return parts


# ---------------------------------------------------------------- likelihoods


def select_answers(documents: Sequence[Document]) -> list[Document]:
    """Return the documents with a correct answer."""
    return [document for document in documents if document.is_correct]


def compute_text_window(session: Session) -> int:
    """Return the tokens per window of a long text; a pretraining run uses its training window."""
    config = session.plan.config
    return config.max_length - 1 if session.inputs.corpus else config.pack_length


def measure_general_text(session: Session, texts: Sequence[GeneralText]) -> MetricValues:
    """Return bits per byte of each general text."""
    return _measure_texts(session, texts, GENERAL_TASK)


def _measure_texts(session: Session, texts: Sequence[GeneralText], task: str) -> MetricValues:
    window = compute_text_window(session)
    tokenize = session.renderer.encode_text
    return measure_bits_per_byte(session.model, texts, tokenize, window=window, task=task)


def _get_packing(session: Session) -> dict[str, Any]:
    config = session.plan.config
    return {"pack_length": config.pack_length, "share": config.share_prefixes}


def _measure_likelihoods(
    session: Session, documents: Sequence[Document], task: str, base: BaseReference | None = None
) -> Iterator[MetricValues]:
    """Yield the loss of correct answers, the log-probability of bad ones, and the ranking of
    preference pairs; with a `base`, also KL(base || tuned) and top-1 agreement."""
    packing = _get_packing(session)
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
        should_sum = session.plan.config.loss == "dpo"
        yield from measure_preference(
            session.model, pairs, task=task, should_sum=should_sum, **packing
        )
    sides: list[MetricValues] = []
    for side in LABELLED_SIDES:
        labelled = [document for document in documents if document.side == side]
        if len({document.id for document in labelled}) > 1:
            sides.append(measure_side_logp(session.model, labelled, side, task=task, **packing))
    yield from sides
    if len(sides) == len(LABELLED_SIDES):
        yield from measure_side_margin(sides)


def _measure_plan_likelihoods(
    session: Session, items: EvalItems, measurements: Sequence[MetricValues]
) -> list[MetricValues]:
    """Return the plan's likelihood metrics: multiple choice, bits per byte."""
    likelihoods: list[MetricValues] = []
    if items.choices:
        length = session.plan.config.pack_length
        likelihoods.append(
            measure_multiple_choice(session.model, items.choices, task="test", pack_length=length)
        )
    if BITS_PER_BYTE in session.plan.config.metrics:
        likelihoods += [
            to_bits_per_byte(measurement, items.test_documents, session.renderer)
            for measurement in measurements
            if measurement.metric == "loss"
        ]
    return likelihoods
