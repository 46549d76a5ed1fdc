"""Measure the adapter-scale trade-off: gain and forgetting of the trained adapter scaled down.

In: a Session after training. Out: a ScalePoint per scale, all on the same items: the loss on
eval_data, the answers there that greedy decoding gives, and the bits per byte of general text. The
items are a random subset, since the curve takes five evaluations. `test_data` is not read.
Left out: which scale is recommended (scale_choice.py); full fine-tuning has no adapter to scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tunesmith.core.events import GENERAL_TASK, Score
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Document, ScalePoint
from tunesmith.data.sampler import permute_rows
from tunesmith.evaluate.general_text import sample_texts
from tunesmith.evaluate.items import EvalItems
from tunesmith.evaluate.measure import measure_eval_answers, measure_general_text
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import (
    EvalResults,
    MetricValues,
    compare_measurements,
    compute_score,
    select_items,
)
from tunesmith.model.adapters import scaled_adapter
from tunesmith.session.session import Session

ADAPTER_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_TOKENS = 4096  # of general text, at each scale
MAX_ROW_TOKENS = 8192  # of held-out rows


def measure_scale_curve(
    session: Session, items: EvalItems, *, step: int, before: EvalResults, after: EvalResults
) -> tuple[ScalePoint, ...]:
    """Return a point per scale; none without an adapter or `eval_data`.

    The general text at both ends is taken from `before` and `after`. An adapter that started from
    another one is not zero at scale 0, so its lower end is measured.
    """
    has_eval = bool(items.eval_documents) or "eval_data" in items.held_out_texts
    if session.plan.config.method == "full" or not has_eval:
        return ()
    session.model.network.eval()
    items = select_curve_items(session, items)
    end_results = {1.0: after} if session.inputs.adapter else {0.0: before, 1.0: after}
    points: list[ScalePoint] = []
    base: MetricValues | None = None
    for scale in log_progress(ADAPTER_SCALES, len(ADAPTER_SCALES), "adapter scales"):
        general_score = lost = None
        with scaled_adapter(session.model.network, scale):
            answers = measure_eval_answers(session, items)
            eval_score, *right = [compute_score(measured, step=step) for measured in answers]
            if items.general_texts:
                general = _get_general(session, items, end_results.get(scale))
                general_score = compute_score(general, step=step)
                base = base or general
                lost = _compare_to_base(base, general, step)
        points.append(ScalePoint(scale, eval_score, general_score, lost, *right))
    return tuple(points)


def _compare_to_base(base: MetricValues, general: MetricValues, step: int) -> Score:
    """Return the paired difference in bits per byte, with its interval."""
    lost = compare_measurements(base, general, step=step)
    n = len(general.ids)
    return Score(GENERAL_TASK, "bits_per_byte_lost", lost.difference, lost.low, lost.high, n, step)


def _get_general(session: Session, items: EvalItems, results: EvalResults | None) -> MetricValues:
    """Return bits per byte of the general texts, from `results` if there are any."""
    if results is None:
        return measure_general_text(session, items.general_texts)
    (general,) = (
        measurement
        for measurement in results.measurements
        if (measurement.task, measurement.metric) == (GENERAL_TASK, BITS_PER_BYTE)
    )
    index_by_id = {item: index for index, item in enumerate(general.ids)}
    return select_items(general, [index_by_id[text.id] for text in items.general_texts])


def select_curve_items(session: Session, items: EvalItems) -> EvalItems:
    """Return the random subset that the curve is measured on."""
    tokenize = session.renderer.encode_text
    held_out_texts = {
        role: sample_texts(texts, tokenize, MAX_TOKENS)
        for role, texts in items.held_out_texts.items()
    }
    return dataclasses.replace(
        items,
        eval_documents=_select_documents(items.eval_documents),
        general_texts=sample_texts(items.general_texts, tokenize, MAX_TOKENS),
        held_out_texts=held_out_texts,
    )


def _select_documents(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Return the documents of random rows up to MAX_ROW_TOKENS, at least two rows."""
    rows: dict[str, list[Document]] = {}
    for document in documents:
        rows.setdefault(document.id, []).append(document)
    row_ids = list(rows)
    chosen: set[str] = set()
    remaining_tokens = MAX_ROW_TOKENS
    for index in permute_rows(0, 0, len(rows)).tolist():
        if remaining_tokens <= 0 and len(chosen) > 1:
            break
        row = row_ids[index]
        chosen.add(row)
        remaining_tokens -= sum(len(document) for document in rows[row])
    selected: list[Document] = []
    for row, row_documents in rows.items():
        if row in chosen:
            selected += row_documents
    return tuple(selected)
