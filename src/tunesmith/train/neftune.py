"""NEFTune (Jain 2023): uniform noise on the embeddings of a training step.

    Pack, alpha, seed, step -> Batch with noise [T, H] beside its tokens

The noise of a document depends on the seed, the step and the document alone, so no packing and no
resume changes it. Its scale is alpha / sqrt(L * H), with the L tokens of the document, not those of
the pack. Left out: evaluation and reference models, whose batches have no noise."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch
from torch import Tensor

from tunesmith.core.types import Batch, Document, Pack, PlanConfig
from tunesmith.data.packing import count_input_tokens

NOISE_DTYPE = torch.float32


def add_embedding_noise(
    batch: Batch, pack: Pack, hidden_size: int, config: PlanConfig, step: int
) -> Batch:
    """Return the batch with noise for the embedding of each of its tokens. `step` counts finished
    steps."""
    assert config.neftune_noise_alpha
    assert not batch.layout.parents, "a shared token belongs to several documents"
    device = batch.tokens_T.device
    noise: list[Tensor] = []
    for document in pack.documents:
        generator = torch.Generator(device).manual_seed(_make_seed(document, config.seed, step))
        limit = config.neftune_noise_alpha / math.sqrt(len(document) * hidden_size)
        noise_LH = torch.empty(
            (count_input_tokens(document), hidden_size), dtype=NOISE_DTYPE, device=device
        )
        noise.append(noise_LH.uniform_(-limit, limit, generator=generator))
    noise_TH = torch.cat(noise)
    if batch.shard is not None:
        noise_TH = noise_TH[batch.shard.start : batch.shard.end]
    return dataclasses.replace(batch, embedding_noise_TH=noise_TH)


def remove_embedding_noise(batch: Batch) -> Batch:
    """Return the batch as a model sees it that is not trained."""
    return dataclasses.replace(batch, embedding_noise_TH=None)


def _make_seed(document: Document, seed: int, step: int) -> int:
    """Return a seed of 63 bits; Python's hash of a text changes with every process."""
    key = f"{seed} {step} {document.side} {document.id} ".encode()
    digest = hashlib.sha256(key + document.tokens_L.tobytes()).digest()
    return int.from_bytes(digest[:8]) >> 1
