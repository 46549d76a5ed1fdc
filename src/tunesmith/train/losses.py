"""What a step minimises: named terms, each a sum over the step divided by its own count.

    answer      cross-entropy of the supervised tokens of plain documents
    preference  the loss of pairs (LOSSES)         chosen  cross-entropy of the chosen sides
    banned      unlikelihood of the bad tokens of answers that break a constraint

The counts are of the whole step (all packs, all ranks) and known before the first forward, so no
split of the step into packs can change the result. Legend: S targets, D documents, P pairs of a
pack; log-probabilities in nats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import Batch, Document
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import (
    LMHead,
    compute_supervised_loss,
    compute_target_losses,
    measure_target_losses,
)


@dataclass(frozen=True, eq=False)
class LossTerm:
    """`sum` over this pack; `coefficient * sum / count` is what it adds to the step's loss."""

    sum: Tensor
    count: float
    coefficient: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """How pairs and bans are trained. `nll`, `ban`: coefficients of the terms `chosen` and
    `banned`."""

    loss: str = "dpo"
    beta: float = 0.1
    gamma: float = 0.0
    nll_coefficient: float = 0.0
    ban_coefficient: float = 1.0


@dataclass(frozen=True)
class LossNormalizer:
    """What the terms of a step divide by: sums of target weights, and of the weights of pairs."""

    answer: float = 0.0
    chosen: float = 0.0
    pairs: float = 0.0
    banned: float = 0.0

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> LossNormalizer:
        chosen = [document for document in documents if document.side == "chosen"]
        return cls(
            answer=sum_weights([document for document in documents if not document.side]),
            chosen=sum_weights(chosen),
            banned=sum_weights([document for document in documents if document.side == "banned"]),
            pairs=sum(
                sum_weights([document]) / np.count_nonzero(document.weights_L)
                for document in chosen
            ),
        )

    def __bool__(self) -> bool:
        return bool(self.answer or self.pairs or self.banned)


def sum_weights(documents: Sequence[Document]) -> float:
    """The sum of the target weights, in fp64: what the mean of a weighted loss divides by."""
    return float(sum(document.weights_L.sum(dtype="float64") for document in documents))


def sft_loss(model: PackedCausalLM, batch: Batch, step_weight: float) -> dict[str, LossTerm]:
    """Weighted cross-entropy of the supervised tokens."""
    merged_batch, _ = merge_shared_targets(batch)
    total, _ = compute_supervised_loss(
        model.compute_hidden(merged_batch),
        model.head,
        merged_batch.targets_S,
        merged_batch.weights_S,
    )
    return {"answer": LossTerm(total, step_weight)}


def merge_shared_targets(batch: Batch) -> tuple[Batch, Tensor | None]:
    """One target for all documents that share it, with the sum of their weights; whose it was is
    lost. And where each target of the batch has gone; None where it stays."""
    if not batch.layout.parents:
        return batch, None
    keys_S, inverse_S = (batch.positions_S << 32 | batch.targets_S).unique(return_inverse=True)
    weights_S = batch.weights_S.new_zeros(len(keys_S)).index_add_(0, inverse_S, batch.weights_S)
    positions_S, targets_S = keys_S >> 32, keys_S & (1 << 32) - 1
    unknown_S = torch.full_like(targets_S, -1)
    merged_batch = dataclasses.replace(
        batch,
        positions_S=positions_S,
        targets_S=targets_S,
        weights_S=weights_S,
        document_S=unknown_S,
    )
    return merged_batch, inverse_S


def _compute_target_losses(
    model: PackedCausalLM, batch: Batch, compute_losses: Callable[[Tensor, LMHead, Tensor], Tensor]
) -> Tensor:
    """The loss [S] of each target of each document; shared ones are computed once."""
    merged_batch, inverse_S = merge_shared_targets(batch)
    losses_S = compute_losses(
        model.compute_hidden(merged_batch), model.head, merged_batch.targets_S
    )
    return losses_S if inverse_S is None else losses_S[inverse_S]


def compute_step_terms(
    model: PackedCausalLM, batch: Batch, normalizer: LossNormalizer, loss_config: LossConfig
) -> dict[str, LossTerm]:
    """The terms of one pack; plain documents and pairs may share it."""
    if not batch.sides:
        return sft_loss(model, batch, normalizer.answer)
    has_pairs = "chosen" in batch.sides
    reference_logps_D = (
        _compute_reference_logps(model, batch)
        if has_pairs and loss_config.loss in REFERENCE_LOSSES
        else None
    )
    losses_S = _compute_target_losses(model, batch, compute_target_losses)
    weights_S = batch.weights_S.to(losses_S.dtype)
    weighted_S, terms = losses_S * weights_S, dict[str, LossTerm]()
    if has_pairs:
        pairs = _collect_pair_logps(batch, _sum_by_document(batch, -losses_S), reference_logps_D)
        total_P = pairs.weight_P * PREFERENCE_LOSSES[loss_config.loss](pairs, loss_config)
        terms["preference"] = LossTerm(total_P.sum(), normalizer.pairs)
    if "banned" in batch.sides:
        is_banned_S = _mask_side(batch, "banned")
        terms["banned"] = LossTerm(
            (unlikelihood_loss(losses_S[is_banned_S]) * weights_S[is_banned_S]).sum(),
            normalizer.banned,
            loss_config.ban_coefficient,
        )
    if has_pairs and loss_config.nll_coefficient:
        terms["chosen"] = LossTerm(
            weighted_S[_mask_side(batch, "chosen")].sum(),
            normalizer.chosen,
            loss_config.nll_coefficient,
        )
    if "" in batch.sides:
        terms["answer"] = LossTerm(weighted_S[_mask_side(batch, "")].sum(), normalizer.answer)
    return terms


def unlikelihood_loss(losses_S: Tensor) -> Tensor:
    """Welleck 2019, equation 4: -log(1 - p) of tokens that should not be there, from their losses
    -log p. Its gradient in the logits is at most 1. A token that is certain to rounding counts as
    one that is certain to a rounding less: the value stays finite, and the gradient goes on."""
    eps = torch.finfo(losses_S.dtype).eps
    losses_S = losses_S + (losses_S.clamp(min=eps) - losses_S).detach()
    is_rare_S = losses_S > 1  # where 1 - p rounds away the last digits of p
    rare_losses_S = -torch.log1p(-torch.exp(-losses_S))
    return torch.where(is_rare_S, rare_losses_S, -torch.log(-torch.expm1(-losses_S)))


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True, eq=False)
class PreferenceLogps:
    """Log-probabilities of both answers, summed over their tokens. `before_P`: chosen minus
    rejected under the reference, the model before training."""

    chosen_logps_P: Tensor
    rejected_logps_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    weight_P: Tensor
    reference_margin_P: Tensor | None = None


def _collect_pair_logps(
    batch: Batch, logp_D: Tensor, reference_logps_D: Tensor | None
) -> PreferenceLogps:
    chosen_indices = [index for index, side in enumerate(batch.sides) if side == "chosen"]
    assert all(batch.sides[index + 1] == "rejected" for index in chosen_indices), (
        "a pair is in one pack"
    )
    chosen = torch.tensor(chosen_indices, device=logp_D.device)
    tokens_D = _sum_by_document(batch, torch.ones_like(logp_D[:1]).expand(len(batch.targets_S)))
    weights_D = _sum_by_document(batch, batch.weights_S.to(logp_D.dtype))
    return PreferenceLogps(
        chosen_logps_P=logp_D[chosen],
        rejected_logps_P=logp_D[chosen + 1],
        chosen_tokens_P=tokens_D[chosen],
        rejected_tokens_P=tokens_D[chosen + 1],
        weight_P=weights_D[chosen] / tokens_D[chosen],
        reference_margin_P=None
        if reference_logps_D is None
        else reference_logps_D[chosen] - reference_logps_D[chosen + 1],
    )


def _sum_by_document(batch: Batch, values_S: Tensor) -> Tensor:
    return values_S.new_zeros(len(batch.sides)).index_add(0, batch.document_S, values_S)


def _mask_side(batch: Batch, side: str) -> Tensor:
    """Which targets are of documents of this side."""
    is_side_D = torch.tensor(
        [document_side == side for document_side in batch.sides], device=batch.document_S.device
    )
    return is_side_D[batch.document_S]


@torch.no_grad()
def _compute_reference_logps(model: PackedCausalLM, batch: Batch) -> Tensor:
    """Log-probabilities [D] before training: kept ones, or those of the base, with the adapter
    switched off."""
    stored_logps = [
        reference
        for reference, side in zip(batch.reference_logps, batch.sides, strict=True)
        if side
    ]
    if None not in stored_logps:
        all_logps = [0.0 if reference is None else reference for reference in batch.reference_logps]
        return torch.tensor(all_logps, dtype=torch.float64, device=batch.tokens_T.device)
    with scaled_adapter(model.network, 0):
        return _sum_by_document(batch, -_compute_target_losses(model, batch, measure_target_losses))


def dpo_loss(pairs: PreferenceLogps, loss_config: LossConfig) -> Tensor:
    """Rafailov 2023, equation 7: -log sigmoid(beta * (margin now - margin before)), margins of
    summed nats."""
    assert pairs.reference_margin_P is not None
    margin_change_P = (
        pairs.chosen_logps_P
        - pairs.rejected_logps_P
        - pairs.reference_margin_P.to(pairs.chosen_logps_P.dtype)
    )
    return -F.logsigmoid(loss_config.beta * margin_change_P)


def orpo_loss(pairs: PreferenceLogps, loss_config: LossConfig) -> Tensor:
    """Hong 2024, equation 7: beta * -log sigmoid(log odds of chosen - log odds of rejected), of
    mean nats a token."""
    chosen_mean_P, rejected_mean_P = (
        pairs.chosen_logps_P / pairs.chosen_tokens_P,
        pairs.rejected_logps_P / pairs.rejected_tokens_P,
    )
    return -loss_config.beta * F.logsigmoid(
        _compute_log_odds(chosen_mean_P) - _compute_log_odds(rejected_mean_P)
    )


def _compute_log_odds(logp_P: Tensor) -> Tensor:
    """log(p / (1 - p)); the bound keeps a certain answer finite."""
    return logp_P - torch.log(-torch.expm1(logp_P.clamp(max=-1e-12)))


def simpo_loss(pairs: PreferenceLogps, loss_config: LossConfig) -> Tensor:
    """Meng 2024, equation 6: -log sigmoid(beta * difference of mean nats a token - gamma)."""
    difference_P = (
        pairs.chosen_logps_P / pairs.chosen_tokens_P
        - pairs.rejected_logps_P / pairs.rejected_tokens_P
    )
    return -F.logsigmoid(loss_config.beta * difference_P - loss_config.gamma)


PREFERENCE_LOSSES: dict[str, Callable[[PreferenceLogps, LossConfig], Tensor]] = {
    "dpo": dpo_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
}
REFERENCE_LOSSES = frozenset({"dpo"})  # losses that compare with the model before training
