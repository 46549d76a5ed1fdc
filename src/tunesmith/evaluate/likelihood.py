"""How likely a model finds documents: negative log-likelihoods, packed as in training, without a gradient.

In: Documents and a LanguageModel. Out: for each document the sum over its supervised tokens, in nats, and their number.
Weights other than 0 count as 1: they are a wish for training, not for measuring. A pack that memory has no room for is
measured in halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tunesmith.data.batch import collate
from tunesmith.data.pack import pack_step
from tunesmith.evaluate.compare import Measurement
from tunesmith.model.head import target_losses
from tunesmith.model.load import LanguageModel
from tunesmith.model.memory import OutOfMemory, memory_errors
from tunesmith.types import Batch, Document, Pack


def negative_log_likelihoods(
    model: LanguageModel, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> Iterator[tuple[int, float, int]]:
    """(index of the document, nats, tokens), as the packs are computed; documents without a target are left out."""
    assert not model.network.training, "measuring needs a model in evaluation mode"
    places = {id(document): i for i, document in enumerate(documents)}
    assert len(places) == len(documents), "a document stands in the list twice"
    trained = [document for document in documents if document.weights_L.any()]
    waiting = pack_step(trained, pack_length, share=share)[::-1]
    while waiting:
        pack = waiting.pop()
        half = len(pack.documents) // 2
        try:
            with memory_errors():
                nats, tokens = _pack_sums(model, collate(pack, model.device), len(pack.documents))
        except OutOfMemory:
            if not half:
                raise
            later = pack.shared and (0, *pack.shared[half + 1 :])
            waiting += [Pack(pack.documents[half:], later), Pack(pack.documents[:half], pack.shared[:half])]
            continue
        for document, nat, count in zip(pack.documents, nats, tokens, strict=True):
            yield places[id(document)], nat, count


@torch.no_grad()
def _pack_sums(model: LanguageModel, batch: Batch, count: int) -> tuple[list[float], list[int]]:
    """Nats and tokens of each document of a pack; sums are in fp64."""
    losses_S = target_losses(model.hidden(batch), model.head, batch.targets_S)
    nats = torch.zeros(count, dtype=torch.float64, device=losses_S.device)
    nats.index_add_(0, batch.document_S, losses_S.double())
    return nats.tolist(), batch.document_S.bincount(minlength=count).tolist()


def held_out_loss(
    model: LanguageModel, documents: Sequence[Document], *, task: str, pack_length: int, share: bool = False
) -> Measurement:
    """Mean loss of a supervised token, in nats. Items are rows: the documents of one row count as one."""
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for i, nat, count in sorted(negative_log_likelihoods(model, documents, pack_length, share=share)):
        row = documents[i].id
        nats[row], tokens[row] = nats.get(row, 0.0) + nat, tokens.get(row, 0) + count
    return Measurement(
        task=task,
        metric="loss",
        ids=tuple(nats),
        values=tuple(nats[row] / tokens[row] for row in nats),
        weights=tuple(float(tokens[row]) for row in nats),
        higher_is_better=False,
    )
