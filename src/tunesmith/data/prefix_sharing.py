"""What documents begin with alike, and how they are laid out so that it stands once.

    fed tokens -> begin_alike (an order, and what each may share with the one before) -> segments_of -> a forest

A segment is a stretch of one document, and continues its parent: from a root down to where a
document ends, the segments on the way are the document. Works on token ids and numbers alone. Left
out: which documents share a pack (pack.py), tensors (batch.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Fewer tokens in common are computed twice: a segment of its own costs about as much as these
# tokens.
MIN_SHARED_TOKENS = 16


class Segment(NamedTuple):
    """Tokens begin..end - 1 of a document, which follow those of the segment `parent` (-1: begin is
    0)."""

    document: int
    begin: int
    end: int
    parent: int


def group_by_prefix(
    input_tokens: Sequence[np.ndarray], units: Sequence[tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """An order of units (documents that stay together) in which those that begin alike are
    neighbours, and for each document how many first tokens it shares with the one before it: what
    both have in common, less where that would make a very short segment."""
    keys = [
        input_tokens[unit[0]].astype(">u4").tobytes() for unit in units
    ]  # bytes in the order of the numbers
    ordered_units = [units[i] for i in sorted(range(len(units)), key=keys.__getitem__)]
    documents = [i for unit in ordered_units for i in unit]
    common = [
        _count_common_tokens(input_tokens[first], input_tokens[second])
        for first, second in itertools.pairwise(documents)
    ]
    shared = [0] * len(input_tokens)
    for i, tokens in zip(
        documents, _drop_short_prefixes([0, *common][: len(input_tokens)]), strict=True
    ):
        shared[i] = tokens
    return ordered_units, shared


def _count_common_tokens(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    differs_L = first[:length] != second[:length]
    return int(differs_L.argmax()) if differs_L.any() else length


def _drop_short_prefixes(common: list[int]) -> list[int]:
    """Every branch shares at least LEAST_SHARED tokens more than the branch that it leaves."""
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
    """Stretches of first..last - 1 in which each shares at least `least` tokens with the one
    before."""
    start = first
    for position in range(first + 1, last + 1):
        if position == last or shared[position] < min_shared:
            yield start, position
            start = position


def build_segments(
    lengths: Sequence[int], shared: Sequence[int]
) -> tuple[list[Segment], list[int]]:
    """The forest of documents that share `shared[i]` first tokens with document i - 1, parents
    before children, and the segment that each document ends in. It may end before its segment does:
    then it is what another one begins with."""
    segments: list[Segment] = []
    last_segments = [0] * len(lengths)
    stack = [(start, end, 0, -1) for start, end in _iter_runs(shared, 0, len(lengths), 1)][::-1]
    while stack:
        start, end, depth, parent = stack.pop()
        common = min(shared[start + 1 : end], default=lengths[start])
        num_longer = sum(length > common for length in lengths[start:end])
        longest = max(range(start, end), key=lengths.__getitem__)
        segment_end = common if num_longer > 1 else lengths[longest]
        last_segments[start:end] = [len(segments)] * (end - start)
        if num_longer > 1:
            runs = [
                run
                for run in _iter_runs(shared, start, end, common + 1)
                if lengths[run[0]] > common
            ]
            stack += [(*run, common, len(segments)) for run in runs][::-1]
        segments.append(Segment(longest, depth, segment_end, parent))
    return segments, last_segments
