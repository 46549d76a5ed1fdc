"""Rotary embeddings whose frequencies depend on the length of the sequence, document by document.

transformers chooses the frequencies of longrope (Phi-3-128k, Phi-3.5, Phi-4-mini) and of dynamic
NTK scaling once for a forward, from its largest position. In a pack, one long document would rotate
all others with its frequencies. `DocumentRotary` calls the stock module once for every choice, over
the pack, and keeps the part of the documents that make it. Left out: rotary embeddings that depend
on the position only, which stay stock. Legend: T tokens, L tokens of a document."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.types import PackLayout

RotationKey = Hashable  # documents with equal keys have the same frequencies


class DocumentRotary(nn.Module):
    """A stock rotary embedding that sees the lengths of the documents.

    `set_lengths` must precede each forward."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock
        self.limits = _read_limits(stock)
        self._lengths: tuple[int, ...] = ()  # of the document of each segment
        self._segment_lengths: tuple[int, ...] = ()

    @property
    def longest_limit(self) -> int:
        """The length up to which no frequency depends on the length."""
        return max(limit for _, limit in self.limits)

    def get_key(self, length: int) -> RotationKey:
        """Return what the frequencies of a document of `length` input tokens depend on."""
        key: list[int] = []
        for rope_type, limit in self.limits:
            if length <= limit:
                key.append(0)
            else:
                key.append(1 if rope_type == "longrope" else length)
        return tuple(key)

    def set_lengths(self, lengths: Sequence[int], segment_lengths: Sequence[int]) -> None:
        """Announce a forward: the length of each segment's document, and of the segment."""
        self._lengths = tuple(lengths)
        self._segment_lengths = tuple(segment_lengths)

    def forward(
        self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [1, T, D]."""
        lengths_by_key: dict[RotationKey, list[int]] = {}
        for length in self._lengths:
            lengths_by_key.setdefault(self.get_key(length), []).append(length)
        longest_by_key = {key: max(lengths) for key, lengths in lengths_by_key.items()}
        if len(longest_by_key) == 1:
            (longest,) = longest_by_key.values()
            return self._compute(x, position_ids, longest, *args, **kwargs)
        keys = list(longest_by_key)
        key_S = torch.tensor([keys.index(self.get_key(length)) for length in self._lengths])
        key_T = key_S.repeat_interleave(torch.tensor(self._segment_lengths)).to(x.device)
        tables: list[tuple[Tensor, Tensor]] = []
        for longest in longest_by_key.values():
            tables.append(self._compute(x, position_ids, longest, *args, **kwargs))
        cosine, sine = (torch.empty_like(table) for table in tables[0])
        for index, (key_cosine, key_sine) in enumerate(tables):
            is_key_T = (key_T == index)[None, :, None]
            cosine = torch.where(is_key_T, key_cosine, cosine)
            sine = torch.where(is_key_T, key_sine, sine)
        return cosine, sine

    def list_layer_types(self) -> list[tuple[str, ...]]:
        """Return the last arguments that `forward` is called with, per kind of layer."""
        rope_type: Any = getattr(self.stock, "rope_type", "default")
        return [(name,) for name in rope_type] if isinstance(rope_type, dict) else [()]

    def compute_alone(self, x: Tensor, length: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Call the stock module as in the first forward of a process, on one document."""
        _forget_earlier_lengths(self.stock)
        return self.stock(x, torch.arange(length, device=x.device)[None], *args)

    def _compute(
        self, x: Tensor, position_ids: Tensor, length: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Call the stock module as in a forward of one document of `length` tokens.

        Positions of longer documents, which the caller discards, are clamped."""
        _forget_earlier_lengths(self.stock)
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        clamped = torch.cat((position_ids.clamp(max=length - 1), last), dim=-1)
        cosine, sine = self.stock(x, clamped, *args, **kwargs)
        return cosine[:, :-1], sine[:, :-1]


def wrap_rotary(decoder: Any) -> DocumentRotary | None:
    """Replace the decoder's rotary embedding in place if it depends on the length, and return the
    replacement."""
    stock = getattr(decoder, "rotary_emb", None)
    if isinstance(stock, DocumentRotary):
        return stock
    if stock is None or not _read_limits(stock):
        return None
    decoder.rotary_emb = DocumentRotary(stock)
    return decoder.rotary_emb


def get_shortest_limit(network: Any) -> int | None:
    """Return the length up to which no frequency of a stock network depends on the length, None if
    none does at any length."""
    stock = getattr(network.base_model, "rotary_emb", None)
    limits = _read_limits(stock) if stock is not None else []
    return min((limit for _, limit in limits), default=None)


def measure_documents(layout: PackLayout) -> list[int]:
    """Return the length of the longest document through each segment.

    Documents that share a segment must have equal rotation keys (see `pack_step`)."""
    totals: list[int] = []
    for segment, length in enumerate(layout.lengths):
        totals.append(layout.count_prefix_tokens(segment) + length)
    for segment in reversed(range(len(layout.parents))):
        parent = layout.parents[segment]
        if parent >= 0:
            totals[parent] = max(totals[parent], totals[segment])
    return totals


def _read_limits(stock: Any) -> list[tuple[str, int]]:
    """Return the type and the longest unscaled length of each length-dependent part."""
    rope_type: Any = getattr(stock, "rope_type", "default")
    by_layer_type = rope_type if isinstance(rope_type, dict) else {"": rope_type}
    limits: list[tuple[str, int]] = []
    for layer_type, name in by_layer_type.items():
        if name == "longrope":
            parameters = stock.config.rope_parameters
            parameters = parameters[layer_type] if layer_type else parameters
            limits.append((name, int(parameters["original_max_position_embeddings"])))
        elif "dynamic" in str(name):
            limits.append((str(name), int(stock.original_max_seq_len)))
    return limits


def _forget_earlier_lengths(stock: Any) -> None:
    """Reset dynamic scaling, which keeps the frequencies of a longer sequence for the next one."""
    for name in list(vars(stock)):
        if name.endswith("max_seq_len_cached"):
            setattr(stock, name, stock.original_max_seq_len)
    layer_types = stock.rope_type if isinstance(stock.rope_type, dict) else ("",)
    for layer_type in layer_types:
        prefix = f"{layer_type}_" if layer_type else ""
        original: Tensor = getattr(stock, f"{prefix}original_inv_freq")
        inv_freq: Tensor = getattr(stock, f"{prefix}inv_freq")
        setattr(stock, f"{prefix}inv_freq", original.to(inv_freq.device, copy=True))
