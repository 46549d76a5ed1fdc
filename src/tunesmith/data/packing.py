"""The documents of one step, laid into packs.

    documents -> packs of at most pack_length computed tokens

As few packs as best fit (longest first, each document where it leaves the least room) finds, then
evened out: the largest pack sets the peak of memory, and a small rest multiplies matrices less
well. A document is never split, nor is a pair, whose loss needs both sides; what is longer than
`pack_length` gets a pack of its own. With `share`, documents that begin alike come together, and
what they begin with counts once. Packing changes speed and memory only, never the step."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from tunesmith.core.types import Document, Pack
from tunesmith.data.prefix_sharing import group_by_prefix

# what one more pack costs: two of 1,325 tokens took 10% longer than one of 2,650
PACK_OVERHEAD_TOKENS = 256


def count_input_tokens(document: Document) -> int:
    """How many tokens of a document can matter: those before its last target.

    What comes later cannot influence the loss, and the last target itself is only predicted. 0
    without a target."""
    targets = np.flatnonzero(document.weights_L)
    return int(targets[-1]) if len(targets) else 0


def count_computed_tokens(pack: Pack) -> int:
    """How many tokens a pack feeds, shared ones once."""
    return sum(map(count_input_tokens, pack.documents)) - sum(pack.prefix_lengths)


def group_units(documents: Sequence[Document]) -> list[tuple[int, ...]]:
    """What a pack holds whole, by place: a document, or a pair, which is a chosen side and the
    rejected one behind."""
    units: list[tuple[int, ...]] = []
    for index, document in enumerate(documents):
        previous = documents[index - 1] if index else document
        if (previous.side, document.side) == ("chosen", "rejected") and previous.id == document.id:
            units[-1] = (index - 1, index)
        else:
            units.append((index,))
    return units


def pack_step(
    documents: Sequence[Document], pack_length: int, *, should_share: bool = False
) -> list[Pack]:
    """Pack every document once; within a pack the longest come first, so equal lengths are
    neighbours. With `share` neighbours are documents that begin alike, where that costs less.

    The same documents in the same order give the same packs. Raises ValueError for a document
    without a target, or with a first token that is one, since nothing predicts it."""
    lengths = [count_input_tokens(document) for document in documents]
    for document, length in zip(documents, lengths, strict=True):
        if not length or document.weights_L[0]:
            raise ValueError(
                f"{document.id}: a document needs a target, and its first token cannot be one"
            )
    units = group_units(documents)
    sizes = [sum(lengths[i] for i in unit) for unit in units]
    packs = [
        Pack(tuple(documents[i] for unit in pack for i in units[unit]))
        for pack in _lay_out(sizes, pack_length)
    ]
    return (
        min(packs, _pack_with_prefixes(documents, lengths, pack_length), key=_compute_cost)
        if should_share
        else packs
    )


def compute_saved_share(
    rows: Sequence[Sequence[Document]], batch_size: int, pack_length: int
) -> float:
    """The share of the fed tokens that steps over these rows need not compute when their documents
    share what they begin with. Each row is its documents; the rows stand in the order of a run."""
    saved_tokens = input_tokens = 0
    for first in range(0, max(1, len(rows) - batch_size + 1), batch_size):
        documents = [document for row in rows[first : first + batch_size] for document in row]
        saved_tokens += sum(
            sum(pack.prefix_lengths)
            for pack in pack_step(documents, pack_length, should_share=True)
        )
        input_tokens += sum(map(count_input_tokens, documents))
    return saved_tokens / input_tokens if input_tokens else 0.0


def _compute_cost(packs: Sequence[Pack]) -> int:
    return sum(count_computed_tokens(pack) + PACK_OVERHEAD_TOKENS for pack in packs)


def _lay_out(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Items in as few packs as best fit finds, evened out."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs = _pack_best_fit(longest_first, lengths, pack_length)
    balanced = _balance_packs(longest_first, lengths, len(packs))
    return (
        balanced
        if max((sum(lengths[i] for i in pack) for pack in balanced), default=0) <= pack_length
        else packs
    )


def _pack_with_prefixes(
    documents: Sequence[Document], lengths: Sequence[int], pack_length: int
) -> list[Pack]:
    """Documents with one beginning are an item; of those that do not fit in a pack, as many as
    do."""
    input_tokens = [
        document.tokens_L[:length] for document, length in zip(documents, lengths, strict=True)
    ]
    units = group_units(documents)
    ordered_units, shared_D = group_by_prefix(input_tokens, units)
    shared = [shared_D[unit[0]] for unit in ordered_units]
    items: list[list[int]] = []  # places in the order
    for position, tokens in enumerate(shared):
        if tokens:
            items[-1].append(position)
        else:
            items.append([position])
    new_tokens = [sum(lengths[i] - shared_D[i] for i in unit) for unit in ordered_units]
    items = [part for item in items for part in _split_run(item, new_tokens, shared, pack_length)]
    sizes = [_count_tokens(item, new_tokens, shared) for item in items]
    packs: list[Pack] = []
    for pack in _lay_out(sizes, pack_length):
        document_indices = [
            i for item in pack for position in items[item] for i in ordered_units[position]
        ]
        first_documents = {ordered_units[items[item][0]][0] for item in pack}
        packs.append(
            Pack(
                tuple(documents[i] for i in document_indices),
                tuple(0 if i in first_documents else shared_D[i] for i in document_indices),
            )
        )
    return packs


def _count_tokens(
    positions: Sequence[int], new_tokens: Sequence[int], shared: Sequence[int]
) -> int:
    """Tokens of neighbours: the first has nobody to share with."""
    return shared[positions[0]] + sum(new_tokens[position] for position in positions)


def _split_run(
    positions: list[int], new_tokens: Sequence[int], shared: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Neighbours in stretches of at most `most` tokens each, as few as filling up gives, evened
    out."""
    parts = _fill_parts(positions, new_tokens, shared, max_tokens)
    min_tokens = max(1, _count_tokens(positions, new_tokens, shared) // len(parts))
    while min_tokens < max_tokens:
        middle = (min_tokens + max_tokens) // 2
        if len(_fill_parts(positions, new_tokens, shared, middle)) > len(parts):
            min_tokens = middle + 1
        else:
            max_tokens = middle
    return _fill_parts(positions, new_tokens, shared, max_tokens)


def _fill_parts(
    positions: Sequence[int], new_tokens: Sequence[int], shared: Sequence[int], max_tokens: int
) -> list[list[int]]:
    parts: list[list[int]] = []
    size = 0
    for position in positions:
        size += new_tokens[position]
        if parts and size <= max_tokens:
            parts[-1].append(position)
        else:
            parts.append([position])
            size = shared[position] + new_tokens[position]
    return parts


def _pack_best_fit(
    longest_first: Sequence[int], lengths: Sequence[int], pack_length: int
) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for i in longest_first:
        fitting = bisect_left(room, (lengths[i], 0))
        if fitting < len(room):
            free_tokens, pack = room.pop(fitting)
        else:
            free_tokens, pack = pack_length, len(packs)
            packs.append([])
        packs[pack].append(i)
        if free_tokens > lengths[i]:
            insort(room, (free_tokens - lengths[i], pack))
    return packs


def _balance_packs(
    longest_first: Sequence[int], lengths: Sequence[int], count: int
) -> list[list[int]]:
    """`count` packs, each document into the one that is shortest so far."""
    packs: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, pack) for pack in range(count)]
    for i in longest_first:
        length, pack = heap[0]
        packs[pack].append(i)
        heapq.heapreplace(heap, (length + lengths[i], pack))
    return packs
