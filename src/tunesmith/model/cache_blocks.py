"""Which blocks of the cache are in use, by whom, and what they hold.

In: rows that need room, and keys of the contents of full blocks. Out: numbers of blocks. A block
has BLOCK_TOKENS tokens of one row, or of several that begin with the same tokens; the last of them
frees it. Full blocks stay findable until their room is needed, the longest unused first. Left out:
the keys and values themselves (paged_cache.py), and which rows run (generation/engine.py)."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence

BLOCK_TOKENS = 64  # a multiple of the 16 keys that decode.c scores at once


def count_blocks(num_tokens: int) -> int:
    """Return the blocks of a row of `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


def extend_block_keys(keys: list[bytes], origin: Hashable, tokens: Sequence[int]) -> None:
    """Append the keys of the full blocks of `tokens` that `keys` lacks.

    A key stands for all tokens up to the end of its block and for `origin`, which says what else
    decides keys and values: the adapter, its scale, the rotation, and who may share them."""
    for start in range(len(keys) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = keys[-1] if keys else repr(origin).encode()
        block_tokens = array("q", tokens[start : start + BLOCK_TOKENS])
        keys.append(hashlib.sha256(parent + block_tokens.tobytes()).digest())


class BlockPool:
    """Blocks 0 to num_blocks - 1: free, held by rows, or held by none but findable by key."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_used = 0  # blocks from here on were never used
        self._free: list[int] = []
        self._holders: dict[int, int] = {}  # block -> rows that hold it
        self._block_by_key: dict[bytes, int] = {}
        self._key_by_block: dict[int, bytes] = {}
        # findable and held by none, the longest unused first
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """The blocks that `allocate` can still give."""
        return self.num_blocks - len(self._holders)

    @property
    def num_findable(self) -> int:
        """The blocks that have a key."""
        return len(self._key_by_block)

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
            del self._block_by_key[self._key_by_block.pop(block)]
        self._holders[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Let rows find a full block by its key. If another block has the key, that one stays."""
        if key not in self._block_by_key and block not in self._key_by_block:
            self._block_by_key[key] = block
            self._key_by_block[block] = key

    def find_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Hold the blocks of the longest beginning of `keys` that is stored, and return them."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_by_key.get(key)
            if block is None:
                break
            self._holders[block] = self._holders.get(block, 0) + 1
            self._idle.pop(block, None)
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of the blocks of a row. The end of a prefix is evicted before its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_by_block:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget_idle(self) -> None:
        """Free all blocks that no row holds."""
        for block in self._idle:
            del self._block_by_key[self._key_by_block.pop(block)]
            self._free.append(block)
        self._idle.clear()
