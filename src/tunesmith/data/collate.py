"""A pack as tensors: the only place in `data` that knows torch.

    Pack -> Batch (tokens, positions, layout, and the targets as a list apart)

Only the tokens that can matter are fed (`pack.fed_tokens`): shorter chats by up to a tenth, with the same loss.
"""

from __future__ import annotations

import numpy as np
import torch

from tunesmith.core.types import Batch, Layout, Pack
from tunesmith.data.packing import fed_tokens
from tunesmith.data.prefix_sharing import segments_of


def collate(pack: Pack, device: torch.device | str = "cpu") -> Batch:
    """Lay the documents side by side. Target k: the hidden state at `positions_S[k]` predicts `targets_S[k]`."""
    lengths = [fed_tokens(document) for document in pack.documents]
    segments, ends_in = segments_of(lengths, pack.shared or (0,) * len(lengths))
    sizes = [segment.end - segment.begin for segment in segments]
    layout = Layout(
        starts=(0, *np.cumsum(sizes)[:-1].tolist()),
        lengths=tuple(sizes),
        parents=tuple(segment.parent for segment in segments) if any(pack.shared) else (),
    )
    positions, targets, weights, owners = [], [], [], []
    for i, document in enumerate(pack.documents):
        targets_K = np.flatnonzero(document.weights_L)  # places of the targets in the document
        positions.append(_places(layout, ends_in[i])[targets_K - 1])
        targets.append(document.tokens_L[targets_K])
        weights.append(document.weights_L[targets_K])
        owners.append(np.full(len(targets_K), i))
    paired = any(document.side for document in pack.documents)
    fed = [pack.documents[s.document].tokens_L[s.begin : s.end] for s in segments]
    return Batch(
        tokens_T=_tensor(fed, np.int64, device),
        positions_T=_tensor([np.arange(s.begin, s.end) for s in segments], np.int64, device),
        layout=layout,
        positions_S=_tensor(positions, np.int64, device),
        targets_S=_tensor(targets, np.int64, device),
        weights_S=_tensor(weights, np.float32, device),
        document_S=_tensor(owners, np.int64, device),
        ids=tuple(document.id for document in pack.documents),
        real_tokens=sum(len(document) for document in pack.documents),
        sides=tuple(document.side for document in pack.documents) if paired else (),
        references=tuple(document.reference for document in pack.documents) if paired else (),
    )


def _places(layout: Layout, last: int) -> np.ndarray:
    """Where the tokens of a document that ends in segment `last` stand in the pack."""
    path = layout.path(last)
    return np.concatenate([np.arange(layout.starts[i], layout.starts[i] + layout.lengths[i]) for i in path])


def _tensor(parts: list[np.ndarray], dtype: type[np.generic], device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device)
