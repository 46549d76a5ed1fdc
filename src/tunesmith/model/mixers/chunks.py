"""A pack cut for mixers that carry a state from token to token.

In: a PackLayout. Out: chunks of equal length that never cross a segment, in waves (`cut_chunks`);
the tokens before the first ones of a segment (`find_edges`, `find_tails`). A segment starts with
the state at the end of its parent, a root with none, so nothing runs from document to document.
Left out: what the state is. Legend: T tokens, S segments, N chunks, L tokens of a chunk, K taps of
a convolution, E edge tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import PackLayout

CACHED_LAYOUTS = 16  # packs whose indices are kept: all layers and the backward need them


@dataclass(frozen=True, eq=False)
class Wave:
    """Neighboring chunks that are computed at once, since all that precede them have been."""

    chunks: slice
    # the chunk before each one on its path, as an index into the wave before, a slice if they are
    # its first ones in this order; None: there is none
    previous: Tensor | slice | None
    first_previous: int  # first chunk of the wave before


@dataclass(frozen=True, eq=False)
class ChunkedLayout:
    """The chunks of a pack, sorted by wave."""

    tokens_NL: Tensor  # 0 in the padding at the end of a segment
    padding: Tensor  # where that is, in the flattened chunks [N * L]
    slots_T: Tensor  # of each token in the flattened chunks [N * L]
    waves: tuple[Wave, ...]
    roots: Tensor  # segment of each chunk of the first wave
    last_chunks_S: Tensor

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens [T, ...] in chunks [N, L, ...], with zeros as padding."""
        flat = x.index_select(0, self.tokens_NL.flatten())
        flat.index_fill_(0, self.padding, 0)
        return flat.unflatten(0, self.tokens_NL.shape)

    def join(self, x: Tensor) -> Tensor:
        """Return the chunks [N, L, ...] as tokens [T, ...]."""
        return x.flatten(0, 1).index_select(0, self.slots_T)


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def cut_chunks(layout: PackLayout, chunk_size: int, device: torch.device) -> ChunkedLayout:
    """Cut every segment into chunks of `chunk_size` tokens, and sort them into waves: a chunk's
    depth is the number of chunks before it on its path."""
    spans: list[tuple[int, int]] = []  # first token and length of each chunk
    previous: list[int] = []
    depths: list[int] = []
    last_chunks: list[int] = []  # of each segment
    segments: list[int] = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        parent = layout.parents[segment] if layout.parents else -1
        before = last_chunks[parent] if parent >= 0 else -1
        for offset in range(0, length, chunk_size):
            spans.append((start + offset, min(chunk_size, length - offset)))
            previous.append(before)
            depths.append(depths[before] + 1 if before >= 0 else 0)
            segments.append(segment)
            before = len(spans) - 1
        last_chunks.append(before)
    order = _sort_by_depth(depths, previous)
    ranks = {chunk: rank for rank, chunk in enumerate(order)}
    waves = _list_waves(order, depths, previous, device)
    # on the host, with numpy: a GPU would have to wait for the number of tokens
    starts_N, lengths_N = np.array([spans[chunk] for chunk in order]).T
    offsets_L = np.arange(chunk_size)
    is_token_NL = offsets_L < lengths_N[:, None]
    tokens_NL = np.where(is_token_NL, starts_N[:, None] + offsets_L, 0)
    slots_T = np.empty(layout.num_tokens, np.int64)
    slots_T[tokens_NL[is_token_NL]] = np.flatnonzero(is_token_NL)
    num_roots = waves[0].chunks.stop
    return ChunkedLayout(
        tokens_NL=upload(tokens_NL, device),
        padding=upload(np.flatnonzero(~is_token_NL), device),
        slots_T=upload(slots_T, device),
        waves=waves,
        roots=upload([segments[chunk] for chunk in order[:num_roots]], device),
        last_chunks_S=upload([ranks[chunk] for chunk in last_chunks], device),
    )


def _sort_by_depth(depths: list[int], previous: list[int]) -> list[int]:
    """Return the chunks by depth. Of one depth, those that most chunks follow come first: in a
    plain pack, the chunks of a depth then follow the first ones of the depth before."""
    heights = [0] * len(depths)  # longest path that continues a chunk
    for chunk in reversed(range(len(depths))):
        if previous[chunk] >= 0:
            heights[previous[chunk]] = max(heights[previous[chunk]], heights[chunk] + 1)
    return sorted(range(len(depths)), key=lambda chunk: (depths[chunk], -heights[chunk]))


def _list_waves(
    order: list[int], depths: list[int], previous: list[int], device: torch.device
) -> tuple[Wave, ...]:
    waves: list[Wave] = []
    ranks: dict[int, int] = {}  # of the chunks of the wave before
    start = 0
    while start < len(order):
        depth = depths[order[start]]
        end = start
        while end < len(order) and depths[order[end]] == depth:
            end += 1
        chunks = order[start:end]
        first_previous = waves[-1].chunks.start if waves else 0
        waves.append(Wave(slice(start, end), None, first_previous))
        if depth:
            indices = [ranks[previous[chunk]] for chunk in chunks]
            is_first = indices == list(range(len(chunks)))
            index = slice(len(chunks)) if is_first else upload(indices, device)
            waves[-1] = Wave(slice(start, end), index, first_previous)
        ranks = {chunk: rank for rank, chunk in enumerate(chunks)}
        start = end
    return tuple(waves)


# ---------------------------------------------------------------- short convolutions


@dataclass(frozen=True, eq=False)
class Edges:
    """The tokens of a pack whose K taps are not simply the K tokens up to them."""

    tokens_E: Tensor
    taps_KE: Tensor  # the token that stands k before on the path; T if there is none


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def find_edges(layout: PackLayout, num_taps: int, device: torch.device) -> Edges:
    """Return the first `num_taps` - 1 tokens of every segment, with their taps."""
    reach = num_taps - 1
    tokens: list[int] = []
    taps: list[list[int]] = []
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        parent = layout.parents[segment] if layout.parents else -1
        first_tokens = list(range(start, start + min(length, reach)))
        line = [*_list_last_tokens(layout, parent, reach), *first_tokens]
        for offset, token in enumerate(first_tokens):
            tokens.append(token)
            taps.append(line[offset : offset + num_taps][::-1])
    taps_EK = upload(taps, device, torch.long).view(-1, num_taps)
    return Edges(upload(tokens, device, torch.long), taps_EK.t().contiguous())


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def list_taps(layout: PackLayout, num_taps: int) -> Tensor:
    """Return the token that stands k before each one on its path [T, K], -1 if there is none."""
    edges = find_edges(layout, num_taps, torch.device("cpu"))
    tokens_T = torch.arange(layout.num_tokens)
    taps_TK = tokens_T[:, None] - torch.arange(num_taps)
    taps_TK[edges.tokens_E] = edges.taps_KE.t()
    return taps_TK.masked_fill_(taps_TK == layout.num_tokens, -1)


@functools.lru_cache(maxsize=CACHED_LAYOUTS)
def find_tails(layout: PackLayout, count: int, device: torch.device) -> Tensor:
    """Return the last `count` tokens [S, count] on the path of each segment, T if there is none."""
    tails = [_list_last_tokens(layout, segment, count) for segment in range(len(layout.lengths))]
    return upload(tails, device, torch.long).view(len(tails), count)


def _list_last_tokens(layout: PackLayout, segment: int, count: int) -> list[int]:
    """Return the last `count` tokens of the path that ends with this segment, T where the path is
    shorter. Segment -1 is an empty path."""
    tokens: list[int] = []
    while segment >= 0 and len(tokens) < count:
        end = layout.starts[segment] + layout.lengths[segment]
        start = max(layout.starts[segment], end - (count - len(tokens)))
        tokens = [*range(start, end), *tokens]
        segment = layout.parents[segment] if layout.parents else -1
    return [layout.num_tokens] * (count - len(tokens)) + tokens
