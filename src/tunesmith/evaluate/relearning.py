"""Whether what general text lost is gone, or only pushed aside: the same texts again, after others of their domain.

A model that has lost a domain is worse in the middle of such text, too. One that has only learnt to expect something
else sees from a few texts where it is, and finds the next one as likely as before its training. So each text is
measured by itself and after SHOTS others of its domain, by the model before and by the trained one: paired by text,
nothing is trained. Left out: which domains are asked about (measure.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.core.types import Document
from tunesmith.evaluate.general_text import GeneralText, TextTokens
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel

SHOTS = 2


def after_shots(
    model: LanguageModel, texts: Sequence[GeneralText], text_tokens: TextTokens, *, shots: int, window: int, task: str
) -> Measurement:
    """Bits per byte of each text after `shots` others, the next ones of the list; the same targets for any number of
    them. What does not fit into `window` is left out: of the shots their beginning, of the text its end."""
    tokens = [list(text_tokens(text.text))[:window] for text in texts]
    documents = [_document(texts, tokens, place, shots, window) for place in range(len(texts))]
    found = {place: nats for place, nats, _ in negative_log_likelihoods(model, documents, window)}
    bits = {place: nats / math.log(2) / len(texts[place].text.encode()) for place, nats in found.items()}
    ids = tuple(texts[place].id for place in sorted(bits))
    return Measurement(task, BITS_PER_BYTE, ids, tuple(bits[place] for place in sorted(bits)), higher_is_better=False)


def _document(
    texts: Sequence[GeneralText], tokens: Sequence[Sequence[int]], place: int, shots: int, window: int
) -> Document:
    own = tokens[place]
    others = [token for shot in range(1, shots + 1) for token in tokens[(place + shot) % len(texts)]]
    before = others[max(0, len(others) + len(own) - window) :]
    weights_L = np.zeros(len(before) + len(own), np.float32)
    weights_L[len(before) + 1 :] = 1
    return Document(texts[place].id, np.array([*before, *own], np.int32), weights_L)
