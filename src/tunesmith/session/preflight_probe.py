"""What the proof looks at: a few real documents, and what the stock model says to each.

In: documents of the first rows. Out: a `Probe`, and packs of its documents. Left out: what is claimed about them
(preflight.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tunesmith.core.types import Batch, Document, Layout
from tunesmith.data.collate import collate
from tunesmith.data.packing import fed_tokens, pack_step
from tunesmith.data.prefix_sharing import begin_alike

PACKED_DOCUMENTS = 3  # the shortest of the probe: enough to see a leak or wrong labels, in seconds
BLIND_TOKENS = 72  # of each of them are enough to see whether documents see each other; no whole block of a kernel
FORK_TOKENS = 40  # before and behind the places where branches part, for the same
CHECKED_PLACES = 64  # of a document, from its first token to its last: their logits are compared


@dataclass(frozen=True, eq=False)
class Cut:
    """A text, and the windows that are trained of it."""

    whole: Document
    windows: tuple[Document, ...]


class StockIds(NamedTuple):
    """Whether a row has the ids that transformers gives it: all (`whole`), or those of its prompts as served."""

    row: str
    equal: bool
    whole: bool = True


@dataclass(frozen=True, eq=False)
class Probe:
    """A few real documents, what the stock model says to each (logits [P, V] at its `checked_places`), the ids of end
    tokens and what of rows' ids was compared. `texts`: of continued pretraining."""

    documents: tuple[Document, ...]
    stock_logits: tuple[Tensor, ...]
    end_ids: frozenset[int]
    stock_ids: tuple[StockIds, ...] = ()
    alike: tuple[Document, ...] = ()  # two or three that begin alike and go on apart; none where nothing is shared
    texts: tuple[Cut, ...] | None = None


def choose_documents(candidates: Sequence[Document], window: int | None) -> tuple[Document, ...]:
    """The shortest, two between and the longest, shortest first; of rejected answers the shortest and the longest too.
    With a window, at least one document longer than it (rows are chained when none is). A lone document stands twice:
    blindness takes two."""
    ranked = sorted((d for d in candidates if fed_tokens(d)), key=len)
    rejected = [d for d in ranked if d.side == "rejected"]
    others = [d for d in ranked if d.side != "rejected"]
    places = sorted({0, len(others) // 4, len(others) // 2, len(others) - 1}) if others else []
    chosen = [others[place] for place in places] + [rejected[place] for place in {0, len(rejected) - 1} if rejected]
    chosen = sorted((dataclasses.replace(d, side="") for d in chosen), key=len)  # to be packed one by one
    if window and ranked and all(fed_tokens(d) <= window for d in chosen):
        chosen.append(_chained(ranked, window + 1 + len(ranked[0])))
    return tuple(chosen * 2 if len(chosen) == 1 else chosen)


def choose_alike(candidates: Sequence[Document]) -> tuple[Document, ...]:
    """The shortest that begin alike and go on apart, three or two. If no two of them do, one and its like with another
    end; none when all are too short to share anything."""
    real = [dataclasses.replace(d, side="") for d in candidates if fed_tokens(d)]
    order, _ = begin_alike([d.tokens_L[: fed_tokens(d)] for d in real], [(place,) for place in range(len(real))])
    ranked = [real[place] for (place,) in order]
    groups = [ranked[i : i + size] for size in (PACKED_DOCUMENTS, 2) for i in range(len(ranked) - size + 1)]
    groups.sort(key=lambda group: (-len(group), sum(map(len, group))))
    groups += [[longest, _other_end(longest)] for longest in sorted(real, key=len)[-1:]]
    return next((tuple(group) for group in groups if siblings(forest_of(group).layout)), ())


def _other_end(document: Document) -> Document:
    half = len(document) // 2
    tokens_L = np.concatenate([document.tokens_L[:half], np.roll(document.tokens_L[half:], 1)])
    return dataclasses.replace(document, tokens_L=tokens_L)


def beginning(document: Document) -> Document:
    """Its first tokens as a document; the last of them is its target."""
    return _ends_in_target(document.id, document.tokens_L[: BLIND_TOKENS + 1])


def _ends_in_target(id: str, tokens_L: np.ndarray) -> Document:
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[-1] = 1
    return Document(id, tokens_L, weights_L)


def checked_places(document: Document) -> list[int]:
    """Evenly spread over the tokens that are fed, the first and the last among them."""
    return np.unique(np.linspace(0, fed_tokens(document) - 1, CHECKED_PLACES).astype(int)).tolist()


def _chained(documents: Sequence[Document], tokens: int) -> Document:
    """Rows behind one another as one document: only its length matters."""
    repeated = [documents[i % len(documents)] for i in range(1 + tokens // max(1, min(map(len, documents))))]
    tokens_L = np.concatenate([d.tokens_L for d in repeated])[:tokens]
    weights_L = np.ones(len(tokens_L), np.float32)
    weights_L[0] = 0
    return Document(f"{documents[0].id} and more", tokens_L, weights_L)


# ---------------------------------------------------------------- packs of them


def siblings(layout: Layout) -> tuple[int, int] | None:
    """The first two segments that continue the same one."""
    for other, parent in enumerate(layout.parents):
        if parent >= 0 and parent in layout.parents[:other]:
            return layout.parents.index(parent), other
    return None


def one_pack(documents: Sequence[Document]) -> Batch:
    (pack,) = pack_step(documents, sum(map(len, documents)))
    return collate(pack)


def forest_of(documents: Sequence[Document]) -> Batch:
    """One pack in which they share what they begin with."""
    (pack,) = pack_step(documents, sum(map(len, documents)), share=True)
    return collate(pack)


def near_the_fork(documents: Sequence[Document]) -> list[Document]:
    """The same documents without what is far from where they part: enough to see whether branches see each other."""
    (pack,) = pack_step(documents, sum(map(len, documents)), share=True)
    begin, end = max(0, min(pack.shared[1:]) - FORK_TOKENS), max(pack.shared) + FORK_TOKENS
    return [_ends_in_target(d.id, d.tokens_L[begin : min(end, fed_tokens(d)) + 1]) for d in pack.documents]
