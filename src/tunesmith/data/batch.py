"""A pack as tensors: the only place in `data` that knows torch.

    Pack -> Batch (tokens, positions, layout, and the targets as a list apart)

Only the tokens that can matter are fed (`pack.fed_tokens`): shorter chats by up to a tenth, with the same loss.
"""

from __future__ import annotations

import numpy as np
import torch

from tunesmith.data.pack import fed_tokens
from tunesmith.types import Batch, Layout, Pack


def collate(pack: Pack, device: torch.device | str = "cpu") -> Batch:
    """Lay the documents side by side. Target k: the hidden state at `positions_S[k]` predicts `targets_S[k]`."""
    lengths = [fed_tokens(document) for document in pack.documents]
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    positions, targets, weights, owners = [], [], [], []
    for i, (document, start) in enumerate(zip(pack.documents, starts, strict=True)):
        targets_K = np.flatnonzero(document.weights_L)  # places of the targets in the document
        positions.append(targets_K - 1 + start)
        targets.append(document.tokens_L[targets_K])
        weights.append(document.weights_L[targets_K])
        owners.append(np.full(len(targets_K), i))
    fed = [document.tokens_L[:length] for document, length in zip(pack.documents, lengths, strict=True)]
    return Batch(
        tokens_T=_tensor(fed, np.int64, device),
        positions_T=_tensor([np.arange(length) for length in lengths], np.int64, device),
        layout=Layout(tuple(starts), tuple(lengths)),
        positions_S=_tensor(positions, np.int64, device),
        targets_S=_tensor(targets, np.int64, device),
        weights_S=_tensor(weights, np.float32, device),
        document_S=_tensor(owners, np.int64, device),
        ids=tuple(document.id for document in pack.documents),
        real_tokens=sum(len(document) for document in pack.documents),
    )


def _tensor(parts: list[np.ndarray], dtype: type[np.generic], device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device)
