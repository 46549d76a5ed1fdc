"""The documents of one step, laid into packs.

    documents -> packs of at most pack_length computed tokens

As few packs as best fit (longest first, each document where it leaves the least room) finds, then evened out: the
largest pack sets the peak of memory, and a small rest multiplies matrices less well. A document is never split, nor is
a pair, whose loss needs both sides; what is longer than `pack_length` gets a pack of its own. With `share`, documents
that begin alike come together, and what they begin with counts once. Packing changes speed and memory only, never the
step.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from tunesmith.core.types import Document, Pack
from tunesmith.data.prefix_sharing import begin_alike

PACK_TOKENS = 256  # what one more pack costs: two of 1,325 tokens took 10% longer than one of 2,650


def fed_tokens(document: Document) -> int:
    """How many tokens of a document can matter: those before its last target.

    What comes later cannot influence the loss, and the last target itself is only predicted. 0 without a target.
    """
    targets = np.flatnonzero(document.weights_L)
    return int(targets[-1]) if len(targets) else 0


def computed_tokens(pack: Pack) -> int:
    """How many tokens a pack feeds, shared ones once."""
    return sum(map(fed_tokens, pack.documents)) - sum(pack.shared)


def units(documents: Sequence[Document]) -> list[tuple[int, ...]]:
    """What a pack holds whole, by place: a document, or a pair, which is a chosen side and the rejected one behind."""
    found: list[tuple[int, ...]] = []
    for place, document in enumerate(documents):
        before = documents[place - 1] if place else document
        if (before.side, document.side) == ("chosen", "rejected") and before.id == document.id:
            found[-1] = (place - 1, place)
        else:
            found.append((place,))
    return found


def pack_step(documents: Sequence[Document], pack_length: int, *, share: bool = False) -> list[Pack]:
    """Pack every document once; within a pack the longest come first, so equal lengths are neighbours. With `share`
    neighbours are documents that begin alike, where that costs less.

    The same documents in the same order give the same packs. Raises ValueError for a document without a target, or
    with a first token that is one, since nothing predicts it.
    """
    lengths = [fed_tokens(document) for document in documents]
    for document, length in zip(documents, lengths, strict=True):
        if not length or document.weights_L[0]:
            raise ValueError(f"{document.id}: a document needs a target, and its first token cannot be one")
    whole = units(documents)
    sizes = [sum(lengths[i] for i in unit) for unit in whole]
    packs = [Pack(tuple(documents[i] for unit in pack for i in whole[unit])) for pack in _laid(sizes, pack_length)]
    return min(packs, _sharing(documents, lengths, pack_length), key=_cost) if share else packs


def saved_share(rows: Sequence[Sequence[Document]], batch_size: int, pack_length: int) -> float:
    """The share of the fed tokens that steps over these rows need not compute when their documents share what they
    begin with. Each row is its documents; the rows stand in the order of a run."""
    saved = fed = 0
    for first in range(0, max(1, len(rows) - batch_size + 1), batch_size):
        documents = [document for row in rows[first : first + batch_size] for document in row]
        saved += sum(sum(pack.shared) for pack in pack_step(documents, pack_length, share=True))
        fed += sum(map(fed_tokens, documents))
    return saved / fed if fed else 0.0


def _cost(packs: Sequence[Pack]) -> int:
    return sum(computed_tokens(pack) + PACK_TOKENS for pack in packs)


def _laid(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Items in as few packs as best fit finds, evened out."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs = _best_fit(longest_first, lengths, pack_length)
    even = _even(longest_first, lengths, len(packs))
    return even if max((sum(lengths[i] for i in pack) for pack in even), default=0) <= pack_length else packs


def _sharing(documents: Sequence[Document], lengths: Sequence[int], pack_length: int) -> list[Pack]:
    """Documents with one beginning are an item; of those that do not fit in a pack, as many as do."""
    fed = [document.tokens_L[:length] for document, length in zip(documents, lengths, strict=True)]
    whole = units(documents)
    order, shared_D = begin_alike(fed, whole)
    shared = [shared_D[unit[0]] for unit in order]
    items: list[list[int]] = []  # places in the order
    for place, tokens in enumerate(shared):
        if tokens:
            items[-1].append(place)
        else:
            items.append([place])
    new = [sum(lengths[i] - shared_D[i] for i in unit) for unit in order]
    items = [part for item in items for part in _cut(item, new, shared, pack_length)]
    sizes = [_size(item, new, shared) for item in items]
    packs: list[Pack] = []
    for pack in _laid(sizes, pack_length):
        held = [i for item in pack for place in items[item] for i in order[place]]
        first = {order[items[item][0]][0] for item in pack}
        packs.append(Pack(tuple(documents[i] for i in held), tuple(0 if i in first else shared_D[i] for i in held)))
    return packs


def _size(places: Sequence[int], new: Sequence[int], shared: Sequence[int]) -> int:
    """Tokens of neighbours: the first has nobody to share with."""
    return shared[places[0]] + sum(new[place] for place in places)


def _cut(places: list[int], new: Sequence[int], shared: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours in stretches of at most `most` tokens each, as few as filling up gives, evened out."""
    parts = _filled(places, new, shared, most)
    low = max(1, _size(places, new, shared) // len(parts))
    while low < most:
        middle = (low + most) // 2
        if len(_filled(places, new, shared, middle)) > len(parts):
            low = middle + 1
        else:
            most = middle
    return _filled(places, new, shared, most)


def _filled(places: Sequence[int], new: Sequence[int], shared: Sequence[int], most: int) -> list[list[int]]:
    parts: list[list[int]] = []
    size = 0
    for place in places:
        size += new[place]
        if parts and size <= most:
            parts[-1].append(place)
        else:
            parts.append([place])
            size = shared[place] + new[place]
    return parts


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
