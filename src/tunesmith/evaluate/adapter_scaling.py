"""Gain against forgetting: the trained adapter scaled down, which costs no training.

    held-out loss on eval_data and bits per byte of general text, at 0 (the base), 0.25, 0.5, 0.75 and 1 (as trained)

In: a Workbench after training. Out: a ScalePoint each, all on the same items: a part of them, drawn by chance, since a
curve takes five times what a value takes. Of general text the ends are known: what was measured before and after.
`test_data` is not read. Left out: which scale is offered (tradeoff.py), and full fine-tuning, which has no adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tunesmith.core.events import GENERAL
from tunesmith.core.progress_log import watched
from tunesmith.core.types import Document, ScalePoint
from tunesmith.data.sampler import order
from tunesmith.evaluate.general_text import chosen_texts
from tunesmith.evaluate.measure import Items, eval_measurement, general_measurement
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.pairing import only
from tunesmith.evaluate.results import Measured, Measurement, score
from tunesmith.model.adapters import adapter_scaled
from tunesmith.session.session import Workbench

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS = 4096  # of held-out rows, and of general text, read at each scale


def scale_curve(
    bench: Workbench, items: Items, *, step: int, before: Measured, after: Measured
) -> tuple[ScalePoint, ...]:
    """Nothing without an adapter, or without `eval_data`. `before` is of the base, unless the adapter is one that went
    on."""
    if bench.plan["method"] == "full" or not (items.eval_documents or "eval_data" in items.held_out):
        return ()
    bench.model.network.eval()
    items = few(bench, items)
    ends = {1.0: after} if bench.facts.adapter else {0.0: before, 1.0: after}
    points: list[ScalePoint] = []
    for scale in watched(SCALES, len(SCALES), "scales of the adapter"):
        with adapter_scaled(bench.model.network, scale):
            gain = score(eval_measurement(bench, items), step=step)
            general = _general(bench, items, ends.get(scale)) if items.texts else None
        points.append(ScalePoint(scale, gain, score(general, step=step) if general else None))
    return tuple(points)


def _general(bench: Workbench, items: Items, known: Measured | None) -> Measurement:
    """`known`: what was measured of these texts, among others."""
    if known is None:
        return general_measurement(bench, items.texts)
    whole = next(one for one in known.measurements if (one.task, one.metric) == (GENERAL, BITS_PER_BYTE))
    places = {item: place for place, item in enumerate(whole.ids)}
    return only(whole, [places[text.id] for text in items.texts])


def few(bench: Workbench, items: Items) -> Items:
    """Those that the curve is measured on."""
    tokens = bench.renderer.text_tokens
    held_out = {role: chosen_texts(texts, tokens, TOKENS) for role, texts in items.held_out.items()}
    texts = chosen_texts(items.texts, tokens, TOKENS)
    return dataclasses.replace(items, eval_documents=_some(items.eval_documents), texts=texts, held_out=held_out)


def _some(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Whole rows, at least two."""
    rows: dict[str, list[Document]] = {}
    for document in documents:
        rows.setdefault(document.id, []).append(document)
    taken, left = list[str](), TOKENS
    for place in order(0, 0, len(rows)).tolist():
        if left <= 0 and len(taken) > 1:
            break
        taken.append(list(rows)[place])
        left -= sum(len(document) for document in rows[taken[-1]])
    return tuple(document for row in rows if row in taken for document in rows[row])
