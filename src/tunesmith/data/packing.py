"""Pack the documents of one step.

    documents -> packs of at most pack_length computed tokens

Best fit (longest document first, each into the pack where it leaves the least room) finds the
number of packs; then the packs are balanced, since the largest one sets the memory peak and small
matrices multiply less efficiently. A document is never split, nor is a preference pair, whose loss
needs both sides; one longer than `pack_length` gets its own pack. With prefix sharing, documents
with a common prefix come together and the prefix counts once. Packing changes speed and memory,
never the step. Of several ranks each gets documents of about the same cost (`share_out`), which it
packs on its own."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from tunesmith.core.types import Document, Pack
from tunesmith.data.prefix_sharing import group_by_prefix

# Cost of one more pack: two of 1,325 tokens took 10% longer than one of 2,650.
PACK_OVERHEAD_TOKENS = 256
# Documents with a common prefix stay on one rank unless they are more than this share of its work.
MAX_PREFIX_GROUP_SHARE = 0.25


def count_input_tokens(document: Document) -> int:
    """Return the number of tokens before the last target, 0 without a target.

    Later tokens cannot influence the loss, and the last target is only predicted."""
    targets = np.flatnonzero(document.weights_L)
    return int(targets[-1]) if len(targets) else 0


def count_computed_tokens(pack: Pack) -> int:
    """Return the number of tokens that a pack feeds to the model; shared ones count once."""
    return sum(map(count_input_tokens, pack.documents)) - sum(pack.prefix_lengths)


def group_units(documents: Sequence[Document]) -> list[tuple[int, ...]]:
    """Return the units that packing must not split, as indices.

    A unit is a document, or a preference pair: a chosen side followed by its rejected side."""
    units: list[tuple[int, ...]] = []
    for index, document in enumerate(documents):
        previous = documents[index - 1] if index else document
        is_rejected = (previous.side, document.side) == ("chosen", "rejected")
        if is_rejected and previous.id == document.id:
            units[-1] = (index - 1, index)
        else:
            units.append((index,))
    return units


def pack_step(
    documents: Sequence[Document],
    pack_length: int,
    *,
    should_share: bool = False,
    get_group: Callable[[int], Hashable] | None = None,
) -> list[Pack]:
    """Pack every document once, the longest first within a pack.

    With `should_share`, documents with a common prefix are neighbors, if that is cheaper; only
    those share whose `get_group(input tokens)` is equal, as a model's rotary embedding may need.
    Deterministic. Raises ValueError for a document without a target, or with a target as its first
    token, which nothing predicts."""
    lengths = [count_input_tokens(document) for document in documents]
    for document, length in zip(documents, lengths, strict=True):
        if not length or document.weights_L[0]:
            message = "a document needs a target, and its first token cannot be one"
            raise ValueError(f"{document.id}: {message}")
    units = group_units(documents)
    sizes: list[int] = []
    for unit in units:
        sizes.append(sum(lengths[i] for i in unit))
    packs: list[Pack] = []
    for unit_indices in _lay_out(sizes, pack_length):
        indices = [i for unit_index in unit_indices for i in units[unit_index]]
        packs.append(Pack(tuple(documents[i] for i in indices)))
    if should_share:
        shared_packs = _pack_with_prefixes(documents, lengths, pack_length, get_group)
        return min(packs, shared_packs, key=_compute_cost)
    return packs


def share_out(
    documents: Sequence[Document],
    num_ranks: int,
    hidden_size: int,
    *,
    should_share: bool = False,
    get_group: Callable[[int], Hashable] | None = None,
) -> list[list[Document]]:
    """Return the documents of each rank: the most expensive first, each to the rank with the least
    to do.

    The cost of L tokens is L + L^2 / (12 * hidden_size): products with weights take 24 H^2 FLOPs
    per token and layer, causal attention 2 H L. A unit stays together, and so do documents with a
    common prefix if `should_share`, unless a rank would have too much. Deterministic."""
    if num_ranks == 1:
        return [list(documents)]
    lengths = [count_input_tokens(document) for document in documents]
    units = group_units(documents)
    shared_D = [0] * len(documents)
    if should_share:
        units, shared_D = _group_documents(documents, lengths, get_group)

    def compute_cost(tokens: int) -> float:
        return tokens + tokens**2 / (12 * hidden_size)

    costs = [compute_cost(n) - compute_cost(m) for n, m in zip(lengths, shared_D, strict=True)]
    max_cost = MAX_PREFIX_GROUP_SHARE * sum(costs) / num_ranks
    items: list[tuple[float, list[int]]] = []
    for positions in _split_at_prefixes([shared_D[unit[0]] for unit in units]):
        run = [units[position] for position in positions]
        indices = [i for unit in run for i in unit]
        run_cost = sum(costs[i] for i in indices)
        if len(run) == 1 or run_cost <= max_cost:
            items.append((run_cost, indices))
            continue
        # Each rank will compute the prefix once, so it makes no difference between them.
        costs[indices[0]] -= compute_cost(shared_D[run[1][0]])
        for unit in run:
            items.append((sum(costs[i] for i in unit), list(unit)))
    parts: list[list[Document]] = []
    for part in assign_items(items, num_ranks):
        parts.append([documents[i] for i in part])
    return parts


def _split_at_prefixes(shared: Sequence[int]) -> list[list[int]]:
    """Return runs of positions with a common prefix, from the tokens that the unit at each position
    shares with the one before it."""
    runs: list[list[int]] = []
    for position, tokens in enumerate(shared):
        if tokens:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def _group_documents(
    documents: Sequence[Document],
    lengths: Sequence[int],
    get_group: Callable[[int], Hashable] | None,
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Order the units of documents so that common prefixes are neighbors; return them, and the
    tokens that each document shares with the one before it."""
    input_tokens: list[np.ndarray] = []
    for document, length in zip(documents, lengths, strict=True):
        input_tokens.append(document.tokens_L[:length])
    groups = [get_group(length) for length in lengths] if get_group else []
    return group_by_prefix(input_tokens, group_units(documents), groups)


def assign_items(items: list[tuple[float, list[int]]], num_ranks: int) -> list[list[int]]:
    """Give each item, a cost and its documents, to the rank with the least to do; the most
    expensive first."""
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for cost, indices in sorted(items, key=lambda item: -item[0]):
        rank = loads.index(min(loads))
        loads[rank] += cost
        parts[rank] += indices
    return parts


def compute_saved_share(
    rows: Sequence[Sequence[Document]], batch_size: int, pack_length: int
) -> float:
    """Return the share of input tokens that prefix sharing saves.

    `rows` has the documents of each row, in the order of a run."""
    saved_tokens = 0
    input_tokens = 0
    for first in range(0, max(1, len(rows) - batch_size + 1), batch_size):
        documents = [document for row in rows[first : first + batch_size] for document in row]
        for pack in pack_step(documents, pack_length, should_share=True):
            saved_tokens += sum(pack.prefix_lengths)
        input_tokens += sum(map(count_input_tokens, documents))
    return saved_tokens / input_tokens if input_tokens else 0.0


def _compute_cost(packs: Sequence[Pack]) -> int:
    return sum(count_computed_tokens(pack) + PACK_OVERHEAD_TOKENS for pack in packs)


def _lay_out(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Return the items of each pack: as few packs as best fit finds, balanced if they fit."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    packs = _pack_best_fit(longest_first, lengths, pack_length)
    balanced = _balance_packs(longest_first, lengths, len(packs))
    for pack in balanced:
        if sum(lengths[i] for i in pack) > pack_length:
            return packs
    return balanced


def _pack_with_prefixes(
    documents: Sequence[Document],
    lengths: Sequence[int],
    pack_length: int,
    get_group: Callable[[int], Hashable] | None,
) -> list[Pack]:
    """Pack documents with a common prefix as one item; an item over `pack_length` is split."""
    ordered_units, shared_D = _group_documents(documents, lengths, get_group)
    shared = [shared_D[unit[0]] for unit in ordered_units]
    new_tokens: list[int] = []
    for unit in ordered_units:
        new_tokens.append(sum(lengths[i] - shared_D[i] for i in unit))
    items: list[list[int]] = []
    for run in _split_at_prefixes(shared):
        items += _split_run(run, new_tokens, shared, pack_length)
    sizes = [_count_tokens(item, new_tokens, shared) for item in items]
    packs: list[Pack] = []
    for item_indices in _lay_out(sizes, pack_length):
        pack_documents: list[Document] = []
        prefix_lengths: list[int] = []
        for item_index in item_indices:
            indices = [i for position in items[item_index] for i in ordered_units[position]]
            pack_documents += [documents[i] for i in indices]
            # The first document of an item has nothing before it to share.
            prefix_lengths += [0, *(shared_D[i] for i in indices[1:])]
        packs.append(Pack(tuple(pack_documents), tuple(prefix_lengths)))
    return packs


def _count_tokens(
    positions: Sequence[int], new_tokens: Sequence[int], shared: Sequence[int]
) -> int:
    """Return the computed tokens of a run; its first unit shares nothing."""
    return shared[positions[0]] + sum(new_tokens[position] for position in positions)


def _split_run(
    positions: list[int], new_tokens: Sequence[int], shared: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Split a run into as few parts of at most `max_tokens` as possible, balanced."""
    parts = _fill_parts(positions, new_tokens, shared, max_tokens)
    # Binary search for the smallest limit that gives the same number of parts.
    low = max(1, _count_tokens(positions, new_tokens, shared) // len(parts))
    high = max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_fill_parts(positions, new_tokens, shared, middle)) > len(parts):
            low = middle + 1
        else:
            high = middle
    return _fill_parts(positions, new_tokens, shared, high)


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
    """Put each item into the pack where it leaves the least room, or into a new one."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for i in longest_first:
        fitting = bisect_left(room, (lengths[i], 0))
        if fitting < len(room):
            free_tokens, pack = room.pop(fitting)
        else:
            free_tokens = pack_length
            pack = len(packs)
            packs.append([])
        packs[pack].append(i)
        if free_tokens > lengths[i]:
            insort(room, (free_tokens - lengths[i], pack))
    return packs


def _balance_packs(
    longest_first: Sequence[int], lengths: Sequence[int], count: int
) -> list[list[int]]:
    """Put each item into the shortest of `count` packs."""
    packs: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, pack) for pack in range(count)]
    for i in longest_first:
        length, pack = heap[0]
        packs[pack].append(i)
        heapq.heapreplace(heap, (length + lengths[i], pack))
    return packs
