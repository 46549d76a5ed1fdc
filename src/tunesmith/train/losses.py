"""What a step minimises: named terms, each a sum over the step's targets divided by its own count.

The counts are of the whole step (all packs, all ranks) and known before the first forward, so no split of the step into
packs can change the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.model.head import supervised_loss
from tunesmith.model.load import LanguageModel
from tunesmith.types import Batch, Document


@dataclass(frozen=True, eq=False)
class Term:
    """`sum` over this pack; `coefficient * sum / count` is what it adds to the step's loss."""

    sum: Tensor
    count: float
    coefficient: float = 1.0


def weight_count(documents: Sequence[Document]) -> float:
    """The sum of the target weights, in fp64: what the mean of a weighted loss divides by."""
    return float(sum(document.weights_L.sum(dtype="float64") for document in documents))


def answer_loss(model: LanguageModel, batch: Batch, step_weight: float) -> dict[str, Term]:
    """Weighted cross-entropy of the supervised tokens."""
    batch = merged(batch)
    total, _ = supervised_loss(model.hidden(batch), model.head, batch.targets_S, batch.weights_S)
    return {"answer": Term(total, step_weight)}


def merged(batch: Batch) -> Batch:
    """One target for all documents that share it, with the sum of their weights; whose it was is lost."""
    if not batch.layout.parents:
        return batch
    pairs_S, place = (batch.positions_S << 32 | batch.targets_S).unique(return_inverse=True)
    weights_S = batch.weights_S.new_zeros(len(pairs_S)).index_add_(0, place, batch.weights_S)
    positions_S, targets_S = pairs_S >> 32, pairs_S & (1 << 32) - 1
    nobody_S = torch.full_like(targets_S, -1)
    return dataclasses.replace(
        batch, positions_S=positions_S, targets_S=targets_S, weights_S=weights_S, document_S=nobody_S
    )


Loss = Callable[[LanguageModel, Batch, float], dict[str, Term]]
LOSSES: dict[str, Loss] = {"sft": answer_loss}
