"""Keys and values of the rows that generation extends, and attention over them.

In: each layer's new q, k, v. Rows have lengths of their own: no padding is computed, a new row may join at any time and
a finished one leaves at once. A prompt runs through the same packed attention as training; what all prompts begin with
is computed once. An extension by one token reads what its row has stored. Left out: which tokens (infer/engine.py).
Legend: T new tokens, B rows, N query heads, K key/value heads, G = N / K, D head size, L stored tokens, n of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.types import Layout
from tunesmith.model.attention import Angles, Rule, attend, choose, has_kernel, kernel_after, kernel_rows, turned

BLOCK = 64  # the stores grow to a multiple of this many tokens


class RowCache:
    """`lengths[b]` tokens are stored of row b. `admit` or `advance` precede the forward that fills new places."""

    def __init__(self, slots: int, longest: int = 0) -> None:
        """Room for `slots` rows; the room for tokens grows, to no more than the `longest` row will need where that is
        known."""
        self.slots, self.longest = slots, longest
        self.lengths: list[int] = []
        self.shared = 0  # how many tokens every new row starts with
        self._prefix: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # layer -> their keys, values [shared, K, D]
        self._stores: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [slots, K, capacity, D]
        self._first_new: int | None = None  # the first row of a prompt forward; None while rows are extended
        self._rows_B = self._places_B = torch.empty(0)
        self._masks: dict[int | None, tuple[int, Tensor | None]] = {}  # of one extension, by window
        self._prompt_masks: dict[tuple[int, int | None], Tensor] = {}  # of one prompt forward, by length and window

    def admit(self, lengths: Sequence[int]) -> None:
        """The next forward is of new rows with so many tokens each, after the shared ones; they come last."""
        assert len(self.lengths) + len(lengths) <= self.slots, "more rows than slots"
        self._first_new = len(self.lengths)
        self.lengths += [self.shared + length for length in lengths]
        self._prompt_masks = {}

    def advance(self, device: torch.device) -> Tensor:
        """The next forward is of one more token for every row; returns their positions [B]."""
        self._first_new = None
        self._rows_B = torch.arange(len(self.lengths), device=device)
        self._places_B = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        self._masks = {}
        return self._places_B

    def share(self) -> None:
        """Make the only row the beginning of every row to come."""
        (self.shared,) = self.lengths
        for layer, store in self._stores.items():
            keys, values = (x[0, :, : self.shared].transpose(0, 1).contiguous() for x in store)
            self._prefix[layer] = (keys, values)
        self.drop(0)

    def drop(self, row: int) -> None:
        """Forget a row; the last one moves into its place."""
        length = self.lengths.pop()
        if row == len(self.lengths):
            return
        self.lengths[row] = length
        for store in self._stores.values():
            for x in store:
                x[row, :, :length] = x[len(self.lengths), :, :length]

    def attend(
        self,
        layer: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        rule: Rule,
        backend: str,
        angles: Angles | None = None,
    ) -> Tensor:
        """q [T, N, D], k and v [T, K, D] -> [T, N, D], and k and v are stored. `angles`: q and k are still to be
        turned."""
        stores = self._store(layer, k, v)
        fast = choose(backend, q) == "kernel" and has_kernel(q, rule)
        if self._first_new is None and fast:
            return kernel_rows(q, k, v, stores, self._places_B, self.shared, rule, angles)
        q, k = turned(q, k, angles)
        if self._first_new is not None:
            return self._attend_prompts(layer, q, k, v, layout, rule, backend, fast)
        keys, values = stores
        keys[self._rows_B, :, self._places_B] = k
        values[self._rows_B, :, self._places_B] = v
        first, mask = self._visible(rule.window, q.dtype)
        held = slice(0, len(q)), slice(None), slice(first, max(self.lengths))
        return attend_rows(q, keys[held], values[held], mask, rule)

    def _attend_prompts(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule, backend: str, fast: bool
    ) -> Tensor:
        given, outputs = self._prefix.get(layer), list[Tensor]()
        for row, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True), self._first_new or 0):
            new = slice(start, start + length)
            for which, x in enumerate((k, v)):
                store = self._stores[layer][which][row]
                store[:, self.shared : self.shared + length] = x[new].transpose(0, 1)
                if given:
                    store[:, : self.shared] = given[which].transpose(0, 1)
            if given and not fast:
                keys, values = (x[row, :, : self.shared + length] for x in self._stores[layer])
                outputs.append(attend_after(q[new], keys, values, self._after(length, rule.window, q), rule))
        if not given:
            return attend(q, k, v, layout, rule, backend)
        return kernel_after(q, k, v, given, layout, rule) if fast else torch.cat(outputs)

    def _store(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, with room for the longest row."""
        needed, stored = max(self.lengths), self._stores.get(layer)
        if stored is None or stored[0].shape[2] < needed:
            held = stored[0].shape[2] if stored else 0
            ahead = held * 3 // 2
            capacity = -(-max(needed, min(ahead, self.longest or ahead)) // BLOCK) * BLOCK
            # Zeros, since what is masked must still be finite.
            grown = tuple(x.new_zeros(self.slots, x.shape[1], capacity, x.shape[2]) for x in (k, v))
            for new, old in zip(grown, stored or (), strict=False):
                new[:, :, :held] = old
            self._stores[layer] = (grown[0], grown[1])
        return self._stores[layer]

    def _after(self, length: int, window: int | None, q: Tensor) -> Tensor:
        """The mask [length, shared + length] of a prompt's own tokens, made once for all layers."""
        if (length, window) not in self._prompt_masks:
            places = torch.arange(self.shared + length, device=q.device)
            self._prompt_masks[length, window] = _mask(places[-length:, None] - places, window, q.dtype)
        return self._prompt_masks[length, window]

    def _visible(self, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """The first stored place that any row sees, and the mask [B, 1, 1, L] from there on; None if all is seen."""
        if window not in self._masks:
            shortest, longest = min(self.lengths), max(self.lengths)
            first = 0 if window is None else max(0, shortest - window)
            mask = None
            if shortest < longest:
                places = torch.arange(first, longest, device=self._places_B.device)
                mask = _mask(self._places_B[:, None] - places, window, dtype)[:, None, None]
            self._masks[window] = (first, mask)
        return self._masks[window]


def _mask(back: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to the score of a token that stands `back` places before: nothing, or minus infinity if it is not
    seen. As numbers, since torch would make them from truth values anew in every layer."""
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    return torch.zeros(back.shape, dtype=dtype, device=back.device).masked_fill_(~seen, float("-inf"))


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """One query a row: q [B, N, D], keys and values [B, K, L, D] -> [B, N, D]. The G heads that share a key stand as
    the queries of one product, which is several times faster than repeating the keys."""
    return _scaled(q.unflatten(1, (keys.shape[1], -1)), keys, values, mask, rule).flatten(1, 2)


def attend_after(q: Tensor, keys: Tensor, values: Tensor, mask_nL: Tensor, rule: Rule) -> Tensor:
    """The last n tokens of one row: q [n, N, D], keys and values [K, L, D] -> [n, N, D]."""
    (n, heads, size), groups = q.shape, len(keys)
    q_KMD = q.transpose(0, 1).reshape(groups, -1, size)  # M = G * n queries a key head
    out = _scaled(q_KMD[None], keys[None], values[None], mask_nL.repeat(heads // groups, 1), rule)
    return out[0].reshape(heads, n, size).transpose(0, 1)


def _scaled(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """q [B, K, M, D], keys and values [B, K, L, D] -> [B, K, M, D]."""
    if not rule.softcap:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=rule.scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ keys.to(wide).transpose(-1, -2) * rule.scale
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ values.to(wide)).to(q.dtype)
