"""What the rows that generation extends keep: keys and values, attention over them, and the states
of recurrent layers.

In: each layer's new q, k and v, or its new states. Rows have different lengths without padding; a
new row may join at any time and a finished one leaves at once. Prompts run through the same packed
attention as training, and a prefix that all prompts share is computed once. A decode step attends
to what its row has stored. Left out: which tokens (generation/engine.py). Legend: T new tokens, B
rows, N query heads, K key/value heads, G = N / K, D head size, L stored tokens, n tokens of a
prompt."""

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
    compute_weights,
    has_kernel,
    run_decode_kernel,
    run_prefix_kernel,
)

BLOCK_TOKENS = 64  # buffers grow to a multiple of this many tokens
KeysValues = tuple[Tensor, Tensor]
States = tuple[Tensor, ...]  # of a recurrent layer, each [rows, ...]


class RaggedKVCache:
    """Keys, values and states of up to `slots` rows; row b has `lengths[b]` tokens.

    `begin_prefill` or `begin_decode` must precede the forward that fills the new positions."""

    def __init__(self, slots: int, max_length: int = 0) -> None:
        """Reserve `slots` rows of `max_length` tokens; if it is 0, room grows on demand. Growing
        copies every layer, and leaves gaps in the heap that the larger buffers do not fit in."""
        self.slots = slots
        self.max_length = max_length
        self.lengths: list[int] = []
        self.prefix_length = 0  # tokens that every new row starts with
        # layer -> keys, values of the prefix [prefix_length, K, D]
        self._prefix_kv: dict[nn.Module, KeysValues] = {}
        # layer -> keys, values [slots, K, capacity, D]
        self._kv_buffers: dict[nn.Module, KeysValues] = {}
        # recurrent layer -> states at the end of the prefix [1, ...], of the rows [slots, ...]
        self._prefix_states: dict[nn.Module, States] = {}
        self._state_buffers: dict[nn.Module, States] = {}
        # the first row of a prompt forward; None while rows are extended
        self._first_new_row: int | None = None
        self._rows_B = torch.empty(0)
        self._positions_B = torch.empty(0)
        # masks of the current decode step by window, of the current prompts by length and window
        self._decode_masks: dict[int | None, tuple[int, Tensor | None]] = {}
        self._prefill_masks: dict[tuple[int, int | None], Tensor] = {}

    def begin_prefill(self, lengths: Sequence[int]) -> None:
        """Announce a forward of new rows with `lengths` tokens each after the prefix; they are
        appended."""
        assert len(self.lengths) + len(lengths) <= self.slots, "more rows than slots"
        self._first_new_row = len(self.lengths)
        self.lengths += [self.prefix_length + length for length in lengths]
        self._prefill_masks = {}

    def begin_decode(self, device: torch.device) -> Tensor:
        """Announce a forward of one more token for every row, and return their positions [B]."""
        self._first_new_row = None
        self._rows_B = torch.arange(len(self.lengths), device=device)
        self._positions_B = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._decode_masks = {}
        return self._positions_B

    def share_prefix(self) -> None:
        """Turn the only row into the prefix of every later row."""
        (self.prefix_length,) = self.lengths
        for layer, (keys, values) in self._kv_buffers.items():
            prefix_keys = keys[0, :, : self.prefix_length].transpose(0, 1).contiguous()
            prefix_values = values[0, :, : self.prefix_length].transpose(0, 1).contiguous()
            self._prefix_kv[layer] = (prefix_keys, prefix_values)
        for layer, states in self._state_buffers.items():
            self._prefix_states[layer] = tuple(state[:1].clone() for state in states)
        self.drop_row(0)

    def drop_row(self, row: int) -> None:
        """Remove a row; the last row moves to its index."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if row == last:
            return
        self.lengths[row] = length
        for buffers in self._kv_buffers.values():
            for x in buffers:
                x[row, :, :length] = x[last, :, :length]
        for states in self._state_buffers.values():
            for state in states:
                state[row] = state[last]

    def get_states(self, layer: nn.Module) -> States | None:
        """Return the states in which the rows of this forward start, None if they start from
        nothing. Those of a decode step may be changed in place."""
        if self._first_new_row is None:
            return tuple(state[: len(self.lengths)] for state in self._state_buffers[layer])
        states = self._prefix_states.get(layer)
        if states is None:
            return None
        num_new_rows = len(self.lengths) - self._first_new_row
        return tuple(torch.cat([state] * num_new_rows) for state in states)

    def put_states(self, layer: nn.Module, states: States) -> None:
        """Store the states in which the rows of this forward end."""
        if layer not in self._state_buffers:
            buffers = tuple(state.new_zeros(self.slots, *state.shape[1:]) for state in states)
            self._state_buffers[layer] = buffers
        rows = slice(self._first_new_row or 0, len(self.lengths))
        for buffer, state in zip(self._state_buffers[layer], states, strict=True):
            if buffer[rows].data_ptr() != state.data_ptr():  # else changed in place
                buffer[rows] = state

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
        """Store k and v [T, K, D] and attend with q [T, N, D]; returns [T, N, D].

        With `cos_sin`, q and k are rotated first."""
        kv_buffers = self._reserve_buffers(layer, k, v)
        can_use_kernel = choose_backend(backend, q) == "cpu_kernel" and has_kernel(q, config)
        if self._first_new_row is None and can_use_kernel:
            return run_decode_kernel(
                q, k, v, kv_buffers, self._positions_B, self.prefix_length, config, cos_sin
            )
        q, k = apply_rotary_qk(q, k, cos_sin)
        if self._first_new_row is not None:
            prefix_kv = self._prefix_kv.get(layer)
            self._store_prompts(kv_buffers, (k, v), prefix_kv, layout)
            if prefix_kv is None:
                return attend(q, k, v, layout, config, backend)
            if can_use_kernel:
                return run_prefix_kernel(q, k, v, prefix_kv, layout, config)
            return self._attend_prompts(q, kv_buffers, layout, config)
        keys, values = kv_buffers
        keys[self._rows_B, :, self._positions_B] = k
        values[self._rows_B, :, self._positions_B] = v
        start, mask = self._get_decode_mask(config.window, q.dtype)
        end = max(self.lengths)
        keys = keys[: len(q), :, start:end]
        values = values[: len(q), :, start:end]
        return attend_rows(q, keys, values, mask, config)

    def _store_prompts(
        self,
        kv_buffers: KeysValues,
        new_kv: KeysValues,
        prefix_kv: KeysValues | None,
        layout: PackLayout,
    ) -> None:
        prefix_length = self.prefix_length
        segments = zip(layout.starts, layout.lengths, strict=True)
        for row, (start, length) in enumerate(segments, self._first_new_row or 0):
            for index, x in enumerate(new_kv):
                buffer = kv_buffers[index][row]
                prompt = x[start : start + length].transpose(0, 1)
                buffer[:, prefix_length : prefix_length + length] = prompt
                if prefix_kv:
                    buffer[:, :prefix_length] = prefix_kv[index].transpose(0, 1)

    def _attend_prompts(
        self, q: Tensor, kv_buffers: KeysValues, layout: PackLayout, config: AttentionConfig
    ) -> Tensor:
        """Attend with stored prompts that continue the prefix, without the kernel."""
        outputs: list[Tensor] = []
        segments = zip(layout.starts, layout.lengths, strict=True)
        for row, (start, length) in enumerate(segments, self._first_new_row or 0):
            end = self.prefix_length + length
            keys, values = (x[row, :, :end] for x in kv_buffers)
            mask = self._get_prefill_mask(length, config.window, q)
            prompt = q[start : start + length]
            outputs.append(attend_after_prefix(prompt, keys, values, mask, config))
        return torch.cat(outputs)

    def _reserve_buffers(self, layer: nn.Module, k: Tensor, v: Tensor) -> KeysValues:
        """Return the layer's keys and values, with room for the longest row."""
        min_capacity = max(self.lengths)
        buffers = self._kv_buffers.get(layer)
        old_capacity = buffers[0].shape[2] if buffers else 0
        if buffers and old_capacity >= min_capacity:
            return buffers
        capacity = max(self.max_length or old_capacity * 3 // 2, min_capacity)
        capacity = -(-capacity // BLOCK_TOKENS) * BLOCK_TOKENS
        # zeros, because masked values must still be finite
        keys = k.new_zeros(self.slots, k.shape[1], capacity, k.shape[2])
        values = v.new_zeros(self.slots, v.shape[1], capacity, v.shape[2])
        if buffers:
            keys[:, :, :old_capacity] = buffers[0]
            values[:, :, :old_capacity] = buffers[1]
        self._kv_buffers[layer] = (keys, values)
        return keys, values

    def _get_prefill_mask(self, length: int, window: int | None, q: Tensor) -> Tensor:
        """Return the mask [length, prefix_length + length] of a prompt, built once for all
        layers."""
        if (length, window) not in self._prefill_masks:
            positions = torch.arange(self.prefix_length + length, device=q.device)
            distance = positions[-length:, None] - positions
            self._prefill_masks[length, window] = _build_score_mask(distance, window, q.dtype)
        return self._prefill_masks[length, window]

    def _get_decode_mask(self, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """Return the first stored position that any row sees, and the mask [B, 1, 1, L] from there
        on; None if everything is visible."""
        if window not in self._decode_masks:
            shortest = min(self.lengths)
            longest = max(self.lengths)
            start = 0 if window is None else max(0, shortest - window)
            mask = None
            if shortest < longest:
                positions = torch.arange(start, longest, device=self._positions_B.device)
                distance = self._positions_B[:, None] - positions
                mask = _build_score_mask(distance, window, dtype)[:, None, None]
            self._decode_masks[window] = (start, mask)
        return self._decode_masks[window]


def _build_score_mask(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return what is added to the score of a token `distance` positions back: 0, or minus infinity
    if it is not visible. Numbers, because torch would convert booleans again in every layer."""
    is_visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    mask = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
    return mask.masked_fill_(~is_visible, float("-inf"))


def attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, config: AttentionConfig
) -> Tensor:
    """Attend with one query per row: q [B, N, D], keys and values [B, K, L, D] -> [B, N, D].

    The G heads that share a key become the queries of one product, which is several times faster
    than repeating the keys."""
    q_BKGD = q.unflatten(1, (keys.shape[1], -1))
    return _attend_grouped(q_BKGD, keys, values, mask, config).flatten(1, 2)


def attend_after_prefix(
    q: Tensor, keys: Tensor, values: Tensor, mask_nL: Tensor, config: AttentionConfig
) -> Tensor:
    """Attend with the last n tokens of one row: q [n, N, D], keys and values [K, L, D] ->
    [n, N, D]."""
    n, num_heads, head_dim = q.shape
    num_kv_heads = len(keys)
    q_KMD = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # M = G * n queries per key head
    mask_ML = mask_nL.repeat(num_heads // num_kv_heads, 1)
    out = _attend_grouped(q_KMD[None], keys[None], values[None], mask_ML, config)
    return out[0].reshape(num_heads, n, head_dim).transpose(0, 1)


def _attend_grouped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, config: AttentionConfig
) -> Tensor:
    """Attend with q [B, K, M, D], keys and values [B, K, L, D]; returns [B, K, M, D].

    The M queries are those of N / K heads, one head after the other."""
    if not config.softcap and config.sinks_N is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=config.scale)
    accum_dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(accum_dtype) @ keys.to(accum_dtype).transpose(-1, -2) * config.scale
    if config.softcap:
        scores = config.softcap * torch.tanh(scores / config.softcap)
    if mask is not None:
        scores = scores + mask
    sinks_KM1 = None
    if config.sinks_N is not None:
        sinks_KG = config.sinks_N.unflatten(0, (keys.shape[1], -1))
        queries_per_head = q.shape[2] // sinks_KG.shape[1]
        sinks_KM1 = sinks_KG.repeat_interleave(queries_per_head, dim=1)[..., None]
    return (compute_weights(scores, sinks_KM1) @ values.to(accum_dtype)).to(q.dtype)
