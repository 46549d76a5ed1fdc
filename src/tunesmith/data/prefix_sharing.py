"""What documents begin with alike, and how they are laid out so that it stands once.

    fed tokens -> begin_alike (an order, and what each may share with the one before) -> segments_of -> a forest

A segment is a stretch of one document, and continues its parent: from a root down to where a document ends, the
segments on the way are the document. Works on token ids and numbers alone. Left out: which documents share a pack
(pack.py), tensors (batch.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Fewer tokens in common are computed twice: a segment of its own costs about as much as these tokens.
LEAST_SHARED = 16


class Segment(NamedTuple):
    """Tokens begin..end - 1 of a document, which follow those of the segment `parent` (-1: begin is 0)."""

    document: int
    begin: int
    end: int
    parent: int


def begin_alike(fed: Sequence[np.ndarray], units: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """An order of units (documents that stay together) in which those that begin alike are neighbours, and for each
    document how many first tokens it shares with the one before it: what both have in common, less where that would
    make a very short segment."""
    keys = [fed[unit[0]].astype(">u4").tobytes() for unit in units]  # bytes in the order of the numbers
    order = [units[i] for i in sorted(range(len(units)), key=keys.__getitem__)]
    places = [i for unit in order for i in unit]
    common = [_common(fed[one], fed[other]) for one, other in itertools.pairwise(places)]
    shared = [0] * len(fed)
    for i, tokens in zip(places, _worthwhile([0, *common][: len(fed)]), strict=True):
        shared[i] = tokens
    return order, shared


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs_L = one[:length] != other[:length]
    return int(differs_L.argmax()) if differs_L.any() else length


def _worthwhile(common: list[int]) -> list[int]:
    """Every branch shares at least LEAST_SHARED tokens more than the branch that it leaves."""
    shared = [0] * len(common)
    waiting = [(0, len(common), 0)]
    while waiting:
        first, last, depth = waiting.pop()
        for start, end in _runs(common, first, last, depth + LEAST_SHARED):
            if end - start > 1:
                least = min(common[start + 1 : end])
                shared[start + 1 : end] = [least] * (end - start - 1)
                waiting.append((start, end, least))
    return shared


def _runs(shared: Sequence[int], first: int, last: int, least: int) -> Iterator[tuple[int, int]]:
    """Stretches of first..last - 1 in which each shares at least `least` tokens with the one before."""
    start = first
    for place in range(first + 1, last + 1):
        if place == last or shared[place] < least:
            yield start, place
            start = place


def segments_of(lengths: Sequence[int], shared: Sequence[int]) -> tuple[list[Segment], list[int]]:
    """The forest of documents that share `shared[i]` first tokens with document i - 1, parents before children, and the
    segment that each document ends in. It may end before its segment does: then it is what another one begins with."""
    segments: list[Segment] = []
    ends_in = [0] * len(lengths)
    waiting = [(start, end, 0, -1) for start, end in _runs(shared, 0, len(lengths), 1)][::-1]
    while waiting:
        start, end, depth, parent = waiting.pop()
        common = min(shared[start + 1 : end], default=lengths[start])
        beyond = sum(length > common for length in lengths[start:end])
        longest = max(range(start, end), key=lengths.__getitem__)
        until = common if beyond > 1 else lengths[longest]
        ends_in[start:end] = [len(segments)] * (end - start)
        if beyond > 1:
            runs = [run for run in _runs(shared, start, end, common + 1) if lengths[run[0]] > common]
            waiting += [(*run, common, len(segments)) for run in runs][::-1]
        segments.append(Segment(longest, depth, until, parent))
    return segments, ends_in
