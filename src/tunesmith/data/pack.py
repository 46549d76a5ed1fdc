"""The documents of one step, laid into packs.

    documents -> packs of at most pack_length fed tokens

Best fit, longest first: each document goes into the pack where it leaves the least room. A document is never split; one
that is longer than `pack_length` gets a pack of its own. Packing changes speed and memory only, never the step.
"""

from __future__ import annotations

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
    packs: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for i in sorted(range(len(documents)), key=lambda i: -lengths[i]):
        fitting = bisect_left(room, (lengths[i], 0))
        if fitting < len(room):
            left, pack = room.pop(fitting)
        else:
            left, pack = pack_length, len(packs)
            packs.append([])
        packs[pack].append(documents[i])
        if left > lengths[i]:
            insort(room, (left - lengths[i], pack))
    return [Pack(tuple(pack)) for pack in packs]
