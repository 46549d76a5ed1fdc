"""KTO (Ethayarajh 2024): answers that are desirable or not, without pairs.

    documents of a step -> split_mismatched -> those to train, and those of the KL term
    mismatched documents -> measure_kl      -> KL(model || reference) of the step, at least 0
    LabelledLogps, LossConfig -> kto_loss   -> the loss of each document

The KL term is estimated on mismatched documents: each prompt of the step with the answer to another
prompt; for rows of a single answer, with that of the row before it, as in TRL. It is measured once
per step, before the first backward, so no split of the step into packs changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import measure_target_losses


@dataclass(frozen=True, eq=False)
class LabelledLogps:
    """Summed log-probabilities [D] of answers, under the model and under the reference."""

    logps_D: Tensor
    reference_logps_D: Tensor
    is_desirable_D: Tensor


def kto_loss(
    answers: LabelledLogps,
    *,
    beta: float,
    kl: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Return w * (1 - sigmoid(beta * (log-ratio - kl))) of desirable answers, and of others with
    the opposite sign.

    Ethayarajh 2024, equation 8."""
    ratios_D = answers.logps_D - answers.reference_logps_D.to(answers.logps_D.dtype)
    signs_D = torch.where(answers.is_desirable_D, 1, -1)
    weights_D = torch.full_like(ratios_D, undesirable_weight)
    weights_D[answers.is_desirable_D] = desirable_weight
    return weights_D * torch.sigmoid(-beta * signs_D * (ratios_D - kl))


def split_mismatched(
    documents: Sequence[Document],
) -> tuple[Sequence[Document], Sequence[Document]]:
    """Return the documents to train, and those that the KL term is measured on."""
    mismatched = [document for document in documents if document.side == "mismatched"]
    if not mismatched:
        return documents, ()
    return [document for document in documents if document.side != "mismatched"], mismatched


def measure_kl(model: PackedCausalLM, documents: Sequence[Document], pack_length: int) -> float:
    """Return the mean log-ratio of mismatched documents, at least 0; 0 without documents."""
    if not documents:
        return 0.0
    references = [document.reference_logp for document in documents]
    logps = measure_logps(model, documents, pack_length)
    if None in references:
        with scaled_adapter(model.network, 0):
            references = measure_logps(model, documents, pack_length)
    ratios = [logp - (reference or 0.0) for logp, reference in zip(logps, references, strict=True)]
    return max(0.0, sum(ratios) / len(ratios))


@torch.no_grad()
def measure_logps(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int
) -> list[float]:
    """Return the summed log-probability of the targets of each document."""
    index_by_id = {id(document): index for index, document in enumerate(documents)}
    logps = [0.0] * len(documents)
    model.network.eval()
    for pack in pack_step(documents, pack_length, get_group=model.get_rotation_key):
        batch = collate(pack, model.device)
        losses_S = measure_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
        sums_D = losses_S.new_zeros(len(pack.documents), dtype=torch.float64)
        sums_D.index_add_(0, batch.document_S, losses_S.double())
        for document, nats in zip(pack.documents, sums_D.tolist(), strict=True):
            logps[index_by_id[id(document)]] = -nats
    return logps
