"""Whether what general text lost is gone, or only pushed aside: the same texts again, after others
of their domain.

A model that has lost a domain is worse in the middle of such text, too. One that has only learnt to
expect something else sees from a few texts where it is, and finds the next one as likely as before
its training. So each text is measured by itself and after SHOTS others of its domain, by the model
before and by the trained one: paired by text, nothing is trained. Left out: which domains are asked
about (measure.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.core.types import Document
from tunesmith.evaluate.general_text import GeneralText, TokenizeFn
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM

NUM_SHOTS = 2


def measure_after_shots(
    model: PackedCausalLM,
    texts: Sequence[GeneralText],
    tokenize: TokenizeFn,
    *,
    shots: int,
    window: int,
    task: str,
) -> MetricValues:
    """Bits per byte of each text after `shots` others, the next ones of the list; the same targets
    for any number of them. What does not fit into `window` is left out: of the shots their
    beginning, of the text its end."""
    tokens = [list(tokenize(text.text))[:window] for text in texts]
    documents = [
        _build_document(texts, tokens, index, shots, window) for index in range(len(texts))
    ]
    nats_by_index = {index: nats for index, nats, _ in compute_nll(model, documents, window)}
    bits_by_index = {
        index: nats / math.log(2) / len(texts[index].text.encode())
        for index, nats in nats_by_index.items()
    }
    ids = tuple(texts[index].id for index in sorted(bits_by_index))
    return MetricValues(
        task,
        BITS_PER_BYTE,
        ids,
        tuple(bits_by_index[index] for index in sorted(bits_by_index)),
        higher_is_better=False,
    )


def _build_document(
    texts: Sequence[GeneralText],
    tokens: Sequence[Sequence[int]],
    index: int,
    shots: int,
    window: int,
) -> Document:
    target_tokens = tokens[index]
    shot_tokens = [
        token for shot in range(1, shots + 1) for token in tokens[(index + shot) % len(texts)]
    ]
    context = shot_tokens[max(0, len(shot_tokens) + len(target_tokens) - window) :]
    weights_L = np.zeros(len(context) + len(target_tokens), np.float32)
    weights_L[len(context) + 1 :] = 1
    return Document(texts[index].id, np.array([*context, *target_tokens], np.int32), weights_L)
