"""What the rows that generation extends keep: keys and values in blocks, attention over them, and
the states of recurrent layers.

In: each layer's new q, k and v, or its new states. Rows have different lengths without padding; a
row may join or leave at any time, and nothing is copied when it does. A block has BLOCK_TOKENS
tokens of one row, or of several that begin with the same tokens; the last of them frees it, and
attention reads it from one place. Full blocks stay findable until their room is needed, the longest
unused first. New prompts run through the same packed attention as training; a decode step, and a
prompt that continues, attend to what their row has stored. Left out: which tokens, and which rows
run (generation/engine.py). Legend: T new tokens, B rows, M blocks of the longest row, N query
heads, K key/value heads, G = N / K, D head size, L stored tokens, n new tokens of a row."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
from tunesmith.model.machine_errors import OutOfMemory

BLOCK_TOKENS = 64  # a multiple of the 16 keys that decode.c scores at once
MIN_COPIED_TOKENS = 16  # of a block: fewer are computed again
KeysValues = tuple[Tensor, Tensor]
States = tuple[Tensor, ...]  # of a recurrent layer, each [rows, ...]
MaskKey = tuple[int, int, int, int | None]  # new tokens, first and last stored position, window


def count_blocks(num_tokens: int) -> int:
    """Return the blocks of a row of `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockContent(NamedTuple):
    """The tokens of a full block. `parent` stands for all tokens before them, `key` for those and
    the block's own."""

    key: bytes
    parent: bytes
    tokens: tuple[int, ...]


def make_origin_key(*origin: Hashable) -> bytes:
    """Return the parent of first blocks. `origin` is what decides keys and values beside the
    tokens: the adapter, its scale, the rotation; and who may share them."""
    return repr(origin).encode()


def extend_contents(contents: list[BlockContent], origin: bytes, tokens: Sequence[int]) -> None:
    """Append the contents of the full blocks of `tokens` that are missing."""
    for start in range(len(contents) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = contents[-1].key if contents else origin
        block_tokens = tuple(tokens[start : start + BLOCK_TOKENS])
        key = hashlib.sha256(parent + array("q", block_tokens).tobytes()).digest()
        contents.append(BlockContent(key, parent, block_tokens))


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common from the start."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


class BlockPool:
    """Blocks 0 to num_blocks - 1: free, held by rows, or held by none but findable by key."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_used = 0  # blocks from here on were never used
        self._free: list[int] = []
        self._holders: dict[int, int] = {}  # block -> rows that hold it
        self._block_by_key: dict[bytes, int] = {}
        self._contents: dict[int, BlockContent] = {}  # of the findable blocks
        self._blocks_by_parent: dict[bytes, list[int]] = {}
        # findable and held by none, the longest unused first
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """The blocks that `allocate` can still give."""
        return self.num_blocks - len(self._holders)

    def allocate(self, count: int) -> list[int] | None:
        """Return blocks for one row, with any content; None if there are not enough.

        Free ones first, then those that nobody has held for the longest time."""
        if count > self.num_available:
            return None
        return [self._take_block() for _ in range(count)]

    def _take_block(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._num_used < self.num_blocks:
            block = self._num_used
            self._num_used += 1
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def publish(self, block: int, content: BlockContent) -> None:
        """Let rows find a full block. If another block has the same content, that one stays."""
        if content.key in self._block_by_key or block in self._contents:
            return
        self._block_by_key[content.key] = block
        self._contents[block] = content
        self._blocks_by_parent.setdefault(content.parent, []).append(block)

    def _forget(self, block: int) -> None:
        """Let nobody find a block any more."""
        content = self._contents.pop(block)
        del self._block_by_key[content.key]
        siblings = self._blocks_by_parent[content.parent]
        siblings.remove(block)
        if not siblings:
            del self._blocks_by_parent[content.parent]

    def find_prefix(self, contents: Sequence[BlockContent]) -> list[int]:
        """Hold the blocks of the longest beginning of `contents` that is stored, and return
        them."""
        blocks: list[int] = []
        for content in contents:
            block = self._block_by_key.get(content.key)
            if block is None:
                break
            self.hold(block)
            blocks.append(block)
        return blocks

    def find_beginning(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the block after `parent` that begins like `tokens` for longest, and how many
        tokens that are; 0 if there is none."""
        best = (-1, 0)
        for block in self._blocks_by_parent.get(parent, ()):
            count = count_common(tokens, self._contents[block].tokens)
            if count > best[1]:
                best = (block, count)
        return best

    def hold(self, block: int) -> None:
        """Keep a findable block until it is released."""
        self._holders[block] = self._holders.get(block, 0) + 1
        self._idle.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of the blocks of a row. The end of a prefix is evicted before its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._contents:
                self._idle[block] = None
            else:
                self._free.append(block)


@dataclass(eq=False)
class CacheRow:
    """A row of the cache: `length` tokens are stored in `blocks`, its states at index `slot`."""

    slot: int
    blocks: list[int] = field(default_factory=list[int])
    length: int = 0


@dataclass(frozen=True, eq=False)
class _Forward:
    """The rows of the current forward, what they have stored before it, and its new tokens."""

    rows: Sequence[CacheRow]
    starts: tuple[int, ...]  # stored tokens of each row before the forward
    lengths: tuple[int, ...]  # new tokens of each row
    positions_T: Tensor
    blocks_T: Tensor  # where the new tokens are stored
    tables_BM: Tensor  # the blocks of each row; rows with fewer repeat their last one
    new_blocks: Tensor  # handed out since the last forward: their content is of earlier rows
    is_step: bool  # every row continues with one token, the answer's last
    # what layers of one kind share
    indices: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    masks: dict[MaskKey, Tensor] = field(default_factory=dict[MaskKey, Tensor])

    @property
    def is_first(self) -> bool:
        """Whether no row has stored anything."""
        return not any(self.starts)


class PagedKVCache:
    """Keys, values and states of up to `slots` rows, in at most `num_blocks` blocks.

    `begin_forward` must precede the forward that fills the new positions."""

    def __init__(self, slots: int, num_blocks: int) -> None:
        self.slots = slots
        self.pool = BlockPool(num_blocks)
        self.rows: list[CacheRow] = []  # by slot
        # layer -> keys, values [num_blocks, K, BLOCK_TOKENS, D]; the system gives a CPU the memory
        # of a block when it is first written
        self._kv_buffers: dict[nn.Module, KeysValues] = {}
        # recurrent layer -> states of the rows [slots, ...]
        self._state_buffers: dict[nn.Module, States] = {}
        self._new_blocks: list[int] = []
        self._forward: _Forward | None = None

    def add_row(self) -> CacheRow:
        """Return a new row without tokens."""
        assert len(self.rows) < self.slots, "more rows than slots"
        row = CacheRow(len(self.rows))
        self.rows.append(row)
        return row

    def drop_row(self, row: CacheRow) -> None:
        """Remove a row and let go of its blocks; the states of the last row move to its slot."""
        self.pool.release(row.blocks)
        last = self.rows.pop()
        if last is row:
            return
        for states in self._state_buffers.values():
            for state in states:
                state[row.slot] = state[last.slot]
        last.slot = row.slot
        self.rows[row.slot] = last

    def start_with_prefix(self, row: CacheRow, contents: Sequence[BlockContent]) -> None:
        """Let a row without tokens begin with the stored blocks of the longest beginning of
        `contents`."""
        assert not row.blocks
        row.blocks = self.pool.find_prefix(contents)
        row.length = len(row.blocks) * BLOCK_TOKENS

    def reserve_with_copy(
        self, row: CacheRow, num_tokens: int, source: int, num_copied: int
    ) -> bool:
        """Make room as `reserve` does, and let a row of full blocks go on with the first
        `num_copied` tokens of the findable block `source`, if there is room for both."""
        self.pool.hold(source)
        is_reserved = self.reserve(row, num_tokens)
        if is_reserved:
            block = row.blocks[row.length // BLOCK_TOKENS]
            for buffers in self._kv_buffers.values():
                for buffer in buffers:
                    buffer[block] = buffer[source]
            self._new_blocks = [new for new in self._new_blocks if new != block]
            row.length += num_copied
        self.pool.release([source])
        return is_reserved or self.reserve(row, num_tokens)

    def reserve(self, row: CacheRow, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in a row, stored ones included. Returns False, and
        changes nothing, if there are not enough blocks."""
        missing = count_blocks(num_tokens) - len(row.blocks)
        blocks = self.pool.allocate(max(0, missing))
        if blocks is None:
            return False
        row.blocks += blocks
        self._new_blocks += blocks
        return True

    def begin_forward(
        self,
        rows: Sequence[CacheRow],
        lengths: Sequence[int],
        device: torch.device,
        *,
        is_step: bool = False,
    ) -> Tensor:
        """Announce a forward of `lengths` new tokens of these rows, one row after the other, and
        return their positions [T]. Raises OutOfMemory without a block for one of them.

        A step of one token per row is rounded otherwise than the same token of a prompt."""
        assert not is_step or (max(lengths) == 1 and all(row.length for row in rows))
        starts: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        for row, length in zip(rows, lengths, strict=True):
            if not self.reserve(row, row.length + length):
                raise OutOfMemory("the cache has no block left", fix="allow a larger cache")
            starts.append(row.length)
            row_positions = range(row.length, row.length + length)
            positions += row_positions
            blocks += [row.blocks[position // BLOCK_TOKENS] for position in row_positions]
            row.length += length
        longest = max(count_blocks(row.length) for row in rows)
        tables: list[list[int]] = []
        for row in rows:
            table = row.blocks[: count_blocks(row.length)]
            tables.append(table + table[-1:] * (longest - len(table)))
        self._forward = _Forward(
            rows=rows,
            starts=tuple(starts),
            lengths=tuple(lengths),
            positions_T=torch.tensor(positions, device=device),
            blocks_T=torch.tensor(blocks, device=device),
            tables_BM=torch.tensor(tables, device=device),
            new_blocks=torch.tensor(self._new_blocks, dtype=torch.int64, device=device),
            is_step=is_step,
        )
        self._new_blocks = []
        return self._forward.positions_T

    def get_decode_inputs(self) -> tuple[Tensor, Tensor] | None:
        """Return the positions [B] and blocks [B, M] of the rows of this forward, None if it is
        not a step."""
        forward = self._current
        return (forward.positions_T, forward.tables_BM) if forward.is_step else None

    # ---------------------------------------------------------------- states

    def get_states(self, layer: nn.Module) -> States | None:
        """Return the states in which the rows of this forward start, None if they all start from
        nothing. They may be changed in place."""
        forward = self._current
        if layer not in self._state_buffers or forward.is_first:
            return None
        buffers = self._state_buffers[layer]
        for row, start in zip(forward.rows, forward.starts, strict=True):
            if not start:  # the slot holds what an earlier row has left
                for buffer in buffers:
                    buffer[row.slot] = 0
        return tuple(buffer[self._get_slots()] for buffer in buffers)

    def put_states(self, layer: nn.Module, states: States) -> None:
        """Store the states in which the rows of this forward end."""
        if layer not in self._state_buffers:
            buffers = tuple(state.new_zeros(self.slots, *state.shape[1:]) for state in states)
            self._state_buffers[layer] = buffers
        slots = self._get_slots()
        for buffer, state in zip(self._state_buffers[layer], states, strict=True):
            is_view = isinstance(slots, slice) and buffer[slots].data_ptr() == state.data_ptr()
            if not is_view:  # else changed in place
                buffer[slots] = state

    def _get_slots(self) -> slice | list[int]:
        """Return the slots of the rows of this forward; neighbors in order as a slice, whose part
        of a buffer is a view."""
        slots = [row.slot for row in self._current.rows]
        if slots == list(range(slots[0], slots[0] + len(slots))):
            return slice(slots[0], slots[0] + len(slots))
        return slots

    @property
    def _current(self) -> _Forward:
        assert self._forward is not None, "begin_forward comes first"
        return self._forward

    # ---------------------------------------------------------------- attention

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
        forward = self._current
        kv_buffers = self._get_buffers(layer, k, v)
        can_use_kernel = choose_backend(backend, q) == "cpu_kernel" and has_kernel(q, config)
        if forward.is_step and can_use_kernel:
            stored = (kv_buffers, forward.tables_BM, forward.positions_T)
            return run_decode_kernel(q, k, v, *stored, config, cos_sin)
        q, k = apply_rotary_qk(q, k, cos_sin)
        if not can_use_kernel and len(forward.new_blocks):
            for buffer in kv_buffers:  # masked values must still be finite
                buffer[forward.new_blocks] = 0
        self._store(kv_buffers, (k, v))
        if forward.is_first:
            return attend(q, k, v, layout, config, backend)
        if forward.is_step:
            return self._attend_step(q, kv_buffers, config)
        if can_use_kernel:
            prefixes, parents = self._gather_prefixes(kv_buffers)
            return run_prefix_kernel(q, k, v, prefixes, parents, layout, config)
        return self._attend_prompts(q, kv_buffers, layout, config)

    def find_buffers(self, layer: nn.Module) -> KeysValues | None:
        """Return the layer's keys and values [num_blocks, K, BLOCK_TOKENS, D], None before its
        first forward."""
        return self._kv_buffers.get(layer)

    def _get_buffers(self, layer: nn.Module, k: Tensor, v: Tensor) -> KeysValues:
        """Return the layer's keys and values [num_blocks, K, BLOCK_TOKENS, D]."""
        if layer not in self._kv_buffers:
            num_blocks = self.pool.num_blocks
            keys = k.new_empty(num_blocks, k.shape[1], BLOCK_TOKENS, k.shape[2])
            values = v.new_empty(num_blocks, v.shape[1], BLOCK_TOKENS, v.shape[2])
            self._kv_buffers[layer] = (keys, values)
        return self._kv_buffers[layer]

    def _store(self, kv_buffers: KeysValues, new_kv: KeysValues) -> None:
        """Write keys and values [T, K, D] of the new tokens."""
        forward = self._current
        num_heads = new_kv[0].shape[1]
        if num_heads not in forward.indices:
            offsets_T = forward.positions_T % BLOCK_TOKENS
            heads_K = torch.arange(num_heads, device=offsets_T.device)
            heads_TK = forward.blocks_T[:, None] * num_heads + heads_K
            forward.indices[num_heads] = (heads_TK * BLOCK_TOKENS + offsets_T[:, None]).flatten()
        for buffer, x in zip(kv_buffers, new_kv, strict=True):
            rows = x.reshape(-1, x.shape[-1])
            buffer.view(-1, x.shape[-1]).index_copy_(0, forward.indices[num_heads], rows)

    def _attend_step(self, q: Tensor, kv_buffers: KeysValues, config: AttentionConfig) -> Tensor:
        """Attend with one more token per row, without the kernel."""
        lengths = [row.length for row in self._current.rows]
        shortest = min(lengths)
        end = max(lengths)
        start = 0 if config.window is None else max(0, shortest - config.window)
        first_block = start // BLOCK_TOKENS
        tables_BM = self._current.tables_BM[:, first_block:]
        span = slice(start - first_block * BLOCK_TOKENS, end - first_block * BLOCK_TOKENS)
        keys, values = (_gather_rows(x, tables_BM)[:, :, span] for x in kv_buffers)
        mask = None  # everything is visible
        if shortest < end:
            positions_B1 = self._current.positions_T[:, None]
            mask = self._get_mask(positions_B1, start, end, config.window, q)[:, None, None]
        return attend_rows(q, keys, values, mask, config)

    def _get_mask(
        self, positions_n1: Tensor, start: int, end: int, window: int | None, q: Tensor
    ) -> Tensor:
        """Return the mask of stored positions from `start` to `end` for new tokens [n, end -
        start], built once for all layers. Prompts that begin or end at different places have their
        own."""
        masks = self._current.masks
        key = (len(positions_n1), start, end, window)
        if key not in masks:
            distance = positions_n1 - torch.arange(start, end, device=q.device)
            masks[key] = _build_score_mask(distance, window, q.dtype)
        return masks[key]

    def _gather_prefixes(self, kv_buffers: KeysValues) -> tuple[list[KeysValues], list[int]]:
        """Return the different beginnings that the rows have stored, as keys and values [L, K, D],
        and the index of each row's; -1 if it has none."""
        index_by_blocks: dict[tuple[int, ...], int] = {}
        prefixes: list[KeysValues] = []
        parents: list[int] = []
        for row, start in zip(self._current.rows, self._current.starts, strict=True):
            blocks = (*row.blocks[: count_blocks(start)], start)
            if start and blocks not in index_by_blocks:
                index_by_blocks[blocks] = len(prefixes)
                table_1M = self._current.tables_BM.new_tensor(blocks[:-1])[None]
                keys, values = (
                    _gather_rows(x, table_1M)[0, :, :start].transpose(0, 1) for x in kv_buffers
                )
                prefixes.append((keys, values))
            parents.append(index_by_blocks[blocks] if start else -1)
        return prefixes, parents

    def _attend_prompts(
        self, q: Tensor, kv_buffers: KeysValues, layout: PackLayout, config: AttentionConfig
    ) -> Tensor:
        """Attend with new tokens that continue their rows, without the kernel."""
        outputs: list[Tensor] = []
        forward = self._current
        segments = zip(forward.rows, layout.starts, layout.lengths, strict=True)
        for index, (row, start, length) in enumerate(segments):
            table_1M = forward.tables_BM[index : index + 1, : count_blocks(row.length)]
            keys, values = (_gather_rows(x, table_1M)[0, :, : row.length] for x in kv_buffers)
            end = row.length
            positions = torch.arange(end - length, end, device=q.device)[:, None]
            mask = self._get_mask(positions, 0, end, config.window, q)
            new = q[start : start + length]
            outputs.append(attend_after_prefix(new, keys, values, mask, config))
        return torch.cat(outputs)


def _gather_rows(buffer: Tensor, tables_BM: Tensor) -> Tensor:
    """Return the blocks of each row, one after the other [B, K, M * BLOCK_TOKENS, D]."""
    num_heads = buffer.shape[1]
    heads_K1 = torch.arange(num_heads, device=buffer.device)[:, None]
    indices_BKM = tables_BM[:, None] * num_heads + heads_K1
    gathered = buffer.flatten(0, 1).index_select(0, indices_BKM.flatten())
    return gathered.view(*indices_BKM.shape, *buffer.shape[2:]).flatten(2, 3)


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
