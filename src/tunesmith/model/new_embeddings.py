"""Rows for new tokens in the embedding and the head.

    start_rows(network, tokens)           the matrices grow where they are short; each new row is the mean of its pieces
    train_rows(network, ids, modules)     the same rows as trainable masters; all others stay as they are, to the bit

The matrix itself holds the rows in use, in its own dtype, so lookups and products need to know of no master. A tied
head shares the embedding's. Left out: which tokens (data/new_tokens.py), files (saved.py).
Legend: K new tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.types import NewToken


class NewRows(nn.Module):
    """The rows `span` of a frozen matrix [V, H] as masters [K, H] of at least fp32. `scale` 0 is how they started,
    1 how they are. `path` is of the module that has the matrix."""

    start_KH: Tensor

    def __init__(self, weight_VH: Tensor, first: int, count: int, path: str) -> None:
        super().__init__()
        self.span, self.path, self.scale = slice(first, first + count), path, 1.0
        start_KH = weight_VH.detach()[self.span]
        start_KH = start_KH.to(torch.promote_types(start_KH.dtype, torch.float32), copy=True)
        self.register_buffer("start_KH", start_KH, persistent=False)
        self.rows_KH = nn.Parameter(start_KH.clone())
        self._put: tuple[int, float] | None = None

    @property
    def ids(self) -> list[int]:
        return list(range(self.span.start, self.span.stop))

    @torch.no_grad()
    def put(self, weight_VH: Tensor) -> None:
        """Into the matrix, if it does not hold them yet; by their version: who changes one unknown to autograd has to
        increment that."""
        now = self.rows_KH._version, self.scale
        if self._put != now:
            weight_VH[self.span] = torch.lerp(self.start_KH, self.rows_KH, self.scale).to(weight_VH)
            self._put = now

    def looked_up(self, ids: Tensor, out: Tensor, factor: Tensor | float) -> Tensor:
        """`out` [.., H], the rows of `ids` times `factor`, as a function of the masters where it is one."""
        own = (ids >= self.span.start) & (ids < self.span.stop)
        rows = F.embedding(ids[own] - self.span.start, self.rows_KH)
        return out.index_put((own,), rows.to(out.dtype) * factor)


def rows_of(module: nn.Module) -> NewRows | None:
    """Those of an embedding or a head."""
    return getattr(module, "new_rows", None)


def new_rows(network: nn.Module) -> dict[str, NewRows]:
    """By the path of the module in the stock network; a tied head has none of its own."""
    return {module.path: module for module in network.modules() if isinstance(module, NewRows)}


def matrices(network: PreTrainedModel) -> dict[str, Any]:
    """Path -> the stock embedding, and the head unless it is tied to it."""
    embedding: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {path: module for path, module in network.named_modules() if any(module is one for one in wanted)}


@torch.no_grad()
def start_rows(network: PreTrainedModel, tokens: Sequence[NewToken]) -> None:
    """As the mean of the rows of the pieces (Koto 2021, IndoBERTweet). A mean of rows gives a token no more than the
    mean of their unnormalised probabilities, so it does not push the others away before it has learnt anything
    (Hewitt 2021)."""
    if not tokens:
        return
    size = 1 + max(token.id for token in tokens)
    if size > network.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        network.resize_token_embeddings(size, mean_resizing=False)
        network.requires_grad_(False)
    for module in matrices(network).values():
        weight_VH = module.weight
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        for token in tokens:
            weight_VH[token.id] = weight_VH[list(token.pieces)].to(wide).mean(0).to(weight_VH)


def train_rows(network: PreTrainedModel, ids: Sequence[int], modules: Collection[str]) -> None:
    """Makes the rows of consecutive `ids` trainable in the matrices called so. No matrix may be left out: a token that
    is read or written by an untrained row stays what its pieces were."""
    found = matrices(network)
    assert {path.rpartition(".")[2] for path in found} == set(modules), "embedding and head are trained together"
    for path, module in found.items():
        module.new_rows = NewRows(module.weight, ids[0], len(ids), path)
    if len(found) == 1:
        head: Any = network.get_output_embeddings()
        head.new_rows = rows_of(next(iter(found.values())))
