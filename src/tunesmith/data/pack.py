"""The documents of one step, laid into packs.

    documents -> packs of at most pack_length fed tokens

As few packs as best fit (longest first, each document where it leaves the least room) finds, then evened out: the
largest pack sets the peak of memory, and a small rest multiplies matrices less well. A document is never split; one
that is longer than `pack_length` gets a pack of its own. Packing changes speed and memory only, never the step.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from tunesmith.types import Document, Pack


def fed_tokens(document: Document) -> int:
    """How many tokens of a document can matter: those before its last target.

    What comes later cannot influence the loss, and the last target itself is only predicted. 0 without a target.
    """
    targets = np.flatnonzero(document.weights_L)
    return int(targets[-1]) if len(targets) else 0


def pack_step(documents: Sequence[Document], pack_length: int) -> list[Pack]:
    """Pack every document once; within a pack the longest come first, so equal lengths are neighbours.

    The same documents in the same order give the same packs. Raises ValueError for a document without a target, or
    with a first token that is one, since nothing predicts it.
    """
    lengths = [fed_tokens(document) for document in documents]
    for document, length in zip(documents, lengths, strict=True):
        if not length or document.weights_L[0]:
            raise ValueError(f"{document.id}: a document needs a target, and its first token cannot be one")
    longest_first = sorted(range(len(documents)), key=lambda i: -lengths[i])
    packs = _best_fit(longest_first, lengths, pack_length)
    even = _even(longest_first, lengths, len(packs))
    if max((sum(lengths[i] for i in pack) for pack in even), default=0) <= pack_length:
        packs = even
    return [Pack(tuple(documents[i] for i in pack)) for pack in packs]


def _best_fit(longest_first: Sequence[int], lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for i in longest_first:
        fitting = bisect_left(room, (lengths[i], 0))
        if fitting < len(room):
            left, pack = room.pop(fitting)
        else:
            left, pack = pack_length, len(packs)
            packs.append([])
        packs[pack].append(i)
        if left > lengths[i]:
            insort(room, (left - lengths[i], pack))
    return packs


def _even(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` packs, each document into the one that is shortest so far."""
    packs: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, pack) for pack in range(count)]
    for i in longest_first:
        length, pack = filled[0]
        packs[pack].append(i)
        heapq.heapreplace(filled, (length + lengths[i], pack))
    return packs
