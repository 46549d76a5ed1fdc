"""Which blocks of the cache are in use, by whom, and what they hold.

In: rows that need room, and the contents of full blocks. Out: numbers of blocks. A block has
BLOCK_TOKENS tokens of one row, or of several that begin with the same tokens; the last of them
frees it. Full blocks stay findable until their room is needed, the longest unused first. Left out:
the keys and values themselves (paged_cache.py), and which rows run (generation/engine.py)."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

BLOCK_TOKENS = 64  # a multiple of the 16 keys that decode.c scores at once
MIN_COPIED_TOKENS = 16  # of a block: fewer are computed again


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
