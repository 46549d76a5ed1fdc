"""What the model still knows of general text: bits per byte, by domain, and how far it is from its base there.

In: rows {"text": ..., "domain": ...}. Out: a Measurement with a value for every text: the bits that the model needs for
its tokens, over its UTF-8 bytes. The result is the mean over domains, so that a small domain is not hidden by a large
one. Every token but the first of a text is a target; no end token is added. Unlike a loss per token, bits per byte can
be compared between tokenizers. Left out: which loss is too much (the plan's gate).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL
from tunesmith.core.types import Document, Row
from tunesmith.data.sampler import order
from tunesmith.data.windows import window, window_counts
from tunesmith.evaluate.kl_divergence import Base, Moved, joined, measurements, moved
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel

TextTokens = Callable[[str], Sequence[int]]


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
                "a row of general text needs a `text`, and its `domain` is a string", where=row.id, fix=fix
            )
        texts.append(GeneralText(row.id, text, domain))
    return tuple(texts)


def chosen_texts(texts: Sequence[GeneralText], text_tokens: TextTokens, most: int) -> tuple[GeneralText, ...]:
    """About `most` tokens of them, one of each domain in turn and by chance within it, at least two of each; all of
    them where they have no more. They stay in their order."""
    by_domain: dict[str, list[int]] = {}
    for place in order(0, 0, len(texts)).tolist():
        by_domain.setdefault(texts[place].domain, []).append(place)
    taken, left = set[int](), most
    for turn, places in enumerate(itertools.zip_longest(*by_domain.values())):
        if turn > 1 and left <= 0:
            break
        for place in places:
            if place is not None and (turn < 2 or left > 0):
                taken.add(place)
                left -= len(text_tokens(texts[place].text))
    return tuple(text for place, text in enumerate(texts) if place in taken)


def retention(
    model: LanguageModel,
    texts: Sequence[GeneralText],
    text_tokens: TextTokens,
    *,
    window: int,
    task: str = GENERAL,
) -> Measurement:
    """Bits per byte of each text. `window`: a longer text is read in pieces of so many tokens, each blind to those
    before it. A text of a single token has nothing to predict and is left out."""
    documents, owners = pieces_of(texts, text_tokens, window)
    nats: dict[int, float] = {}
    for place, nat, _ in sorted(negative_log_likelihoods(model, documents, window)):
        nats[owners[place]] = nats.get(owners[place], 0.0) + nat
    return _bits(texts, nats, task)


def retention_beside(
    model: LanguageModel,
    texts: Sequence[GeneralText],
    text_tokens: TextTokens,
    base: Base,
    *,
    window: int,
    task: str = GENERAL,
) -> tuple[Measurement, ...]:
    """Bits per byte, and beside the base: KL in nats a token, and how often the likeliest token is the same."""
    documents, owners = pieces_of(texts, text_tokens, window)
    parts: dict[int, list[Moved]] = {}
    for place, found in sorted(moved(model, documents, window, base)):
        parts.setdefault(owners[place], []).append(found)
    whole = {owner: joined(found) for owner, found in parts.items()}
    bits = _bits(texts, {owner: found.nats for owner, found in whole.items()}, task)
    return bits, *measurements(task, bits.ids, list(whole.values()), bits.groups)


def pieces_of(texts: Sequence[GeneralText], text_tokens: TextTokens, window: int) -> tuple[list[Document], list[int]]:
    """The texts in windows, and of each window the place of its text."""
    pieces = [windows(text.id, text_tokens(text.text), window) for text in texts]
    owners = [place for place, found in enumerate(pieces) for _ in found]
    return [piece for found in pieces for piece in found], owners


def _bits(texts: Sequence[GeneralText], nats: Mapping[int, float], task: str) -> Measurement:
    measured = [(texts[i], nat / math.log(2) / len(texts[i].text.encode())) for i, nat in nats.items()]
    return Measurement(
        task=task,
        metric=BITS_PER_BYTE,
        ids=tuple(text.id for text, _ in measured),
        values=tuple(value for _, value in measured),
        groups=tuple(text.domain for text, _ in measured),
        higher_is_better=False,
    )


def windows(row: str, tokens: Sequence[int], length: int) -> list[Document]:
    """A text in even pieces of at most `length` fed tokens. Each begins with the last token of the one before: every
    token but the very first is a target once."""
    if len(tokens) < 2:
        return []
    weights_L = np.ones(len(tokens), dtype=np.float32)
    weights_L[0] = 0
    whole = Document(row, np.array(tokens, dtype=np.int32), weights_L)
    return [window(whole, length, number) for number in range(int(window_counts(len(tokens), length)))]
