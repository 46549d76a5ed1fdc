"""How far a model has moved from what its training started from, token by token.

    KL(base || tuned) of the next token, in nats, and whether both find the same token the likeliest

In: documents, a LanguageModel, its Base. Out: for each document the sums over its supervised tokens, and the loss that
the same forward gives. Exact for every method, over the whole vocabulary: an adapter is switched off for a second
forward of the same pack; where no switch brings the base back (all weights trained, an adapter that went on), its
final hidden states were kept before training, and its head if that is trained. Logits are made in chunks. Left out:
which texts (retention.py), how much is too much (the guard, the gate).
Legend: S targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.progress_log import watched
from tunesmith.core.types import Batch, Document
from tunesmith.evaluate.loglikelihood import MEASURED, by_document, loss_by_row, summed
from tunesmith.evaluate.results import Measurement
from tunesmith.model.adapters import adapter_scaled
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.kernels import ops
from tunesmith.model.lm_head import CHUNK_TARGETS
from tunesmith.model.safetensors_io import write_tensors

HEAD = "head.safetensors"


class Moved(NamedTuple):
    """Sums over the `tokens` supervised tokens of a document. `nats`: the tuned model's loss; `same`: how many have the
    same likeliest token."""

    nats: float
    tokens: int
    kl: float
    same: float


class Base(Protocol):
    """What the training started from. `places`: which documents of the list the batch holds."""

    def hidden(self, model: LanguageModel, batch: Batch, places: Sequence[int]) -> Tensor: ...

    def logits(self, model: LanguageModel, hidden_SH: Tensor) -> Tensor: ...  # raw ones


class Switched:
    """The model with its adapter off."""

    def hidden(self, model: LanguageModel, batch: Batch, places: Sequence[int]) -> Tensor:
        del places
        with adapter_scaled(model.network, 0):
            return model.hidden(batch)

    def logits(self, model: LanguageModel, hidden_SH: Tensor) -> Tensor:
        with adapter_scaled(model.network, 0):  # rows of new tokens are part of the head
            return model.head.raw_logits(hidden_SH)


@dataclass(frozen=True, eq=False)
class Kept:
    """States of the base on known documents, one tensor [S, H] each, and its head where that is trained: on the
    model's device and in its dtype, as every chunk of targets takes it."""

    states: tuple[Tensor, ...]
    head: Tensor | None = None

    def hidden(self, model: LanguageModel, batch: Batch, places: Sequence[int]) -> Tensor:
        del batch
        return torch.cat([self.states[place] for place in places]).to(model.device)

    def logits(self, model: LanguageModel, hidden_SH: Tensor) -> Tensor:
        head = model.head if self.head is None else replace(model.head, weight=self.head, new=None)
        return head.raw_logits(hidden_SH)

    def write(self, folder: Path, name: str) -> None:
        """As files of a folder; several lists of documents may share one, and the head, which is written once."""
        states = {f"{place:08d}": state for place, state in enumerate(self.states)}
        write_tensors(states, folder / f"{name}.safetensors")
        if self.head is not None and not (folder / HEAD).exists():
            write_tensors({"head": self.head}, folder / HEAD)

    @classmethod
    def read(cls, folder: Path, names: Iterable[str], device: torch.device) -> list[Kept]:
        """In the order of the names; all have one head."""
        head = load_file(folder / HEAD)["head"].to(device) if (folder / HEAD).exists() else None
        states = (load_file(folder / f"{name}.safetensors") for name in names)
        return [cls(tuple(one[place] for place in sorted(one)), head) for one in states]


@torch.no_grad()
def keep(model: LanguageModel, documents: Sequence[Document], pack_length: int, *, share: bool = False) -> Kept:
    """The states of a model that has not been trained yet: 2 H bytes a supervised token in bf16."""
    found = dict(by_document(model, documents, pack_length, _states, share=share))
    nothing = torch.empty(0, 0)
    head = model.head
    weight = head.weight.detach().to(model.dtype, copy=True) if head.trained.requires_grad else None
    return Kept(tuple(found.get(place, nothing) for place in range(len(documents))), weight)


@torch.no_grad()
def _states(model: LanguageModel, batch: Batch, places: Sequence[int]) -> Sequence[Tensor]:
    counts = batch.document_S.bincount(minlength=len(places)).tolist()
    return [state.clone() for state in model.hidden(batch).cpu().split(counts)]


def moved(
    model: LanguageModel, documents: Sequence[Document], pack_length: int, base: Base, *, share: bool = False
) -> Iterator[tuple[int, Moved]]:
    """(index of the document, how far it moved), as the packs are computed. Raises as likelihoods do."""
    found = by_document(model, documents, pack_length, partial(_pack_moved, base), share=share)
    yield from watched(found, len(documents), MEASURED)


@torch.no_grad()
def _pack_moved(base: Base, model: LanguageModel, batch: Batch, places: Sequence[int]) -> list[Moved]:
    base_SH, tuned_SH, chunks = base.hidden(model, batch, places), model.hidden(batch), []
    for start in range(0, len(tuned_SH), CHUNK_TARGETS):
        rows = slice(start, start + CHUNK_TARGETS)
        base_SV, head = base.logits(model, base_SH[rows]), model.head
        tuned_SV, targets_S = head.raw_logits(tuned_SH[rows]), batch.targets_S[rows]
        chunks.append(ops.divergence(base_SV, tuned_SV, targets_S, head.scale, head.cap))
    nats, kl, same = (summed(torch.cat(parts), batch) for parts in zip(*chunks, strict=True))
    counts = batch.document_S.bincount(minlength=len(places)).tolist()
    return [Moved(nat, count, 0.0 if d < 0 else d, s) for nat, count, d, s in zip(nats, counts, kl, same, strict=True)]


def measurements(
    task: str, ids: Sequence[str], found: Sequence[Moved], groups: Sequence[str] = ()
) -> tuple[Measurement, Measurement]:
    """`kl` and `top1_agreement` of items; tokens weigh alike within a group."""
    weights = tuple(float(one.tokens) for one in found)
    values = {"kl": [one.kl / one.tokens for one in found], "top1_agreement": [one.same / one.tokens for one in found]}
    kl, same = (
        Measurement(task, metric, tuple(ids), tuple(of_items), weights, tuple(groups), metric != "kl")
        for metric, of_items in values.items()
    )
    return kl, same


def held_out_beside(
    model: LanguageModel, documents: Sequence[Document], base: Base, *, task: str, pack_length: int, share: bool = False
) -> Iterator[Measurement]:
    """Mean loss of a supervised token, and beside the base: KL, and how often the likeliest token is the same. Items
    are rows."""
    parts: dict[str, list[Moved]] = {}
    for place, found in sorted(moved(model, documents, pack_length, base, share=share)):
        parts.setdefault(documents[place].id, []).append(found)
    rows = {row: joined(found) for row, found in parts.items()}
    yield loss_by_row(task, {row: (one.nats, one.tokens) for row, one in rows.items()})
    yield from measurements(task, list(rows), list(rows.values()))


def joined(parts: Sequence[Moved]) -> Moved:
    """Of the documents of one item."""
    return Moved(*(sum(values) for values in zip(*parts, strict=True)))
