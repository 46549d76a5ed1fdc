"""What the proof looks at: a few real documents, and what the stock model says to each.

In: documents of the first rows. Out: a `Probe`, and packs of its documents. Left out: what is
claimed about them (preflight.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tunesmith.core.types import Batch, Document, PackLayout
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_input_tokens, pack_step
from tunesmith.data.prefix_sharing import group_by_prefix

# the shortest of the probe: enough to see a leak or wrong labels, in seconds
MAX_PACKED_DOCUMENTS = 3
# of each of them are enough to see whether documents see each other; no whole block of a kernel
ISOLATION_TOKENS = 72
FORK_TOKENS = 40  # before and behind the places where branches part, for the same
# of a document, from its first token to its last: their logits are compared
MAX_CHECKED_POSITIONS = 64


@dataclass(frozen=True, eq=False)
class WindowedText:
    """A text, and the windows that are trained of it."""

    document: Document
    windows: tuple[Document, ...]


class TokenIdCheck(NamedTuple):
    """Whether a row has the ids that transformers gives it: all (`whole`), or those of its prompts
    as served."""

    row_id: str
    is_equal: bool
    is_full_row: bool = True


@dataclass(frozen=True, eq=False)
class PreflightSamples:
    """A few real documents, what the stock model says to each (logits [P, V] at its
    `checked_places`), the ids of end tokens and what of rows' ids was compared. `texts`: of
    continued pretraining."""

    documents: tuple[Document, ...]
    reference_logits: tuple[Tensor, ...]
    end_ids: frozenset[int]
    token_id_checks: tuple[TokenIdCheck, ...] = ()
    sharing_documents: tuple[
        Document, ...
    ] = ()  # two or three that begin alike and go on apart; none where nothing is shared
    texts: tuple[WindowedText, ...] | None = None


def choose_documents(candidates: Sequence[Document], window: int | None) -> tuple[Document, ...]:
    """The shortest, two between and the longest, shortest first; of rejected answers the shortest
    and the longest too. With a window, at least one document longer than it (rows are chained when
    none is). A lone document stands twice: blindness takes two."""
    ranked = sorted((document for document in candidates if count_input_tokens(document)), key=len)
    rejected = [document for document in ranked if document.side == "rejected"]
    others = [document for document in ranked if document.side != "rejected"]
    indices = sorted({0, len(others) // 4, len(others) // 2, len(others) - 1}) if others else []
    chosen = [others[index] for index in indices] + [
        rejected[index] for index in {0, len(rejected) - 1} if rejected
    ]
    chosen = sorted(
        (dataclasses.replace(document, side="") for document in chosen), key=len
    )  # to be packed one by one
    if window and ranked and all(count_input_tokens(document) <= window for document in chosen):
        chosen.append(_chain_documents(ranked, window + 1 + len(ranked[0])))
    return tuple(chosen * 2 if len(chosen) == 1 else chosen)


def choose_sharing_documents(candidates: Sequence[Document]) -> tuple[Document, ...]:
    """The shortest that begin alike and go on apart, three or two. If no two of them do, one and
    its like with another end; none when all are too short to share anything."""
    documents = [
        dataclasses.replace(document, side="")
        for document in candidates
        if count_input_tokens(document)
    ]
    order, _ = group_by_prefix(
        [document.tokens_L[: count_input_tokens(document)] for document in documents],
        [(index,) for index in range(len(documents))],
    )
    ranked = [documents[index] for (index,) in order]
    groups = [
        ranked[i : i + size]
        for size in (MAX_PACKED_DOCUMENTS, 2)
        for i in range(len(ranked) - size + 1)
    ]
    groups.sort(key=lambda group: (-len(group), sum(map(len, group))))
    groups += [[longest, _change_ending(longest)] for longest in sorted(documents, key=len)[-1:]]
    return next(
        (tuple(group) for group in groups if find_siblings(pack_with_sharing(group).layout)), ()
    )


def _change_ending(document: Document) -> Document:
    half = len(document) // 2
    tokens_L = np.concatenate([document.tokens_L[:half], np.roll(document.tokens_L[half:], 1)])
    return dataclasses.replace(document, tokens_L=tokens_L)


def truncate_to_beginning(document: Document) -> Document:
    """Its first tokens as a document; the last of them is its target."""
    return _target_last_token(document.id, document.tokens_L[: ISOLATION_TOKENS + 1])


def _target_last_token(id: str, tokens_L: np.ndarray) -> Document:
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[-1] = 1
    return Document(id, tokens_L, weights_L)


def choose_positions(document: Document) -> list[int]:
    """Evenly spread over the tokens that are fed, the first and the last among them."""
    return np.unique(
        np.linspace(0, count_input_tokens(document) - 1, MAX_CHECKED_POSITIONS).astype(int)
    ).tolist()


def _chain_documents(documents: Sequence[Document], tokens: int) -> Document:
    """Rows behind one another as one document: only its length matters."""
    repeated = [
        documents[i % len(documents)] for i in range(1 + tokens // max(1, min(map(len, documents))))
    ]
    tokens_L = np.concatenate([document.tokens_L for document in repeated])[:tokens]
    weights_L = np.ones(len(tokens_L), np.float32)
    weights_L[0] = 0
    return Document(f"{documents[0].id} and more", tokens_L, weights_L)


# ---------------------------------------------------------------- packs of them


def find_siblings(layout: PackLayout) -> tuple[int, int] | None:
    """The first two segments that continue the same one."""
    for segment, parent in enumerate(layout.parents):
        if parent >= 0 and parent in layout.parents[:segment]:
            return layout.parents.index(parent), segment
    return None


def pack_documents(documents: Sequence[Document]) -> Batch:
    (pack,) = pack_step(documents, sum(map(len, documents)))
    return collate(pack)


def pack_with_sharing(documents: Sequence[Document]) -> Batch:
    """One pack in which they share what they begin with."""
    (pack,) = pack_step(documents, sum(map(len, documents)), should_share=True)
    return collate(pack)


def trim_to_fork(documents: Sequence[Document]) -> list[Document]:
    """The same documents without what is far from where they part: enough to see whether branches
    see each other."""
    (pack,) = pack_step(documents, sum(map(len, documents)), should_share=True)
    begin, end = (
        max(0, min(pack.prefix_lengths[1:]) - FORK_TOKENS),
        max(pack.prefix_lengths) + FORK_TOKENS,
    )
    return [
        _target_last_token(
            document.id, document.tokens_L[begin : min(end, count_input_tokens(document)) + 1]
        )
        for document in pack.documents
    ]
