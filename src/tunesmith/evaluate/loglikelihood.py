"""How likely a model finds documents: negative log-likelihoods, packed as in training, without a gradient.

In: Documents and a LanguageModel. Out: for each document the sum over its supervised tokens, in nats, and their number.
Weights other than 0 count as 1: they are a wish for training, not for measuring. A pack that memory has no room for is
measured in halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from tunesmith.core.progress_log import watched
from tunesmith.core.types import Batch, Document, Pack
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.lm_head import target_losses
from tunesmith.model.oom import OutOfMemory, memory_errors

T = TypeVar("T")
MEASURED = "texts and answers measured"  # what is told of the progress


def negative_log_likelihoods(
    model: LanguageModel, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> Iterator[tuple[int, float, int]]:
    """(index of the document, nats, tokens), as the packs are computed; documents without a target are left out."""
    found = by_document(model, documents, pack_length, _pack_sums, share=share)
    for place, (nats, tokens) in watched(found, len(documents), MEASURED):
        yield place, nats, tokens


def by_document(
    model: LanguageModel,
    documents: Sequence[Document],
    pack_length: int,
    work: Callable[[LanguageModel, Batch, Sequence[int]], Sequence[T]],
    *,
    share: bool = False,
) -> Iterator[tuple[int, T]]:
    """(index of the document, what `work` says of it). `work` gets a batch and the indices of its documents, and says
    something of each."""
    assert not model.network.training, "measuring needs a model in evaluation mode"
    places = {id(document): i for i, document in enumerate(documents)}
    assert len(places) == len(documents), "a document stands in the list twice"
    trained = [document for document in documents if document.weights_L.any()]
    waiting = pack_step(trained, pack_length, share=share)[::-1]
    while waiting:
        pack = waiting.pop()
        half, own = len(pack.documents) // 2, [places[id(document)] for document in pack.documents]
        try:
            with memory_errors():
                found = work(model, collate(pack, model.device), own)
        except OutOfMemory:
            if not half:
                raise
            later = pack.shared and (0, *pack.shared[half + 1 :])
            waiting += [Pack(pack.documents[half:], later), Pack(pack.documents[:half], pack.shared[:half])]
            continue
        yield from zip(own, found, strict=True)


@torch.no_grad()
def _pack_sums(model: LanguageModel, batch: Batch, places: Sequence[int]) -> list[tuple[float, int]]:
    """Nats and tokens of each document of a pack."""
    losses_S = target_losses(model.hidden(batch), model.head, batch.targets_S)
    counts = batch.document_S.bincount(minlength=len(places)).tolist()
    return list(zip(summed(losses_S, batch), counts, strict=True))


def mean_states(
    model: LanguageModel, documents: Sequence[Document], pack_length: int
) -> Iterator[tuple[int, list[float]]]:
    """(index of the document, mean of the final hidden states [H] that predict its targets)."""
    return by_document(model, documents, pack_length, _pack_means)


@torch.no_grad()
def _pack_means(model: LanguageModel, batch: Batch, places: Sequence[int]) -> list[list[float]]:
    hidden_SH = model.hidden(batch).float()
    sums_DH = hidden_SH.new_zeros((len(places), hidden_SH.shape[1])).index_add_(0, batch.document_S, hidden_SH)
    return (sums_DH / batch.document_S.bincount(minlength=len(places))[:, None]).tolist()


def summed(values_S: torch.Tensor, batch: Batch) -> list[float]:
    """Of each document, in fp64."""
    sums_D = torch.zeros(len(batch.ids), dtype=torch.float64, device=values_S.device)
    return sums_D.index_add_(0, batch.document_S, values_S.double()).tolist()


def held_out_loss(
    model: LanguageModel, documents: Sequence[Document], *, task: str, pack_length: int, share: bool = False
) -> Measurement:
    """Mean loss of a supervised token, in nats. Items are rows: the documents of one row count as one."""
    rows: dict[str, tuple[float, int]] = {}
    for i, nat, count in sorted(negative_log_likelihoods(model, documents, pack_length, share=share)):
        nats, tokens = rows.get(documents[i].id, (0.0, 0))
        rows[documents[i].id] = nats + nat, tokens + count
    return loss_by_row(task, rows)


def loss_by_row(task: str, rows: Mapping[str, tuple[float, int]]) -> Measurement:
    """From nats and tokens of each row."""
    return Measurement(
        task=task,
        metric="loss",
        ids=tuple(rows),
        values=tuple(nats / tokens for nats, tokens in rows.values()),
        weights=tuple(float(tokens) for _, tokens in rows.values()),
        higher_is_better=False,
    )


def per_byte(loss: Measurement, documents: Sequence[Document], renderer: Renderer) -> Measurement:
    """The same losses in bits per byte of the answers' UTF-8: comparable between tokenizers, as a loss per token is
    not. The end token counts among the bits, and has no bytes."""
    sizes = dict.fromkeys(loss.ids, 0)
    for document in documents:
        if document.id in sizes and document.right:
            targets = document.tokens_L[document.weights_L != 0].tolist()
            answer = renderer.decode([token for token in targets if token not in renderer.end_ids])
            sizes[document.id] += len(answer.encode())
    kept = [i for i, row in enumerate(loss.ids) if sizes[row]]
    bits = [loss.values[i] * loss.weights[i] / math.log(2) for i in kept]
    weights = tuple(float(sizes[loss.ids[i]]) for i in kept)
    values = tuple(found / weight for found, weight in zip(bits, weights, strict=True))
    ids = tuple(loss.ids[i] for i in kept)
    return replace(loss, metric=BITS_PER_BYTE, ids=ids, values=values, weights=weights)
