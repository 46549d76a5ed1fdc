"""What the model still knows of general text: bits per byte, by domain, and how far it is from its
base there.

In: rows {"text": ..., "domain": ...}. Out: a Measurement with a value for every text: the bits that
the model needs for its tokens, over its UTF-8 bytes. The result is the mean over domains, so that a
small domain is not hidden by a large one. Every token but the first of a text is a target; no end
token is added. Unlike a loss per token, bits per byte can be compared between tokenizers. Left out:
which loss is too much (the plan's gate)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.types import Document, Row
from tunesmith.data.sampler import permutation
from tunesmith.data.pretraining import count_windows, cut_window
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
    """Raises InputError with the row's id if a row has no text."""
    texts: list[GeneralText] = []
    for row in rows:
        text, domain = row.data.get("text"), row.data.get("domain", "general")
        if not isinstance(text, str) or not text or not isinstance(domain, str):
            fix = 'write {"text": "...", "domain": "..."}'
            raise InputError(
                "a row of general text needs a `text`, and its `domain` is a string",
                where=row.id,
                fix=fix,
            )
        texts.append(GeneralText(row.id, text, domain))
    return tuple(texts)


def sample_texts(
    texts: Sequence[GeneralText], tokenize: TokenizeFn, max_tokens: int
) -> tuple[GeneralText, ...]:
    """About `most` tokens of them, one of each domain in turn and by chance within it, at least two
    of each; all of them where they have no more. They stay in their order."""
    by_domain: dict[str, list[int]] = {}
    for index in permutation(0, 0, len(texts)).tolist():
        by_domain.setdefault(texts[index].domain, []).append(index)
    chosen, remaining = set[int](), max_tokens
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
    """Bits per byte of each text. `window`: a longer text is read in pieces of so many tokens, each
    blind to those before it. A text of a single token has nothing to predict and is left out."""
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
    task: str = GENERAL_TASK,
) -> tuple[MetricValues, ...]:
    """Bits per byte, and beside the base: KL in nats a token, and how often the likeliest token is
    the same."""
    documents, text_indices = split_texts(texts, tokenize, window)
    parts: dict[int, list[KLResult]] = {}
    for index, found in sorted(compute_kl(model, documents, window, base)):
        parts.setdefault(text_indices[index], []).append(found)
    totals = {text_index: sum_results(total) for text_index, total in parts.items()}
    bits = _build_bits_measurement(
        texts, {text_index: found.nats for text_index, found in totals.items()}, task
    )
    return bits, *build_kl_measurements(task, bits.ids, list(totals.values()), bits.groups)


def split_texts(
    texts: Sequence[GeneralText], tokenize: TokenizeFn, window: int
) -> tuple[list[Document], list[int]]:
    """The texts in windows, and of each window the place of its text."""
    pieces = [split_windows(text.id, tokenize(text.text), window) for text in texts]
    text_indices = [index for index, text_pieces in enumerate(pieces) for _ in text_pieces]
    return [piece for text_pieces in pieces for piece in text_pieces], text_indices


def _build_bits_measurement(
    texts: Sequence[GeneralText], nats: Mapping[int, float], task: str
) -> MetricValues:
    text_bits = [
        (texts[i], nat / math.log(2) / len(texts[i].text.encode())) for i, nat in nats.items()
    ]
    return MetricValues(
        task=task,
        metric=BITS_PER_BYTE,
        ids=tuple(text.id for text, _ in text_bits),
        values=tuple(value for _, value in text_bits),
        groups=tuple(text.domain for text, _ in text_bits),
        higher_is_better=False,
    )


def split_windows(row_id: str, tokens: Sequence[int], length: int) -> list[Document]:
    """A text in even pieces of at most `length` fed tokens. Each begins with the last token of the
    one before: every token but the very first is a target once."""
    if len(tokens) < 2:
        return []
    weights_L = np.ones(len(tokens), dtype=np.float32)
    weights_L[0] = 0
    document = Document(row_id, np.array(tokens, dtype=np.int32), weights_L)
    return [
        cut_window(document, length, index)
        for index in range(int(count_windows(len(tokens), length)))
    ]
