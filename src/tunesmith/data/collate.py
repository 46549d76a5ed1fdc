"""A pack as tensors; the only module in `data` that imports torch.

    Pack -> Batch (tokens, positions, layout, and the targets as a separate list)

Only tokens before the last target are fed (`count_input_tokens`): the loss is the same, and chats
get up to a tenth shorter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.core.hardware import upload
from tunesmith.core.token_shard import TokenShard
from tunesmith.core.types import Batch, Pack, PackLayout, SharedTargets, Side
from tunesmith.data.packing import count_input_tokens
from tunesmith.data.prefix_sharing import build_segments

Device = torch.device | str
# the arrays of SharedTargets, in their order
SHARED_NAMES = ("positions_P", "position_S", "target_S", "targets_M", "position_M")


def collate(pack: Pack, device: Device = "cpu", shard: TokenShard | None = None) -> Batch:
    """Concatenate the documents of a pack.

    T input tokens, S targets: the hidden state at `positions_S[k]` predicts `targets_S[k]`. With
    `shard`, tokens are those of this rank, and targets those that they predict."""
    lengths = [count_input_tokens(document) for document in pack.documents]
    segments, last_segments = build_segments(lengths, pack.prefix_lengths or (0,) * len(lengths))
    sizes = [segment.end - segment.begin for segment in segments]
    has_shared = any(pack.prefix_lengths)
    layout = PackLayout(
        starts=(0, *np.cumsum(sizes)[:-1].tolist()),
        lengths=tuple(sizes),
        parents=tuple(segment.parent for segment in segments) if has_shared else (),
    )
    segment_tokens: list[np.ndarray] = []
    segment_positions: list[np.ndarray] = []
    for segment in segments:
        tokens_L = pack.documents[segment.document].tokens_L
        segment_tokens.append(tokens_L[segment.begin : segment.end])
        segment_positions.append(np.arange(segment.begin, segment.end))
    sides: tuple[Side, ...] = tuple(document.side for document in pack.documents)
    reference_logps = tuple(document.reference_logp for document in pack.documents)
    arrays = {
        "tokens_T": np.concatenate(segment_tokens),
        "positions_T": np.concatenate(segment_positions),
        **_collect_targets(pack, layout, last_segments),
    }
    if shard is not None:
        arrays = _select_shard(arrays, shard)
    documents_K = arrays["document_S"][arrays["weights_S"] != 0]
    num_targets = np.bincount(documents_K, minlength=len(pack.documents))
    if has_shared:
        arrays |= _find_different(arrays["positions_S"], arrays["targets_S"])
    tensors = _copy_to(device, arrays)
    shared_targets = None
    if has_shared:
        shared = [tensors.pop(name) for name in SHARED_NAMES]
        shared_targets = SharedTargets(tensors["positions_S"], tensors["targets_S"], *shared)
    return Batch(
        **tensors,
        layout=layout,
        ids=tuple(document.id for document in pack.documents),
        real_tokens=sum(len(document) for document in pack.documents),
        sides=sides if any(sides) else (),
        reference_logps=reference_logps if any(sides) else (),
        num_targets=tuple(num_targets.tolist()),
        shared_targets=shared_targets,
        shard=shard,
    )


def _collect_targets(
    pack: Pack, layout: PackLayout, last_segments: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return the targets of each document, after those of the documents before it."""
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    document_indices: list[np.ndarray] = []
    for i, document in enumerate(pack.documents):
        targets_K = np.flatnonzero(document.weights_L)  # positions of targets in the document
        pack_positions_L = _find_positions(layout, last_segments[i])
        positions.append(pack_positions_L[targets_K - 1])
        targets.append(document.tokens_L[targets_K])
        weights.append(document.weights_L[targets_K])
        document_indices.append(np.full(len(targets_K), i))
    return {
        "positions_S": np.concatenate(positions),
        "targets_S": np.concatenate(targets),
        "weights_S": np.concatenate(weights).astype(np.float32),
        "document_S": np.concatenate(document_indices),
    }


def _select_shard(arrays: dict[str, np.ndarray], shard: TokenShard) -> dict[str, np.ndarray]:
    """Return the tokens of a shard and the targets that they predict. Where there are none, as in a
    long prompt, its first token has one of no weight: kernels take no empty tensors."""
    positions_S = arrays["positions_S"]
    is_here_S = (positions_S >= shard.start) & (positions_S < shard.end)
    has_targets = bool(is_here_S.any())
    is_here_S[0] |= not has_targets
    selected: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith("_T"):
            selected[name] = array[shard.start : shard.end]
        else:
            selected[name] = array[is_here_S]
    if has_targets:
        selected["positions_S"] -= shard.start
    else:
        selected["positions_S"][:] = 0
        selected["weights_S"][:] = 0
    return selected


def share_targets(batch: Batch) -> SharedTargets:
    """Return the different targets of a batch whose targets are not those of its pack."""
    arrays = _find_different(batch.positions_S.cpu().numpy(), batch.targets_S.cpu().numpy())
    tensors = _copy_to(batch.positions_S.device, arrays)
    return SharedTargets(batch.positions_S, batch.targets_S, *tensors.values())


def _find_different(positions_S: np.ndarray, targets_S: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of SharedTargets, in their order."""
    positions_P, position_S = np.unique(positions_S, return_inverse=True)
    keys_S = positions_S.astype(np.int64) << 32 | targets_S
    keys_M, target_S = np.unique(keys_S, return_inverse=True)
    targets_M = keys_M & (1 << 32) - 1
    position_M = np.searchsorted(positions_P, keys_M >> 32)
    arrays = (positions_P, position_S, target_S, targets_M, position_M)
    return dict(zip(SHARED_NAMES, arrays, strict=True))


def _find_positions(layout: PackLayout, last_segment: int) -> np.ndarray:
    """Return the positions in the pack of the tokens of a document."""
    path = layout.get_path(last_segment)
    ranges = [np.arange(layout.starts[i], layout.starts[i] + layout.lengths[i]) for i in path]
    return np.concatenate(ranges)


def _copy_to(device: Device, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors: integers in 64 bits, the others as they are.

    A GPU gets them in one copy."""
    wide: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        wide[name] = array.astype(np.int64) if array.dtype.kind in "iu" else array
    if torch.device(device).type == "cpu":
        return {name: torch.from_numpy(array) for name, array in wide.items()}
    return split_tensors(upload(join_arrays(wide), device), wide)


def join_arrays(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """Return the bytes of all arrays, the widest numbers first, so that all are aligned."""
    ordered = sorted(arrays.values(), key=lambda array: -array.itemsize)
    return torch.from_numpy(np.concatenate([array.view(np.uint8) for array in ordered]))


def split_tensors(buffer: torch.Tensor, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the parts of what `join_arrays` returned, which may have gone to another device."""
    tensors: dict[str, torch.Tensor] = {}
    start = 0
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].itemsize):
        part = buffer[start : start + array.nbytes]
        tensors[name] = part.view(torch.float32 if array.dtype.kind == "f" else torch.int64)
        start += array.nbytes
    return {name: tensors[name] for name in arrays}
