"""Compute the KL divergence between a model and the one that its training started from.

    KL(base || tuned) of the next token in nats, and top-1 agreement, over the whole vocabulary

In: documents, a model, its BaseReference. Out: per document, the sums over its supervised tokens,
and the loss of the same forward pass. Exact for every method: an adapter is switched off for a
second forward pass of the same pack. Where that does not restore the base (all weights are trained,
or an existing adapter is trained further), its final hidden states were cached before training, and
its head if that is trained. Logits are computed in chunks.
Left out: which texts (general_text.py), how much is too much (train/guard, regression_gate.py).
Legend: S targets, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Batch, Document
from tunesmith.evaluate.loglikelihood import (
    PROGRESS_LABEL,
    build_loss_measurement,
    map_documents,
    pack_documents,
    sum_by_document,
)
from tunesmith.evaluate.results import MetricValues
from tunesmith.evaluate.shared_items import Scorer, score_packs
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.kernels import ops
from tunesmith.model.lm_head import CHUNK_TARGETS
from tunesmith.model.safetensors_io import load_tensors, write_tensors

HEAD_FILE = "head.safetensors"


class KLResult(NamedTuple):
    """Sums over the supervised tokens of a document. `nats` is the tuned model's loss."""

    nats: float
    tokens: int
    kl: float
    top1_matches: float


class BaseReference(Protocol):
    """The model that training started from. `indices`: the documents of the batch in their
    list."""

    def compute_hidden(
        self, model: PackedCausalLM, batch: Batch, indices: Sequence[int]
    ) -> Tensor: ...

    def compute_logits(self, model: PackedCausalLM, hidden_SH: Tensor) -> Tensor: ...


class AdapterDisabled:
    """The model with its adapter switched off."""

    def compute_hidden(self, model: PackedCausalLM, batch: Batch, indices: Sequence[int]) -> Tensor:
        del indices
        with scaled_adapter(model.network, 0):
            return model.compute_hidden(batch)

    def compute_logits(self, model: PackedCausalLM, hidden_SH: Tensor) -> Tensor:
        # Embeddings of added tokens are part of the adapter, and of the head.
        with scaled_adapter(model.network, 0):
            return model.head.compute_raw_logits(hidden_SH)


@dataclass(frozen=True, eq=False)
class CachedStates:
    """Hidden states [S, H] of the base model per document, and its head if that is trained.

    The head is on the model's device and in its dtype, since every chunk of targets uses it.
    """

    states: tuple[Tensor, ...]
    head: Tensor | None = None

    def compute_hidden(self, model: PackedCausalLM, batch: Batch, indices: Sequence[int]) -> Tensor:
        del batch
        return torch.cat([self.states[index] for index in indices]).to(model.device)

    def compute_logits(self, model: PackedCausalLM, hidden_SH: Tensor) -> Tensor:
        head = model.head
        if self.head is not None:
            head = replace(head, weight=self.head, new_rows=None)
        return head.compute_raw_logits(hidden_SH)

    def save_files(self, folder: Path, name: str) -> None:
        """Write the states to folder/NAME.safetensors; the head is shared between names."""
        states = {f"{index:08d}": state for index, state in enumerate(self.states)}
        write_tensors(states, folder / f"{name}.safetensors")
        if self.head is not None and not (folder / HEAD_FILE).exists():
            write_tensors({"head": self.head}, folder / HEAD_FILE)

    @classmethod
    def load_files(
        cls, folder: Path, names: Iterable[str], device: torch.device
    ) -> list[CachedStates]:
        """Read what `save_files` wrote under each name."""
        head = None
        if (folder / HEAD_FILE).exists():
            head = load_tensors(folder / HEAD_FILE)["head"].to(device)
        cached: list[CachedStates] = []
        for name in names:
            tensors = load_tensors(folder / f"{name}.safetensors")
            cached.append(cls(tuple(tensors[key] for key in sorted(tensors)), head))
        return cached


@torch.no_grad()
def cache_states(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> CachedStates:
    """Return the states of a model before training: 2 H bytes per supervised token in bf16."""
    states = dict(map_documents(model, documents, pack_length, _compute_states, share=share))
    head_weight = None
    if model.head.trainable_weight.requires_grad:
        head_weight = model.head.weight.detach().to(model.dtype, copy=True)
    # Documents without a target have no states.
    empty_state = torch.empty(0, 0)
    ordered = tuple(states.get(index, empty_state) for index in range(len(documents)))
    return CachedStates(ordered, head_weight)


@torch.no_grad()
def _compute_states(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> Sequence[Tensor]:
    del indices
    states_SH = model.compute_hidden(batch).cpu()
    return [state.clone() for state in states_SH.split(batch.num_targets)]


def compute_kl(
    model: PackedCausalLM,
    documents: Sequence[Document],
    pack_length: int,
    base: BaseReference,
    *,
    share: bool = False,
) -> Iterator[tuple[int, KLResult]]:
    """Yield (document index, KLResult) pack by pack."""
    if isinstance(base, AdapterDisabled):
        packs = pack_documents(model, documents, pack_length, share=share)
        results = score_packs(model, packs, KL_SCORER, len(documents))
    else:  # only this rank has the cached states
        compute = partial(_compute_pack_kl, base)
        results = map_documents(model, documents, pack_length, compute, share=share)
    yield from log_progress(results, len(documents), PROGRESS_LABEL)


@torch.no_grad()
def _compute_pack_kl(
    base: BaseReference, model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[KLResult]:
    base_SH = base.compute_hidden(model, batch, indices)
    tuned_SH = model.compute_hidden(batch)
    head = model.head
    chunks: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(tuned_SH), CHUNK_TARGETS):
        rows = slice(start, start + CHUNK_TARGETS)
        base_SV = base.compute_logits(model, base_SH[rows])
        tuned_SV = head.compute_raw_logits(tuned_SH[rows])
        targets_S = batch.targets_S[rows]
        chunks.append(ops.kl_divergence(base_SV, tuned_SV, targets_S, head.scale, head.softcap))
    nats_S, kl_S, matches_S = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    nats = sum_by_document(nats_S, batch)
    kls = sum_by_document(kl_S, batch)
    matches = sum_by_document(matches_S, batch)
    counts = batch.num_targets
    # Rounding can make a divergence of 0 negative.
    return [
        KLResult(nats[i], counts[i], 0.0 if kls[i] < 0 else kls[i], matches[i])
        for i in range(len(indices))
    ]


KL_SCORER = Scorer("kl", KLResult, partial(_compute_pack_kl, AdapterDisabled()), 4)


def build_kl_measurements(
    task: str, ids: Sequence[str], results: Sequence[KLResult], strata: Sequence[str] = ()
) -> tuple[MetricValues, MetricValues]:
    """Return `kl` in nats/token and `top1_agreement` per item, weighted by tokens in a group."""
    weights = tuple(float(result.tokens) for result in results)
    kls = tuple(result.kl / result.tokens for result in results)
    agreements = tuple(result.top1_matches / result.tokens for result in results)
    kl = MetricValues(task, "kl", tuple(ids), kls, weights, tuple(strata), higher_is_better=False)
    agreement = MetricValues(task, "top1_agreement", tuple(ids), agreements, weights, tuple(strata))
    return kl, agreement


def measure_loss_and_kl(
    model: PackedCausalLM,
    documents: Sequence[Document],
    base: BaseReference,
    *,
    task: str,
    pack_length: int,
    share: bool = False,
) -> Iterator[MetricValues]:
    """Yield the mean loss, KL(base || tuned) and top-1 agreement per row."""
    parts: dict[str, list[KLResult]] = {}
    for index, result in sorted(compute_kl(model, documents, pack_length, base, share=share)):
        parts.setdefault(documents[index].id, []).append(result)
    rows = {row: sum_results(results) for row, results in parts.items()}
    sums = {row: (result.nats, result.tokens) for row, result in rows.items()}
    yield build_loss_measurement(task, sums)
    yield from build_kl_measurements(task, list(rows), list(rows.values()))


def sum_results(parts: Sequence[KLResult]) -> KLResult:
    """Return the sums over the documents of one item."""
    return KLResult(*(sum(values) for values in zip(*parts, strict=True)))
