"""Measure general ability: bits per byte of general text by domain, and KL to the base there.

In: rows {"text": ..., "domain": ...}. Out: MetricValues with a value per text: the bits that the
model needs for its tokens, divided by its UTF-8 bytes. The score is the mean over domains, so that
a large domain does not hide a small one. Every token but the first of a text is a target; no EOS is
added. Unlike a loss per token, bits per byte are comparable between tokenizers.
Left out: how much forgetting is too much (regression_gate.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.types import Document, Row
from tunesmith.data.pretraining import count_windows, cut_window
from tunesmith.data.sampler import permute_rows
from tunesmith.evaluate.kl_divergence import (
    BaseReference,
    KLResult,
    build_kl_measurements,
    compute_kl,
    sum_results,
)
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM

TokenizeFn = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class GeneralText:
    id: str
    text: str
    domain: str


def read_texts(rows: Iterable[Row]) -> tuple[GeneralText, ...]:
    """Return the rows as texts. Raises InputError with the id of a row without text."""
    texts: list[GeneralText] = []
    for row in rows:
        text = row.data.get("text")
        domain = row.data.get("domain", "general")
        if not isinstance(text, str) or not text or not isinstance(domain, str):
            fix = 'write {"text": "...", "domain": "..."}'
            message = "a row of general text needs a `text` string; its `domain` is a string, too"
            raise InputError(message, where=row.id, fix=fix)
        texts.append(GeneralText(row.id, text, domain))
    return tuple(texts)


def sample_texts(
    texts: Sequence[GeneralText], tokenize: TokenizeFn, max_tokens: int
) -> tuple[GeneralText, ...]:
    """Return a random sample of about `max_tokens`, in the original order.

    Domains take turns, so each has about as many texts, and at least two.
    """
    by_domain: dict[str, list[int]] = {}
    for index in permute_rows(0, 0, len(texts)).tolist():
        by_domain.setdefault(texts[index].domain, []).append(index)
    chosen: set[int] = set()
    remaining = max_tokens
    for turn, indices in enumerate(itertools.zip_longest(*by_domain.values())):
        if turn > 1 and remaining <= 0:
            break
        for index in indices:
            if index is not None and (turn < 2 or remaining > 0):
                chosen.add(index)
                remaining -= len(tokenize(texts[index].text))
    return tuple(text for index, text in enumerate(texts) if index in chosen)


def measure_bits_per_byte(
    model: PackedCausalLM,
    texts: Sequence[GeneralText],
    tokenize: TokenizeFn,
    *,
    window: int,
    task: str = GENERAL_TASK,
) -> MetricValues:
    """Return bits per byte of each text.

    A text longer than `window` tokens is split, and its windows do not see each other. A text of a
    single token has nothing to predict and is left out.
    """
    documents, text_indices = split_texts(texts, tokenize, window)
    nats: dict[int, float] = {}
    for index, nat, _ in sorted(compute_nll(model, documents, window)):
        nats[text_indices[index]] = nats.get(text_indices[index], 0.0) + nat
    return _build_bits_measurement(texts, nats, task)


def measure_bits_and_kl(
    model: PackedCausalLM,
    texts: Sequence[GeneralText],
    tokenize: TokenizeFn,
    base: BaseReference,
    *,
    window: int,
) -> tuple[MetricValues, ...]:
    """Return bits per byte, KL(base || tuned) in nats/token, and top-1 agreement with the base."""
    documents, text_indices = split_texts(texts, tokenize, window)
    parts: dict[int, list[KLResult]] = {}
    for index, result in sorted(compute_kl(model, documents, window, base)):
        parts.setdefault(text_indices[index], []).append(result)
    totals = {text_index: sum_results(results) for text_index, results in parts.items()}
    nats = {text_index: total.nats for text_index, total in totals.items()}
    bits = _build_bits_measurement(texts, nats, GENERAL_TASK)
    return bits, *build_kl_measurements(GENERAL_TASK, bits.ids, list(totals.values()), bits.strata)


def split_texts(
    texts: Sequence[GeneralText], tokenize: TokenizeFn, window: int
) -> tuple[list[Document], list[int]]:
    """Return the windows of all texts, and for each window the index of its text."""
    windows: list[Document] = []
    text_indices: list[int] = []
    for index, text in enumerate(texts):
        text_windows = split_windows(text.id, tokenize(text.text), window)
        windows += text_windows
        text_indices += [index] * len(text_windows)
    return windows, text_indices


def _build_bits_measurement(
    texts: Sequence[GeneralText], nats: Mapping[int, float], task: str
) -> MetricValues:
    measured = [texts[index] for index in nats]
    values = tuple(nats[index] / math.log(2) / len(texts[index].text.encode()) for index in nats)
    return MetricValues(
        task=task,
        metric=BITS_PER_BYTE,
        ids=tuple(text.id for text in measured),
        values=values,
        strata=tuple(text.domain for text in measured),
        higher_is_better=False,
    )


def split_windows(row_id: str, tokens: Sequence[int], length: int) -> list[Document]:
    """Split a text evenly into windows of at most `length` input tokens.

    A window starts with the last token of the previous one, so every token but the first of the
    text is a target once.
    """
    if len(tokens) < 2:
        return []
    weights_L = np.ones(len(tokens), dtype=np.float32)
    weights_L[0] = 0
    document = Document(row_id, np.array(tokens, dtype=np.int32), weights_L)
    return [
        cut_window(document, length, index)
        for index in range(int(count_windows(len(tokens), length)))
    ]
