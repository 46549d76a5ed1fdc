"""Rows for new tokens in the embedding and the head.

    start_rows(network, tokens)           the matrices grow where they are short; each new row is the mean of its pieces
    train_rows(network, ids, modules)     the same rows as trainable masters; all others stay as they are, to the bit

The matrix itself holds the rows in use, in its own dtype, so lookups and products need to know of
no master. A tied head shares the embedding's. Left out: which tokens (data/new_tokens.py), files
(saved.py). Legend: K new tokens, V vocabulary, H hidden."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.types import NewToken


class NewTokenRows(nn.Module):
    """The rows `span` of a frozen matrix [V, H] as masters [K, H] of at least fp32. `scale` 0 is
    how they started, 1 how they are. `path` is of the module that has the matrix."""

    start_KH: Tensor

    def __init__(self, weight_VH: Tensor, first_id: int, count: int, path: str) -> None:
        super().__init__()
        self.span, self.path, self.scale = slice(first_id, first_id + count), path, 1.0
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
        """Into the matrix, if it does not hold them yet; by their version: who changes one unknown
        to autograd has to increment that."""
        state = self.rows_KH._version, self.scale
        if self._written_state != state:
            weight_VH[self.span] = torch.lerp(self.start_KH, self.rows_KH, self.scale).to(weight_VH)
            self._written_state = state

    def insert_rows(self, ids: Tensor, out: Tensor, factor: Tensor | float) -> Tensor:
        """`out` [.., H], the rows of `ids` times `factor`, as a function of the masters where it is
        one."""
        is_new = (ids >= self.span.start) & (ids < self.span.stop)
        rows = F.embedding(ids[is_new] - self.span.start, self.rows_KH)
        return out.index_put((is_new,), rows.to(out.dtype) * factor)


def get_new_rows(module: nn.Module) -> NewTokenRows | None:
    """Those of an embedding or a head."""
    return getattr(module, "new_rows", None)


def collect_new_rows(network: nn.Module) -> dict[str, NewTokenRows]:
    """By the path of the module in the stock network; a tied head has none of its own."""
    return {module.path: module for module in network.modules() if isinstance(module, NewTokenRows)}


def find_embeddings(network: PreTrainedModel) -> dict[str, Any]:
    """Path -> the stock embedding, and the head unless it is tied to it."""
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    targets = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {
        path: module
        for path, module in network.named_modules()
        if any(module is target for target in targets)
    }


@torch.no_grad()
def init_new_rows(network: PreTrainedModel, tokens: Sequence[NewToken]) -> None:
    """As the mean of the rows of the pieces (Koto 2021, IndoBERTweet). A mean of rows gives a token
    no more than the mean of their unnormalised probabilities, so it does not push the others away
    before it has learnt anything (Hewitt 2021)."""
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
            weight_VH[token.id] = (
                weight_VH[list(token.subword_ids)].to(accum_dtype).mean(0).to(weight_VH)
            )


def add_trainable_rows(
    network: PreTrainedModel, ids: Sequence[int], modules: Collection[str]
) -> None:
    """Makes the rows of consecutive `ids` trainable in the matrices called so. No matrix may be
    left out: a token that is read or written by an untrained row stays what its pieces were."""
    embeddings = find_embeddings(network)
    assert {path.rpartition(".")[2] for path in embeddings} == set(modules), (
        "embedding and head are trained together"
    )
    for path, module in embeddings.items():
        module.new_rows = NewTokenRows(module.weight, ids[0], len(ids), path)
    if len(embeddings) == 1:
        head: Any = network.get_output_embeddings()
        head.new_rows = get_new_rows(next(iter(embeddings.values())))
