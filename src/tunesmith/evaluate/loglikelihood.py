"""How likely a model finds documents: negative log-likelihoods, packed as in training, without a
gradient.

In: Documents and a LanguageModel. Out: for each document the sum over its supervised tokens, in
nats, and their number. Weights other than 0 count as 1: they are a wish for training, not for
measuring. A pack that memory has no room for is measured in halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Batch, Document, Pack
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.model.oom import OutOfMemory, memory_errors

T = TypeVar("T")
PROGRESS_LABEL = "texts and answers measured"  # what is told of the progress


def compute_nll(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> Iterator[tuple[int, float, int]]:
    """(index of the document, nats, tokens), as the packs are computed; documents without a target
    are left out."""
    pack_sums = map_documents(model, documents, pack_length, _compute_pack_nll, share=share)
    for index, (nats, tokens) in log_progress(pack_sums, len(documents), PROGRESS_LABEL):
        yield index, nats, tokens


def map_documents(
    model: PackedCausalLM,
    documents: Sequence[Document],
    pack_length: int,
    compute: Callable[[PackedCausalLM, Batch, Sequence[int]], Sequence[T]],
    *,
    share: bool = False,
) -> Iterator[tuple[int, T]]:
    """(index of the document, what `work` says of it). `work` gets a batch and the indices of its
    documents, and says something of each."""
    assert not model.network.training, "measuring needs a model in evaluation mode"
    index_by_id = {id(document): i for i, document in enumerate(documents)}
    assert len(index_by_id) == len(documents), "a document stands in the list twice"
    supervised = [document for document in documents if document.weights_L.any()]
    pending = pack_step(supervised, pack_length, should_share=share)[::-1]
    while pending:
        pack = pending.pop()
        half, indices = (
            len(pack.documents) // 2,
            [index_by_id[id(document)] for document in pack.documents],
        )
        try:
            with memory_errors():
                results = compute(model, collate(pack, model.device), indices)
        except OutOfMemory:
            if not half:
                raise
            second_shared = pack.prefix_lengths and (0, *pack.prefix_lengths[half + 1 :])
            pending += [
                Pack(pack.documents[half:], second_shared),
                Pack(pack.documents[:half], pack.prefix_lengths[:half]),
            ]
            continue
        yield from zip(indices, results, strict=True)


@torch.no_grad()
def _compute_pack_nll(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[tuple[float, int]]:
    """Nats and tokens of each document of a pack."""
    losses_S = measure_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
    counts = batch.document_S.bincount(minlength=len(indices)).tolist()
    return list(zip(sum_by_document(losses_S, batch), counts, strict=True))


def compute_mean_states(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int
) -> Iterator[tuple[int, list[float]]]:
    """(index of the document, mean of the final hidden states [H] that predict its targets)."""
    return map_documents(model, documents, pack_length, _compute_pack_means)


@torch.no_grad()
def _compute_pack_means(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[list[float]]:
    hidden_SH = model.compute_hidden(batch).float()
    sums_DH = hidden_SH.new_zeros((len(indices), hidden_SH.shape[1])).index_add_(
        0, batch.document_S, hidden_SH
    )
    return (sums_DH / batch.document_S.bincount(minlength=len(indices))[:, None]).tolist()


def sum_by_document(values_S: torch.Tensor, batch: Batch) -> list[float]:
    """Of each document, in fp64."""
    sums_D = torch.zeros(len(batch.ids), dtype=torch.float64, device=values_S.device)
    return sums_D.index_add_(0, batch.document_S, values_S.double()).tolist()


def measure_loss(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> MetricValues:
    """Mean loss of a supervised token, in nats. Items are rows: the documents of one row count as
    one."""
    rows: dict[str, tuple[float, int]] = {}
    for i, nat, count in sorted(compute_nll(model, documents, pack_length, share=share)):
        nats, tokens = rows.get(documents[i].id, (0.0, 0))
        rows[documents[i].id] = nats + nat, tokens + count
    return build_loss_measurement(task, rows)


def build_loss_measurement(task: str, rows: Mapping[str, tuple[float, int]]) -> MetricValues:
    """From nats and tokens of each row."""
    return MetricValues(
        task=task,
        metric="loss",
        ids=tuple(rows),
        values=tuple(nats / tokens for nats, tokens in rows.values()),
        weights=tuple(float(tokens) for _, tokens in rows.values()),
        higher_is_better=False,
    )


def to_bits_per_byte(
    loss: MetricValues, documents: Sequence[Document], renderer: Renderer
) -> MetricValues:
    """The same losses in bits per byte of the answers' UTF-8: comparable between tokenizers, as a
    loss per token is not. The end token counts among the bits, and has no bytes."""
    num_bytes = dict.fromkeys(loss.ids, 0)
    for document in documents:
        if document.id in num_bytes and document.is_correct:
            targets = document.tokens_L[document.weights_L != 0].tolist()
            answer = renderer.decode([token for token in targets if token not in renderer.end_ids])
            num_bytes[document.id] += len(answer.encode())
    indices = [i for i, row in enumerate(loss.ids) if num_bytes[row]]
    bits = [loss.values[i] * loss.weights[i] / math.log(2) for i in indices]
    weights = tuple(float(num_bytes[loss.ids[i]]) for i in indices)
    values = tuple(num_bits / weight for num_bits, weight in zip(bits, weights, strict=True))
    ids = tuple(loss.ids[i] for i in indices)
    return replace(loss, metric=BITS_PER_BYTE, ids=ids, values=values, weights=weights)
