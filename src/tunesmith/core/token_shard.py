"""The tokens of a pack that one of the ranks has that share each document (context parallelism).

    shard = TokenShard(ranks, size=2, num_tokens=1001)      of 2 ranks, the first has 501 tokens
    shard.exchange(rows, ...)                               parts of a tensor to and from the others

The tokens of a pack are cut in their order into parts that differ by one token at most, wherever a
document ends. Neighbouring ranks share a pack, so that they are in one node. In: the ranks. Out:
bounds, and one all-to-all. Left out: what is exchanged (model/ulysses.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.core.errors import InputError
from tunesmith.core.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenShard:
    """One of `size` parts of `num_tokens` tokens: that of this rank."""

    ranks: Ranks
    size: int
    num_tokens: int

    @property
    def index(self) -> int:
        return self.ranks.rank % self.size

    @property
    def lengths(self) -> list[int]:
        """The tokens of each rank."""
        shortest, num_longer = divmod(self.num_tokens, self.size)
        return [shortest + (index < num_longer) for index in range(self.size)]

    @property
    def start(self) -> int:
        return sum(self.lengths[: self.index])

    @property
    def end(self) -> int:
        return self.start + self.lengths[self.index]

    def cut_segments(self, starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return how many tokens of each segment of the pack this rank has."""
        counts: list[int] = []
        for start, length in zip(starts, lengths, strict=True):
            counts.append(max(0, min(start + length, self.end) - max(start, self.start)))
        return counts

    def exchange(
        self, sent: Tensor, received: Tensor, sent_rows: list[int], received_rows: list[int]
    ) -> None:
        """Send `sent_rows[i]` rows to rank i of those that share the pack, and receive."""
        self.ranks.exchange(sent, received, sent_rows, received_rows, size=self.size)


def refuse_group_size(size: int, ranks: Ranks) -> None:
    """Raise InputError if `ranks` cannot be divided into groups that share each document."""
    if ranks.world % size:
        raise InputError(
            f"context_parallel_size is {size}, but the number of processes ({ranks.world}) is not "
            "a multiple of it",
            where=f"context_parallel_size: {size}",
            fix=f"start {size} processes, or a multiple, with --gpus, or set "
            "context_parallel_size: 1",
        )
