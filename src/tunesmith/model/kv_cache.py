"""Keys and values of the rows that generation extends, and attention over them.

In: each layer's new q, k, v. Rows have lengths of their own: no padding is computed, a new row may
join at any time and a finished one leaves at once. A prompt runs through the same packed attention
as training; what all prompts begin with is computed once. An extension by one token reads what its
row has stored. Left out: which tokens (infer/engine.py). Legend: T new tokens, B rows, N query
heads, K key/value heads, G = N / K, D head size, L stored tokens, n of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.types import PackLayout
from tunesmith.model.attention import (
    AttentionConfig,
    CosSin,
    apply_rotary_qk,
    attend,
    choose_backend,
    has_kernel,
    run_decode_kernel,
    run_prefix_kernel,
)

BLOCK_TOKENS = 64  # the stores grow to a multiple of this many tokens


class RaggedKVCache:
    """`lengths[b]` tokens are stored of row b. `admit` or `advance` precede the forward that fills
    new places."""

    def __init__(self, slots: int, max_length: int = 0) -> None:
        """Room for `slots` rows; the room for tokens grows, to no more than the `longest` row will
        need where that is known."""
        self.slots, self.max_length = slots, max_length
        self.lengths: list[int] = []
        self.prefix_length = 0  # how many tokens every new row starts with
        self._prefix_kv: dict[
            nn.Module, tuple[Tensor, Tensor]
        ] = {}  # layer -> their keys, values [shared, K, D]
        self._kv_buffers: dict[
            nn.Module, tuple[Tensor, Tensor]
        ] = {}  # layer -> keys, values [slots, K, capacity, D]
        # the first row of a prompt forward; None while rows are extended
        self._first_new_row: int | None = None
        self._rows_B = self._positions_B = torch.empty(0)
        self._decode_masks: dict[
            int | None, tuple[int, Tensor | None]
        ] = {}  # of one extension, by window
        self._prefill_masks: dict[
            tuple[int, int | None], Tensor
        ] = {}  # of one prompt forward, by length and window

    def begin_prefill(self, lengths: Sequence[int]) -> None:
        """The next forward is of new rows with so many tokens each, after the shared ones; they
        come last."""
        assert len(self.lengths) + len(lengths) <= self.slots, "more rows than slots"
        self._first_new_row = len(self.lengths)
        self.lengths += [self.prefix_length + length for length in lengths]
        self._prefill_masks = {}

    def begin_decode(self, device: torch.device) -> Tensor:
        """The next forward is of one more token for every row; returns their positions [B]."""
        self._first_new_row = None
        self._rows_B = torch.arange(len(self.lengths), device=device)
        self._positions_B = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._decode_masks = {}
        return self._positions_B

    def share_prefix(self) -> None:
        """Make the only row the beginning of every row to come."""
        (self.prefix_length,) = self.lengths
        for layer, buffers in self._kv_buffers.items():
            keys, values = (
                x[0, :, : self.prefix_length].transpose(0, 1).contiguous() for x in buffers
            )
            self._prefix_kv[layer] = (keys, values)
        self.drop_row(0)

    def drop_row(self, row: int) -> None:
        """Forget a row; the last one moves into its place."""
        length = self.lengths.pop()
        if row == len(self.lengths):
            return
        self.lengths[row] = length
        for buffers in self._kv_buffers.values():
            for x in buffers:
                x[row, :, :length] = x[len(self.lengths), :, :length]

    def attend(
        self,
        layer: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PackLayout,
        config: AttentionConfig,
        backend: str,
        cos_sin: CosSin | None = None,
    ) -> Tensor:
        """q [T, N, D], k and v [T, K, D] -> [T, N, D], and k and v are stored. `angles`: q and k
        are still to be turned."""
        kv_buffers = self._reserve_buffers(layer, k, v)
        can_use_kernel = choose_backend(backend, q) == "kernel" and has_kernel(q, config)
        if self._first_new_row is None and can_use_kernel:
            return run_decode_kernel(
                q, k, v, kv_buffers, self._positions_B, self.prefix_length, config, cos_sin
            )
        q, k = apply_rotary_qk(q, k, cos_sin)
        if self._first_new_row is not None:
            return self._attend_prompts(layer, q, k, v, layout, config, backend, can_use_kernel)
        keys, values = kv_buffers
        keys[self._rows_B, :, self._positions_B] = k
        values[self._rows_B, :, self._positions_B] = v
        first_position, mask = self._get_decode_mask(config.window, q.dtype)
        stored_range = slice(0, len(q)), slice(None), slice(first_position, max(self.lengths))
        return attend_rows(q, keys[stored_range], values[stored_range], mask, config)

    def _attend_prompts(
        self,
        layer: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PackLayout,
        config: AttentionConfig,
        backend: str,
        can_use_kernel: bool,
    ) -> Tensor:
        prefix_kv, outputs = self._prefix_kv.get(layer), list[Tensor]()
        for row, (start, length) in enumerate(
            zip(layout.starts, layout.lengths, strict=True), self._first_new_row or 0
        ):
            token_range = slice(start, start + length)
            for kv_index, x in enumerate((k, v)):
                row_buffer = self._kv_buffers[layer][kv_index][row]
                row_buffer[:, self.prefix_length : self.prefix_length + length] = x[
                    token_range
                ].transpose(0, 1)
                if prefix_kv:
                    row_buffer[:, : self.prefix_length] = prefix_kv[kv_index].transpose(0, 1)
            if prefix_kv and not can_use_kernel:
                keys, values = (
                    x[row, :, : self.prefix_length + length] for x in self._kv_buffers[layer]
                )
                outputs.append(
                    attend_after_prefix(
                        q[token_range],
                        keys,
                        values,
                        self._get_prefill_mask(length, config.window, q),
                        config,
                    )
                )
        if not prefix_kv:
            return attend(q, k, v, layout, config, backend)
        return (
            run_prefix_kernel(q, k, v, prefix_kv, layout, config)
            if can_use_kernel
            else torch.cat(outputs)
        )

    def _reserve_buffers(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with room for the longest row."""
        min_capacity, buffers = max(self.lengths), self._kv_buffers.get(layer)
        if buffers is None or buffers[0].shape[2] < min_capacity:
            old_capacity = buffers[0].shape[2] if buffers else 0
            grown_capacity = old_capacity * 3 // 2
            capacity = (
                -(
                    -max(min_capacity, min(grown_capacity, self.max_length or grown_capacity))
                    // BLOCK_TOKENS
                )
                * BLOCK_TOKENS
            )
            # Zeros, since what is masked must still be finite.
            new_buffers = tuple(
                x.new_zeros(self.slots, x.shape[1], capacity, x.shape[2]) for x in (k, v)
            )
            for new, old in zip(new_buffers, buffers or (), strict=False):
                new[:, :, :old_capacity] = old
            self._kv_buffers[layer] = (new_buffers[0], new_buffers[1])
        return self._kv_buffers[layer]

    def _get_prefill_mask(self, length: int, window: int | None, q: Tensor) -> Tensor:
        """The mask [length, shared + length] of a prompt's own tokens, made once for all layers."""
        if (length, window) not in self._prefill_masks:
            positions = torch.arange(self.prefix_length + length, device=q.device)
            self._prefill_masks[length, window] = _build_score_mask(
                positions[-length:, None] - positions, window, q.dtype
            )
        return self._prefill_masks[length, window]

    def _get_decode_mask(self, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """The first stored place that any row sees, and the mask [B, 1, 1, L] from there on; None
        if all is seen."""
        if window not in self._decode_masks:
            shortest, longest = min(self.lengths), max(self.lengths)
            first_position = 0 if window is None else max(0, shortest - window)
            mask = None
            if shortest < longest:
                positions = torch.arange(first_position, longest, device=self._positions_B.device)
                mask = _build_score_mask(self._positions_B[:, None] - positions, window, dtype)[
                    :, None, None
                ]
            self._decode_masks[window] = (first_position, mask)
        return self._decode_masks[window]


def _build_score_mask(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to the score of a token that stands `back` places before: nothing, or minus
    infinity if it is not seen. As numbers, since torch would make them from truth values anew in
    every layer."""
    is_visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(
        ~is_visible, float("-inf")
    )


def attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, config: AttentionConfig
) -> Tensor:
    """One query a row: q [B, N, D], keys and values [B, K, L, D] -> [B, N, D]. The G heads that
    share a key stand as the queries of one product, which is several times faster than repeating
    the keys."""
    return _attend_grouped(q.unflatten(1, (keys.shape[1], -1)), keys, values, mask, config).flatten(
        1, 2
    )


def attend_after_prefix(
    q: Tensor, keys: Tensor, values: Tensor, mask_nL: Tensor, config: AttentionConfig
) -> Tensor:
    """The last n tokens of one row: q [n, N, D], keys and values [K, L, D] -> [n, N, D]."""
    (n, num_heads, head_dim), num_kv_heads = q.shape, len(keys)
    q_KMD = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # M = G * n queries a key head
    out = _attend_grouped(
        q_KMD[None], keys[None], values[None], mask_nL.repeat(num_heads // num_kv_heads, 1), config
    )
    return out[0].reshape(num_heads, n, head_dim).transpose(0, 1)


def _attend_grouped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, config: AttentionConfig
) -> Tensor:
    """q [B, K, M, D], keys and values [B, K, L, D] -> [B, K, M, D]."""
    if not config.softcap:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=config.scale)
    accum_dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(accum_dtype) @ keys.to(accum_dtype).transpose(-1, -2) * config.scale
    scores = config.softcap * torch.tanh(scores / config.softcap)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ values.to(accum_dtype)).to(q.dtype)
