"""How far a model has moved from what its training started from, token by token.

    KL(base || tuned) of the next token, in nats, and whether both find the same token the likeliest

In: documents, a LanguageModel, its Base. Out: for each document the sums over its supervised
tokens, and the loss that the same forward gives. Exact for every method, over the whole vocabulary:
an adapter is switched off for a second forward of the same pack; where no switch brings the base
back (all weights trained, an adapter that went on), its final hidden states were kept before
training, and its head if that is trained. Logits are made in chunks. Left out: which texts
(retention.py), how much is too much (the guard, the gate). Legend: S targets, H hidden, V
vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.core.progress_log import log_progress
from tunesmith.core.types import Batch, Document
from tunesmith.evaluate.loglikelihood import (
    PROGRESS_LABEL,
    build_loss_measurement,
    map_documents,
    sum_by_document,
)
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.kernels import ops
from tunesmith.model.lm_head import CHUNK_TARGETS
from tunesmith.model.safetensors_io import write_tensors

HEAD_FILE = "head.safetensors"


class KLResult(NamedTuple):
    """Sums over the `tokens` supervised tokens of a document. `nats`: the tuned model's loss;
    `same`: how many have the same likeliest token."""

    nats: float
    tokens: int
    kl: float
    top1_matches: float


class BaseReference(Protocol):
    """What the training started from. `places`: which documents of the list the batch holds."""

    def compute_hidden(
        self, model: PackedCausalLM, batch: Batch, indices: Sequence[int]
    ) -> Tensor: ...

    def compute_logits(self, model: PackedCausalLM, hidden_SH: Tensor) -> Tensor: ...  # raw ones


class AdapterDisabled:
    """The model with its adapter off."""

    def compute_hidden(self, model: PackedCausalLM, batch: Batch, indices: Sequence[int]) -> Tensor:
        del indices
        with scaled_adapter(model.network, 0):
            return model.compute_hidden(batch)

    def compute_logits(self, model: PackedCausalLM, hidden_SH: Tensor) -> Tensor:
        with scaled_adapter(model.network, 0):  # rows of new tokens are part of the head
            return model.head.compute_raw_logits(hidden_SH)


@dataclass(frozen=True, eq=False)
class CachedStates:
    """States of the base on known documents, one tensor [S, H] each, and its head where that is
    trained: on the model's device and in its dtype, as every chunk of targets takes it."""

    states: tuple[Tensor, ...]
    head: Tensor | None = None

    def compute_hidden(self, model: PackedCausalLM, batch: Batch, indices: Sequence[int]) -> Tensor:
        del batch
        return torch.cat([self.states[index] for index in indices]).to(model.device)

    def compute_logits(self, model: PackedCausalLM, hidden_SH: Tensor) -> Tensor:
        head = (
            model.head
            if self.head is None
            else replace(model.head, weight=self.head, new_rows=None)
        )
        return head.compute_raw_logits(hidden_SH)

    def save_files(self, folder: Path, name: str) -> None:
        """As files of a folder; several lists of documents may share one, and the head, which is
        written once."""
        states = {f"{index:08d}": state for index, state in enumerate(self.states)}
        write_tensors(states, folder / f"{name}.safetensors")
        if self.head is not None and not (folder / HEAD_FILE).exists():
            write_tensors({"head": self.head}, folder / HEAD_FILE)

    @classmethod
    def load_files(
        cls, folder: Path, names: Iterable[str], device: torch.device
    ) -> list[CachedStates]:
        """In the order of the names; all have one head."""
        head = (
            load_file(folder / HEAD_FILE)["head"].to(device)
            if (folder / HEAD_FILE).exists()
            else None
        )
        states = (load_file(folder / f"{name}.safetensors") for name in names)
        return [cls(tuple(tensors[key] for key in sorted(tensors)), head) for tensors in states]


@torch.no_grad()
def cache_states(
    model: PackedCausalLM, documents: Sequence[Document], pack_length: int, *, share: bool = False
) -> CachedStates:
    """The states of a model that has not been trained yet: 2 H bytes a supervised token in bf16."""
    states = dict(map_documents(model, documents, pack_length, _compute_states, share=share))
    empty_state = torch.empty(0, 0)
    head = model.head
    head_weight = (
        head.weight.detach().to(model.dtype, copy=True)
        if head.trainable_weight.requires_grad
        else None
    )
    return CachedStates(
        tuple(states.get(index, empty_state) for index in range(len(documents))), head_weight
    )


@torch.no_grad()
def _compute_states(
    model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> Sequence[Tensor]:
    counts = batch.document_S.bincount(minlength=len(indices)).tolist()
    return [state.clone() for state in model.compute_hidden(batch).cpu().split(counts)]


def compute_kl(
    model: PackedCausalLM,
    documents: Sequence[Document],
    pack_length: int,
    base: BaseReference,
    *,
    share: bool = False,
) -> Iterator[tuple[int, KLResult]]:
    """(index of the document, how far it moved), as the packs are computed. Raises as likelihoods
    do."""
    results = map_documents(
        model, documents, pack_length, partial(_compute_pack_kl, base), share=share
    )
    yield from log_progress(results, len(documents), PROGRESS_LABEL)


@torch.no_grad()
def _compute_pack_kl(
    base: BaseReference, model: PackedCausalLM, batch: Batch, indices: Sequence[int]
) -> list[KLResult]:
    base_SH, tuned_SH, chunks = (
        base.compute_hidden(model, batch, indices),
        model.compute_hidden(batch),
        [],
    )
    for start in range(0, len(tuned_SH), CHUNK_TARGETS):
        rows = slice(start, start + CHUNK_TARGETS)
        base_SV, head = base.compute_logits(model, base_SH[rows]), model.head
        tuned_SV, targets_S = head.compute_raw_logits(tuned_SH[rows]), batch.targets_S[rows]
        chunks.append(ops.kl_divergence(base_SV, tuned_SV, targets_S, head.scale, head.softcap))
    nats, kl, matches = (
        sum_by_document(torch.cat(parts), batch) for parts in zip(*chunks, strict=True)
    )
    counts = batch.document_S.bincount(minlength=len(indices)).tolist()
    return [
        KLResult(nat, count, 0.0 if d < 0 else d, s)
        for nat, count, d, s in zip(nats, counts, kl, matches, strict=True)
    ]


def build_kl_measurements(
    task: str, ids: Sequence[str], results: Sequence[KLResult], groups: Sequence[str] = ()
) -> tuple[MetricValues, MetricValues]:
    """`kl` and `top1_agreement` of items; tokens weigh alike within a group."""
    weights = tuple(float(result.tokens) for result in results)
    values = {
        "kl": [result.kl / result.tokens for result in results],
        "top1_agreement": [result.top1_matches / result.tokens for result in results],
    }
    kl, agreement = (
        MetricValues(
            task, metric, tuple(ids), tuple(item_values), weights, tuple(groups), metric != "kl"
        )
        for metric, item_values in values.items()
    )
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
    """Mean loss of a supervised token, and beside the base: KL, and how often the likeliest token
    is the same. Items are rows."""
    parts: dict[str, list[KLResult]] = {}
    for index, result in sorted(compute_kl(model, documents, pack_length, base, share=share)):
        parts.setdefault(documents[index].id, []).append(result)
    rows = {row: sum_results(results) for row, results in parts.items()}
    yield build_loss_measurement(
        task, {row: (row_result.nats, row_result.tokens) for row, row_result in rows.items()}
    )
    yield from build_kl_measurements(task, list(rows), list(rows.values()))


def sum_results(parts: Sequence[KLResult]) -> KLResult:
    """Of the documents of one item."""
    return KLResult(*(sum(values) for values in zip(*parts, strict=True)))
