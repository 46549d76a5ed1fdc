"""Rows for new tokens in the embedding and the head.

    init_new_rows(network, tokens)               grow the matrices; initialize rows from subwords
    add_trainable_rows(network, ids, modules)    train these rows; all others are unchanged

The matrix holds the current rows in its dtype, so lookups and products need not know about the
trainable copies. A tied head shares the embedding's. Left out: which tokens
(data/tokenizer), files (save.py). Legend: K new tokens, V vocabulary, H hidden."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.types import NewToken


class NewTokenRows(nn.Module):
    """Trainable copies [K, H] in at least fp32 of rows of a frozen matrix [V, H].

    `scale` interpolates from their start (0) to the trained rows (1). `path` is the module of the
    matrix."""

    start_KH: Tensor

    def __init__(self, weight_VH: Tensor, first_id: int, count: int, path: str) -> None:
        super().__init__()
        self.span = slice(first_id, first_id + count)
        self.path = path
        self.scale = 1.0
        start_KH = weight_VH.detach()[self.span]
        start_KH = start_KH.to(torch.promote_types(start_KH.dtype, torch.float32), copy=True)
        self.register_buffer("start_KH", start_KH, persistent=False)
        self.rows_KH = nn.Parameter(start_KH.clone())
        self._written_state: tuple[int, float] | None = None

    @property
    def ids(self) -> list[int]:
        return list(range(self.span.start, self.span.stop))

    @torch.no_grad()
    def write_into(self, weight_VH: Tensor) -> None:
        """Write the rows into the matrix, unless it already has this version of them: code that
        changes them behind autograd's back has to increment their version."""
        state = (self.rows_KH._version, self.scale)
        if self._written_state != state:
            weight_VH[self.span] = torch.lerp(self.start_KH, self.rows_KH, self.scale).to(weight_VH)
            self._written_state = state

    def insert_rows(self, ids: Tensor, out: Tensor, factor: Tensor | float) -> Tensor:
        """Replace the embeddings `out` [.., H] of new tokens by the trainable rows times `factor`,
        so that they receive gradients."""
        is_new = (ids >= self.span.start) & (ids < self.span.stop)
        # a lookup of every token, since a GPU would have to wait for the number of new ones
        rows = F.embedding((ids - self.span.start).clamp(0, len(self.rows_KH) - 1), self.rows_KH)
        return torch.where(is_new[..., None], rows.to(out.dtype) * factor, out)


def get_new_rows(module: nn.Module) -> NewTokenRows | None:
    """Return the trainable rows of an embedding or a head."""
    return getattr(module, "new_rows", None)


def collect_new_rows(network: nn.Module) -> dict[str, NewTokenRows]:
    """Return path of the matrix in the stock network -> rows. A tied head is not listed."""
    return {module.path: module for module in network.modules() if isinstance(module, NewTokenRows)}


def find_embeddings(network: PreTrainedModel) -> dict[str, Any]:
    """Return path -> the stock embedding, and the head unless it is tied."""
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    embeddings: dict[str, Any] = {}
    for path, module in network.named_modules():
        if module is embedding or (module is head and not is_tied):
            embeddings[path] = module
    return embeddings


@torch.no_grad()
def init_new_rows(network: PreTrainedModel, tokens: Sequence[NewToken]) -> None:
    """Initialize each new row as the mean of the rows of its subwords (Koto 2021, IndoBERTweet).

    A mean of rows gives a token at most the mean of their unnormalized probabilities, so it does
    not displace other tokens before training (Hewitt 2021)."""
    if not tokens:
        return
    vocab_size = 1 + max(token.id for token in tokens)
    if vocab_size > network.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        network.resize_token_embeddings(vocab_size, mean_resizing=False)
        network.requires_grad_(False)
    for module in find_embeddings(network).values():
        weight_VH = module.weight
        accum_dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        for token in tokens:
            subwords_KH = weight_VH[list(token.subword_ids)].to(accum_dtype)
            weight_VH[token.id] = subwords_KH.mean(0).to(weight_VH)


def add_trainable_rows(
    network: PreTrainedModel, ids: Sequence[int], modules: Collection[str]
) -> None:
    """Make the rows of consecutive `ids` trainable in `modules`, which must be all embedding
    matrices: a token with an untrained row keeps the meaning of its subwords there."""
    embeddings = find_embeddings(network)
    names = {path.rpartition(".")[2] for path in embeddings}
    assert names == set(modules), "embedding and head are trained together"
    for path, module in embeddings.items():
        module.new_rows = NewTokenRows(module.weight, ids[0], len(ids), path)
    if len(embeddings) == 1:
        head: Any = network.get_output_embeddings()
        head.new_rows = get_new_rows(next(iter(embeddings.values())))
