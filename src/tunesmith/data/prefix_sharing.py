"""Common prefixes of documents, laid out so that each prefix is computed once.

    input tokens -> group_by_prefix (an order, shared tokens) -> build_segments (a forest)

A segment is a stretch of one document that continues its parent: the segments from a root down to
the end of a document are that document. This file works on token ids and numbers alone. Left out:
which documents share a pack (packing.py), tensors (collate.py)."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Shorter prefixes are computed twice: a separate segment costs about as much as these tokens.
MIN_SHARED_TOKENS = 16


class Segment(NamedTuple):
    """Tokens begin .. end - 1 of a document, after the segment `parent` (-1 if begin is 0)."""

    document: int
    begin: int
    end: int
    parent: int


def group_by_prefix(
    input_tokens: Sequence[np.ndarray],
    units: Sequence[tuple[int, ...]],
    groups: Sequence[Hashable] = (),
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Order units (documents that stay together) so that common prefixes are neighbors.

    With `groups`, one per document, documents of different groups share nothing. Returns the
    ordered units and, for each document, how many first tokens it shares with the document before
    it: the common prefix, shortened where a very short segment would result."""
    groups = groups or (0,) * len(input_tokens)
    ranks = {group: rank for rank, group in enumerate(dict.fromkeys(groups))}
    keys: list[tuple[int, bytes]] = []
    for unit in units:
        # Big-endian bytes sort like the token ids.
        keys.append((ranks[groups[unit[0]]], input_tokens[unit[0]].astype(">u4").tobytes()))
    order = sorted(range(len(units)), key=keys.__getitem__)
    ordered_units = [units[i] for i in order]
    documents = [i for unit in ordered_units for i in unit]
    common = [0] * min(1, len(documents))
    for first, second in itertools.pairwise(documents):
        is_same_group = groups[first] == groups[second]
        tokens = _count_common_tokens(input_tokens[first], input_tokens[second])
        common.append(tokens if is_same_group else 0)
    shared = [0] * len(input_tokens)
    for i, tokens in zip(documents, _drop_short_prefixes(common), strict=True):
        shared[i] = tokens
    return ordered_units, shared


def _count_common_tokens(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    differs_L = first[:length] != second[:length]
    return int(differs_L.argmax()) if differs_L.any() else length


def _drop_short_prefixes(common: list[int]) -> list[int]:
    """Let every branch share at least MIN_SHARED_TOKENS more than the branch that it leaves."""
    shared = [0] * len(common)
    stack = [(0, len(common), 0)]
    while stack:
        first, last, depth = stack.pop()
        for start, end in _iter_runs(common, first, last, depth + MIN_SHARED_TOKENS):
            if end - start > 1:
                min_common = min(common[start + 1 : end])
                shared[start + 1 : end] = [min_common] * (end - start - 1)
                stack.append((start, end, min_common))
    return shared


def _iter_runs(
    shared: Sequence[int], first: int, last: int, min_shared: int
) -> Iterator[tuple[int, int]]:
    """Split first .. last - 1 into runs in which all but the first share `min_shared` tokens."""
    start = first
    for position in range(first + 1, last + 1):
        if position == last or shared[position] < min_shared:
            yield start, position
            start = position


def build_segments(
    lengths: Sequence[int], shared: Sequence[int]
) -> tuple[list[Segment], list[int]]:
    """Build the forest of documents of which document i shares `shared[i]` tokens with i - 1.

    Returns the segments, parents before children, and the last segment of each document. A document
    that is a prefix of another ends before its last segment does."""
    segments: list[Segment] = []
    last_segments = [0] * len(lengths)
    # The stack is last in, first out: runs are pushed in reverse.
    roots = list(_iter_runs(shared, 0, len(lengths), 1))
    stack = [(start, end, 0, -1) for start, end in reversed(roots)]
    while stack:
        start, end, depth, parent = stack.pop()
        common = min(shared[start + 1 : end], default=lengths[start])
        num_longer = sum(length > common for length in lengths[start:end])
        longest = max(range(start, end), key=lengths.__getitem__)
        last_segments[start:end] = [len(segments)] * (end - start)
        segment_end = lengths[longest]
        if num_longer > 1:
            segment_end = common
            runs = list(_iter_runs(shared, start, end, common + 1))
            for run_start, run_end in reversed(runs):
                if lengths[run_start] > common:
                    stack.append((run_start, run_end, common, len(segments)))
        segments.append(Segment(longest, depth, segment_end, parent))
    return segments, last_segments
