"""A pack as tensors: the only place in `data` that knows torch.

    Pack -> Batch (tokens, positions, layout, and the targets as a list apart)

Only the tokens that can matter are fed (`pack.fed_tokens`): shorter chats by up to a tenth, with
the same loss."""

from __future__ import annotations

import numpy as np
import torch

from tunesmith.core.types import Batch, Pack, PackLayout
from tunesmith.data.packing import count_input_tokens
from tunesmith.data.prefix_sharing import build_segments


def collate(pack: Pack, device: torch.device | str = "cpu") -> Batch:
    """Lay the documents side by side. Target k: the hidden state at `positions_S[k]` predicts
    `targets_S[k]`."""
    lengths = [count_input_tokens(document) for document in pack.documents]
    segments, last_segments = build_segments(lengths, pack.prefix_lengths or (0,) * len(lengths))
    sizes = [segment.end - segment.begin for segment in segments]
    layout = PackLayout(
        starts=(0, *np.cumsum(sizes)[:-1].tolist()),
        lengths=tuple(sizes),
        parents=tuple(segment.parent for segment in segments) if any(pack.prefix_lengths) else (),
    )
    positions, targets, weights, document_indices = [], [], [], []
    for i, document in enumerate(pack.documents):
        targets_K = np.flatnonzero(document.weights_L)  # places of the targets in the document
        positions.append(_find_positions(layout, last_segments[i])[targets_K - 1])
        targets.append(document.tokens_L[targets_K])
        weights.append(document.weights_L[targets_K])
        document_indices.append(np.full(len(targets_K), i))
    is_paired = any(document.side for document in pack.documents)
    segment_tokens = [
        pack.documents[segment.document].tokens_L[segment.begin : segment.end]
        for segment in segments
    ]
    return Batch(
        tokens_T=_to_tensor(segment_tokens, np.int64, device),
        positions_T=_to_tensor(
            [np.arange(segment.begin, segment.end) for segment in segments], np.int64, device
        ),
        layout=layout,
        positions_S=_to_tensor(positions, np.int64, device),
        targets_S=_to_tensor(targets, np.int64, device),
        weights_S=_to_tensor(weights, np.float32, device),
        document_S=_to_tensor(document_indices, np.int64, device),
        ids=tuple(document.id for document in pack.documents),
        real_tokens=sum(len(document) for document in pack.documents),
        sides=tuple(document.side for document in pack.documents) if is_paired else (),
        reference_logps=tuple(document.reference_logp for document in pack.documents)
        if is_paired
        else (),
    )


def _find_positions(layout: PackLayout, last: int) -> np.ndarray:
    """Where the tokens of a document that ends in segment `last` stand in the pack."""
    path = layout.get_path(last)
    return np.concatenate(
        [np.arange(layout.starts[i], layout.starts[i] + layout.lengths[i]) for i in path]
    )


def _to_tensor(
    arrays: list[np.ndarray], dtype: type[np.generic], device: torch.device | str
) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)
