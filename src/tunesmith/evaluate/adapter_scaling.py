"""Gain against forgetting: the trained adapter scaled down, which costs no training.

    held-out loss on eval_data and bits per byte of general text, at 0 (the base), 0.25, 0.5, 0.75 and 1 (as trained)

In: a Workbench after training. Out: a ScalePoint each, all on the same items: a part of them, drawn
by chance, since a curve takes five times what a value takes. Of general text the ends are known:
what was measured before and after. `test_data` is not read. Left out: which scale is offered
(tradeoff.py), and full fine-tuning, which has no adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Document, ScalePoint
from tunesmith.data.sampler import permutation
from tunesmith.evaluate.general_text import sample_texts
from tunesmith.evaluate.items import EvalItems
from tunesmith.evaluate.measure import measure_eval_loss, measure_general_text
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import EvalResults, MetricValues, compute_score, select_items
from tunesmith.model.adapters import scaled_adapter
from tunesmith.session.session import Session

ADAPTER_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_TOKENS = 4096  # of held-out rows, and of general text, read at each scale


def measure_scale_curve(
    session: Session, items: EvalItems, *, step: int, before: EvalResults, after: EvalResults
) -> tuple[ScalePoint, ...]:
    """Nothing without an adapter, or without `eval_data`. `before` is of the base, unless the
    adapter is one that went on."""
    if session.plan.config.method == "full" or not (
        items.eval_documents or "eval_data" in items.held_out_texts
    ):
        return ()
    session.model.network.eval()
    items = select_curve_items(session, items)
    end_results = {1.0: after} if session.inputs.adapter else {0.0: before, 1.0: after}
    points: list[ScalePoint] = []
    for scale in log_progress(ADAPTER_SCALES, len(ADAPTER_SCALES), "scales of the adapter"):
        with scaled_adapter(session.model.network, scale):
            gain = compute_score(measure_eval_loss(session, items), step=step)
            general = (
                _measure_general(session, items, end_results.get(scale))
                if items.general_texts
                else None
            )
        points.append(
            ScalePoint(scale, gain, compute_score(general, step=step) if general else None)
        )
    return tuple(points)


def _measure_general(
    session: Session, items: EvalItems, results: EvalResults | None
) -> MetricValues:
    """`known`: what was measured of these texts, among others."""
    if results is None:
        return measure_general_text(session, items.general_texts)
    general = next(
        measurement
        for measurement in results.measurements
        if (measurement.task, measurement.metric) == (GENERAL_TASK, BITS_PER_BYTE)
    )
    index_by_id = {item: index for index, item in enumerate(general.ids)}
    return select_items(general, [index_by_id[text.id] for text in items.general_texts])


def select_curve_items(session: Session, items: EvalItems) -> EvalItems:
    """Those that the curve is measured on."""
    tokens = session.renderer.encode_text
    held_out = {
        role: sample_texts(texts, tokens, MAX_TOKENS)
        for role, texts in items.held_out_texts.items()
    }
    texts = sample_texts(items.general_texts, tokens, MAX_TOKENS)
    return dataclasses.replace(
        items,
        eval_documents=_select_documents(items.eval_documents),
        general_texts=texts,
        held_out_texts=held_out,
    )


def _select_documents(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Whole rows, at least two."""
    rows: dict[str, list[Document]] = {}
    for document in documents:
        rows.setdefault(document.id, []).append(document)
    chosen_rows, remaining_tokens = list[str](), MAX_TOKENS
    for index in permutation(0, 0, len(rows)).tolist():
        if remaining_tokens <= 0 and len(chosen_rows) > 1:
            break
        chosen_rows.append(list(rows)[index])
        remaining_tokens -= sum(len(document) for document in rows[chosen_rows[-1]])
    return tuple(document for row in rows if row in chosen_rows for document in rows[row])
