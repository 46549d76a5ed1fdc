"""What a step minimises: named terms, each a sum over the step divided by its own count.

    answer      cross-entropy of the supervised tokens of plain documents
    preference  the loss of pairs (LOSSES)         chosen  cross-entropy of the chosen sides
    banned      unlikelihood of the bad tokens of answers that break a constraint

The counts are of the whole step (all packs, all ranks) and known before the first forward, so no split of the step into
packs can change the result. Legend: S targets, D documents, P pairs of a pack; log-probabilities in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import Batch, Document
from tunesmith.model.adapters import adapter_scaled
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.lm_head import Head, each_loss, supervised_loss, target_losses


@dataclass(frozen=True, eq=False)
class Term:
    """`sum` over this pack; `coefficient * sum / count` is what it adds to the step's loss."""

    sum: Tensor
    count: float
    coefficient: float = 1.0


@dataclass(frozen=True)
class Objective:
    """How pairs and bans are trained. `nll`, `ban`: coefficients of the terms `chosen` and `banned`."""

    loss: str = "dpo"
    beta: float = 0.1
    gamma: float = 0.0
    nll: float = 0.0
    ban: float = 1.0


@dataclass(frozen=True)
class Counts:
    """What the terms of a step divide by: sums of target weights, and of the weights of pairs."""

    answer: float = 0.0
    chosen: float = 0.0
    pairs: float = 0.0
    banned: float = 0.0

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Counts:
        chosen = [document for document in documents if document.side == "chosen"]
        return cls(
            answer=weight_count([document for document in documents if not document.side]),
            chosen=weight_count(chosen),
            banned=weight_count([document for document in documents if document.side == "banned"]),
            pairs=sum(weight_count([one]) / np.count_nonzero(one.weights_L) for one in chosen),
        )

    def __bool__(self) -> bool:
        return bool(self.answer or self.pairs or self.banned)


def weight_count(documents: Sequence[Document]) -> float:
    """The sum of the target weights, in fp64: what the mean of a weighted loss divides by."""
    return float(sum(document.weights_L.sum(dtype="float64") for document in documents))


def answer_loss(model: LanguageModel, batch: Batch, step_weight: float) -> dict[str, Term]:
    """Weighted cross-entropy of the supervised tokens."""
    once, _ = merged(batch)
    total, _ = supervised_loss(model.hidden(once), model.head, once.targets_S, once.weights_S)
    return {"answer": Term(total, step_weight)}


def merged(batch: Batch) -> tuple[Batch, Tensor | None]:
    """One target for all documents that share it, with the sum of their weights; whose it was is lost. And where each
    target of the batch has gone; None where it stays."""
    if not batch.layout.parents:
        return batch, None
    pairs_S, place_S = (batch.positions_S << 32 | batch.targets_S).unique(return_inverse=True)
    weights_S = batch.weights_S.new_zeros(len(pairs_S)).index_add_(0, place_S, batch.weights_S)
    positions_S, targets_S = pairs_S >> 32, pairs_S & (1 << 32) - 1
    nobody_S = torch.full_like(targets_S, -1)
    once = dataclasses.replace(
        batch, positions_S=positions_S, targets_S=targets_S, weights_S=weights_S, document_S=nobody_S
    )
    return once, place_S


def _each(model: LanguageModel, batch: Batch, losses: Callable[[Tensor, Head, Tensor], Tensor]) -> Tensor:
    """The loss [S] of each target of each document; shared ones are computed once."""
    once, place_S = merged(batch)
    losses_S = losses(model.hidden(once), model.head, once.targets_S)
    return losses_S if place_S is None else losses_S[place_S]


def step_terms(model: LanguageModel, batch: Batch, counts: Counts, objective: Objective) -> dict[str, Term]:
    """The terms of one pack; plain documents and pairs may share it."""
    if not batch.sides:
        return answer_loss(model, batch, counts.answer)
    paired = "chosen" in batch.sides
    before_D = _references(model, batch) if paired and objective.loss in REFERENCED else None
    losses_S = _each(model, batch, each_loss)
    weights_S = batch.weights_S.to(losses_S.dtype)
    weighted_S, terms = losses_S * weights_S, dict[str, Term]()
    if paired:
        pairs = _pairs(batch, _by_document(batch, -losses_S), before_D)
        total_P = pairs.weight_P * LOSSES[objective.loss](pairs, objective)
        terms["preference"] = Term(total_P.sum(), counts.pairs)
    if "banned" in batch.sides:
        own_S = _of_side(batch, "banned")
        terms["banned"] = Term((unlikelihood(losses_S[own_S]) * weights_S[own_S]).sum(), counts.banned, objective.ban)
    if paired and objective.nll:
        terms["chosen"] = Term(weighted_S[_of_side(batch, "chosen")].sum(), counts.chosen, objective.nll)
    if "" in batch.sides:
        terms["answer"] = Term(weighted_S[_of_side(batch, "")].sum(), counts.answer)
    return terms


def unlikelihood(losses_S: Tensor) -> Tensor:
    """Welleck 2019, equation 4: -log(1 - p) of tokens that should not be there, from their losses -log p. Its gradient
    in the logits is at most 1. A token that is certain to rounding counts as one that is certain to a rounding less:
    the value stays finite, and the gradient goes on."""
    least = torch.finfo(losses_S.dtype).eps
    losses_S = losses_S + (losses_S.clamp(min=least) - losses_S).detach()
    unlikely = losses_S > 1  # where 1 - p rounds away the last digits of p
    rare = -torch.log1p(-torch.exp(-losses_S))
    return torch.where(unlikely, rare, -torch.log(-torch.expm1(-losses_S)))


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True, eq=False)
class Pairs:
    """Log-probabilities of both answers, summed over their tokens. `before_P`: chosen minus rejected under the
    reference, the model before training."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    weight_P: Tensor
    before_P: Tensor | None = None


def _pairs(batch: Batch, logp_D: Tensor, before_D: Tensor | None) -> Pairs:
    places = [place for place, side in enumerate(batch.sides) if side == "chosen"]
    assert all(batch.sides[place + 1] == "rejected" for place in places), "a pair is in one pack"
    chosen = torch.tensor(places, device=logp_D.device)
    tokens_D = _by_document(batch, torch.ones_like(logp_D[:1]).expand(len(batch.targets_S)))
    weights_D = _by_document(batch, batch.weights_S.to(logp_D.dtype))
    return Pairs(
        chosen_P=logp_D[chosen],
        rejected_P=logp_D[chosen + 1],
        chosen_tokens_P=tokens_D[chosen],
        rejected_tokens_P=tokens_D[chosen + 1],
        weight_P=weights_D[chosen] / tokens_D[chosen],
        before_P=None if before_D is None else before_D[chosen] - before_D[chosen + 1],
    )


def _by_document(batch: Batch, values_S: Tensor) -> Tensor:
    return values_S.new_zeros(len(batch.sides)).index_add(0, batch.document_S, values_S)


def _of_side(batch: Batch, side: str) -> Tensor:
    """Which targets are of documents of this side."""
    own_D = torch.tensor([one == side for one in batch.sides], device=batch.document_S.device)
    return own_D[batch.document_S]


@torch.no_grad()
def _references(model: LanguageModel, batch: Batch) -> Tensor:
    """Log-probabilities [D] before training: kept ones, or those of the base, with the adapter switched off."""
    kept = [reference for reference, side in zip(batch.references, batch.sides, strict=True) if side]
    if None not in kept:
        every = [0.0 if reference is None else reference for reference in batch.references]
        return torch.tensor(every, dtype=torch.float64, device=batch.tokens_T.device)
    with adapter_scaled(model.network, 0):
        return _by_document(batch, -_each(model, batch, target_losses))


def dpo(pairs: Pairs, objective: Objective) -> Tensor:
    """Rafailov 2023, equation 7: -log sigmoid(beta * (margin now - margin before)), margins of summed nats."""
    assert pairs.before_P is not None
    change_P = pairs.chosen_P - pairs.rejected_P - pairs.before_P.to(pairs.chosen_P.dtype)
    return -F.logsigmoid(objective.beta * change_P)


def orpo(pairs: Pairs, objective: Objective) -> Tensor:
    """Hong 2024, equation 7: beta * -log sigmoid(log odds of chosen - log odds of rejected), of mean nats a token."""
    chosen_P, rejected_P = pairs.chosen_P / pairs.chosen_tokens_P, pairs.rejected_P / pairs.rejected_tokens_P
    return -objective.beta * F.logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def _log_odds(logp_P: Tensor) -> Tensor:
    """log(p / (1 - p)); the bound keeps a certain answer finite."""
    return logp_P - torch.log(-torch.expm1(logp_P.clamp(max=-1e-12)))


def simpo(pairs: Pairs, objective: Objective) -> Tensor:
    """Meng 2024, equation 6: -log sigmoid(beta * difference of mean nats a token - gamma)."""
    difference_P = pairs.chosen_P / pairs.chosen_tokens_P - pairs.rejected_P / pairs.rejected_tokens_P
    return -F.logsigmoid(objective.beta * difference_P - objective.gamma)


LOSSES: dict[str, Callable[[Pairs, Objective], Tensor]] = {"dpo": dpo, "orpo": orpo, "simpo": simpo}
REFERENCED = frozenset({"dpo"})  # losses that compare with the model before training
