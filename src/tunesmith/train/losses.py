"""Losses: named terms, each a sum over the step divided by its own count.

    answer      cross-entropy of the supervised tokens of plain documents
    preference  the loss of pairs (PREFERENCE_LOSSES)
    chosen      cross-entropy of the chosen answers of pairs
    banned      unlikelihood of the banned tokens of answers that violate a constraint

Counts are of the step (all packs, all ranks) and known before the first forward, so no split of the
step into packs can change the result.

In: a pack as a Batch, the counts of its step. Out: LossTerms. Left out: backward (loop.py).
Shape suffixes: S targets, D documents, P pairs of a pack; log-probabilities in nats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.hardware import upload
from tunesmith.core.types import Batch, Document
from tunesmith.data.collate import share_targets
from tunesmith.data.sampler import LABELLED_SIDES
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import (
    LMHead,
    compute_supervised_loss,
    compute_target_losses,
    measure_target_losses,
)
from tunesmith.train.kto import LabelledLogps, kto_loss
from tunesmith.train.neftune import remove_embedding_noise

CHOSEN_SIDES = ("chosen", "desirable")
COUNTED_SIDES = ("chosen", *LABELLED_SIDES)  # a pair counts once, by its chosen side


@dataclass(frozen=True, eq=False)
class LossTerm:
    """`sum` over this pack; the term adds `coefficient * sum / count` to the step's loss."""

    sum: Tensor
    count: float
    coefficient: float = 1.0


@dataclass(frozen=True)
class LossConfig:
    """The loss of preference rows, the coefficients of the terms `chosen` and `banned`, and the
    smoothing of labels: those of tokens in the term `answer`, of whole pairs in `preference`."""

    loss: str = "dpo"
    beta: float = 0.1
    gamma: float = 0.0
    nll_coefficient: float = 0.0
    ban_coefficient: float = 1.0
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float = 0.0  # of the step, in KTO


@dataclass(frozen=True)
class LossNormalizer:
    """The counts of a step's terms: sums of target weights, and of the weights of pairs or of
    labelled answers."""

    answer: float = 0.0
    chosen: float = 0.0
    pairs: float = 0.0
    banned: float = 0.0

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> LossNormalizer:
        plain = [document for document in documents if not document.side]
        chosen = [document for document in documents if document.side in CHOSEN_SIDES]
        preferred = [document for document in documents if document.side in COUNTED_SIDES]
        banned = [document for document in documents if document.side == "banned"]
        pair_weights = [sum_weights([d]) / np.count_nonzero(d.weights_L) for d in preferred]
        return cls(
            answer=sum_weights(plain),
            chosen=sum_weights(chosen),
            pairs=float(sum(pair_weights)),
            banned=sum_weights(banned),
        )

    def __bool__(self) -> bool:
        return bool(self.answer or self.pairs or self.banned)


def sum_weights(documents: Sequence[Document]) -> float:
    """Return the sum of the target weights in fp64, the divisor of a weighted mean loss."""
    return float(sum(document.weights_L.sum(dtype="float64") for document in documents))


def compute_step_terms(
    model: PackedCausalLM, batch: Batch, normalizer: LossNormalizer, loss_config: LossConfig
) -> dict[str, LossTerm]:
    """Return the terms of one pack, which may hold plain documents and pairs."""
    if not batch.sides:
        return sft_loss(model, batch, normalizer.answer, loss_config.label_smoothing)
    has_pairs = "chosen" in batch.sides
    has_labels = any(side in LABELLED_SIDES for side in batch.sides)
    reference_logps_D: Tensor | None = None
    if (has_pairs or has_labels) and loss_config.loss in REFERENCE_LOSSES:
        reference_logps_D = _compute_reference_logps(model, batch)
    losses_S = _compute_target_losses(model, batch, compute_target_losses)
    weights_S = batch.weights_S.to(losses_S.dtype)
    weighted_S = losses_S * weights_S
    terms: dict[str, LossTerm] = {}
    if has_pairs:
        pairs = _collect_pair_logps(batch, _sum_by_document(batch, -losses_S), reference_logps_D)
        total_P = pairs.weight_P * PREFERENCE_LOSSES[loss_config.loss](pairs, loss_config)
        terms["preference"] = LossTerm(total_P.sum(), normalizer.pairs)
    if has_labels:
        assert reference_logps_D is not None
        terms["preference"] = _compute_kto_term(
            batch, -losses_S, reference_logps_D, normalizer, loss_config
        )
    if "banned" in batch.sides:
        index_S = _find_targets(batch, "banned")
        banned_S = unlikelihood_loss(losses_S[index_S]) * weights_S[index_S]
        terms["banned"] = LossTerm(banned_S.sum(), normalizer.banned, loss_config.ban_coefficient)
    if normalizer.chosen and loss_config.nll_coefficient:
        chosen_S = weighted_S[_find_targets(batch, *CHOSEN_SIDES)]
        terms["chosen"] = LossTerm(chosen_S.sum(), normalizer.chosen, loss_config.nll_coefficient)
    if "" in batch.sides:
        terms["answer"] = LossTerm(weighted_S[_find_targets(batch, "")].sum(), normalizer.answer)
    return terms


def sft_loss(
    model: PackedCausalLM, batch: Batch, step_weight: float, label_smoothing: float = 0.0
) -> dict[str, LossTerm]:
    """Return the weighted cross-entropy of the supervised tokens."""
    merged, _ = merge_shared_targets(batch)
    hidden_SH = model.compute_hidden(merged)
    total, _ = compute_supervised_loss(
        hidden_SH, model.head, merged.targets_S, merged.weights_S, label_smoothing
    )
    return {"answer": LossTerm(total, step_weight)}


def merge_shared_targets(batch: Batch) -> tuple[Batch, Tensor | None]:
    """Merge equal targets of the documents that share a prefix, with the sum of their weights.

    Return the batch, whose `document_S` is -1, and the merged index of each original target; None
    when no prefix is shared."""
    if not batch.layout.parents:
        return batch, None
    shared = batch.shared_targets
    if shared is None or not shared.is_for(batch):
        shared = share_targets(batch)
    weights_M = batch.weights_S.new_zeros(len(shared.targets_M))
    weights_M.index_add_(0, shared.target_S, batch.weights_S)
    positions_M = shared.positions_P[shared.position_M]
    merged = dataclasses.replace(
        batch,
        positions_S=positions_M,
        targets_S=shared.targets_M,
        weights_S=weights_M,
        document_S=torch.full_like(shared.targets_M, -1),
        num_targets=(),
        shared_targets=dataclasses.replace(
            shared,
            positions_S=positions_M,
            targets_S=shared.targets_M,
            position_S=shared.position_M,
            target_S=torch.arange(len(positions_M), device=positions_M.device),
        ),
    )
    return merged, shared.target_S


def _compute_target_losses(
    model: PackedCausalLM, batch: Batch, compute_losses: Callable[[Tensor, LMHead, Tensor], Tensor]
) -> Tensor:
    """Return the loss [S] of each target of each document; shared ones are computed once."""
    merged, inverse_S = merge_shared_targets(batch)
    losses_S = compute_losses(model.compute_hidden(merged), model.head, merged.targets_S)
    return losses_S if inverse_S is None else losses_S[inverse_S]


def unlikelihood_loss(losses_S: Tensor) -> Tensor:
    """Return -log(1 - p) of banned tokens, from their losses -log p (Welleck 2019, equation 4).

    Its gradient in the logits is at most 1. A token whose probability rounds to 1 is clamped one
    rounding below: the value stays finite, and the gradient still flows."""
    eps = torch.finfo(losses_S.dtype).eps
    losses_S = losses_S + (losses_S.clamp(min=eps) - losses_S).detach()
    is_rare_S = losses_S > 1  # where 1 - p would round away the last digits of p
    rare_losses_S = -torch.log1p(-torch.exp(-losses_S))
    return torch.where(is_rare_S, rare_losses_S, -torch.log(-torch.expm1(-losses_S)))


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True, eq=False)
class PreferenceLogps:
    """Summed log-probabilities [P] of both answers of each pair.

    `reference_margin_P` is chosen minus rejected under the reference, the model before training."""

    chosen_logps_P: Tensor
    rejected_logps_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    weight_P: Tensor
    reference_margin_P: Tensor | None = None


def _collect_pair_logps(
    batch: Batch, logps_D: Tensor, reference_logps_D: Tensor | None
) -> PreferenceLogps:
    chosen_indices = [index for index, side in enumerate(batch.sides) if side == "chosen"]
    for index in chosen_indices:
        assert batch.sides[index + 1] == "rejected", "a pair is in one pack"
    chosen = upload(chosen_indices, logps_D.device, torch.long)
    rejected = chosen + 1
    ones_S = torch.ones_like(logps_D[:1]).expand(len(batch.targets_S))
    tokens_D = _sum_by_document(batch, ones_S)
    weights_D = _sum_by_document(batch, batch.weights_S.to(logps_D.dtype))
    reference_margin_P: Tensor | None = None
    if reference_logps_D is not None:
        reference_margin_P = reference_logps_D[chosen] - reference_logps_D[rejected]
    return PreferenceLogps(
        chosen_logps_P=logps_D[chosen],
        rejected_logps_P=logps_D[rejected],
        chosen_tokens_P=tokens_D[chosen],
        rejected_tokens_P=tokens_D[rejected],
        weight_P=weights_D[chosen] / tokens_D[chosen],
        reference_margin_P=reference_margin_P,
    )


def _sum_by_document(batch: Batch, values_S: Tensor) -> Tensor:
    return values_S.new_zeros(len(batch.sides)).index_add(0, batch.document_S, values_S)


def _find_targets(batch: Batch, *sides: str) -> Tensor:
    """Return the indices into S of the targets of documents of these sides."""
    index_S: list[int] = []
    start = 0
    for side, count in zip(batch.sides, batch.num_targets, strict=True):
        if side in sides:
            index_S += range(start, start + count)
        start += count
    assert start in (len(batch.targets_S), 0), "the targets are those of the documents, or of none"
    return upload(index_S, batch.document_S.device, torch.long)


def _compute_kto_term(
    batch: Batch,
    logps_S: Tensor,
    reference_logps_D: Tensor,
    normalizer: LossNormalizer,
    loss_config: LossConfig,
) -> LossTerm:
    """Return the mean KTO loss of the labelled documents; a row's weight scales its share."""
    labelled = [index for index, side in enumerate(batch.sides) if side in LABELLED_SIDES]
    index_D = upload(labelled, logps_S.device, torch.long)
    is_desirable = [batch.sides[index] == "desirable" for index in labelled]
    tokens_D = _sum_by_document(batch, torch.ones_like(logps_S))[index_D]
    weights_D = _sum_by_document(batch, batch.weights_S.to(logps_S.dtype))[index_D]
    losses_D = kto_loss(
        LabelledLogps(
            _sum_by_document(batch, logps_S)[index_D],
            reference_logps_D[index_D],
            upload(is_desirable, logps_S.device, torch.bool),
        ),
        beta=loss_config.beta,
        kl=loss_config.kl,
        desirable_weight=loss_config.desirable_weight,
        undesirable_weight=loss_config.undesirable_weight,
    )
    return LossTerm((losses_D * weights_D / tokens_D).sum(), normalizer.pairs)


@torch.no_grad()
def _compute_reference_logps(model: PackedCausalLM, batch: Batch) -> Tensor:
    """Return log-probabilities [D] before training.

    They are stored in the batch, or those of the base model, with the adapter switched off."""
    is_stored = True
    logps: list[float] = []
    for reference, side in zip(batch.reference_logps, batch.sides, strict=True):
        is_stored = is_stored and not (side and reference is None)
        logps.append(reference or 0.0)
    if is_stored:
        return upload(logps, batch.tokens_T.device, torch.float64)
    batch = remove_embedding_noise(batch)
    with scaled_adapter(model.network, 0):
        return _sum_by_document(batch, -_compute_target_losses(model, batch, measure_target_losses))


def dpo_loss(pairs: PreferenceLogps, loss_config: LossConfig) -> Tensor:
    """Return -log sigmoid(beta * (margin - reference margin)) of summed log-probabilities.

    Rafailov 2023, equation 7."""
    assert pairs.reference_margin_P is not None
    margin_P = pairs.chosen_logps_P - pairs.rejected_logps_P
    change_P = margin_P - pairs.reference_margin_P.to(margin_P.dtype)
    return _compute_preference_nll(loss_config.beta * change_P, loss_config.label_smoothing)


def _compute_preference_nll(logits_P: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(logits), of which a share counts for the opposite preference (cDPO,
    Mitchell 2023, equation 3)."""
    losses_P = -F.logsigmoid(logits_P)
    if not label_smoothing:
        return losses_P
    return (1 - label_smoothing) * losses_P - label_smoothing * F.logsigmoid(-logits_P)


def orpo_loss(pairs: PreferenceLogps, loss_config: LossConfig) -> Tensor:
    """Return beta * -log sigmoid(log odds of chosen - log odds of rejected), per token.

    Hong 2024, equation 7."""
    chosen_P = _compute_log_odds(pairs.chosen_logps_P / pairs.chosen_tokens_P)
    rejected_P = _compute_log_odds(pairs.rejected_logps_P / pairs.rejected_tokens_P)
    return -loss_config.beta * F.logsigmoid(chosen_P - rejected_P)


def _compute_log_odds(logps_P: Tensor) -> Tensor:
    """Return log(p / (1 - p)); the clamp keeps a certain answer finite."""
    return logps_P - torch.log(-torch.expm1(logps_P.clamp(max=-1e-12)))


def simpo_loss(pairs: PreferenceLogps, loss_config: LossConfig) -> Tensor:
    """Return -log sigmoid(beta * difference of mean log-probabilities - gamma).

    Meng 2024, equation 6."""
    chosen_P = pairs.chosen_logps_P / pairs.chosen_tokens_P
    rejected_P = pairs.rejected_logps_P / pairs.rejected_tokens_P
    logits_P = loss_config.beta * (chosen_P - rejected_P) - loss_config.gamma
    return _compute_preference_nll(logits_P, loss_config.label_smoothing)


PREFERENCE_LOSSES: dict[str, Callable[[PreferenceLogps, LossConfig], Tensor]] = {
    "dpo": dpo_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
}
REFERENCE_LOSSES = frozenset({"dpo", "kto"})  # losses that compare with the model before training
