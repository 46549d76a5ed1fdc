"""The memory of a layer that is gathered while another one computes."""

from collections.abc import Callable

import torch
from torch import Tensor

from tunesmith.core.ranks import Ranks
from tunesmith.model.layer_shards import LayerShard


class SlowRanks(Ranks):
    """One rank, whose own part arrives when it is waited for, where the memory was at the start."""

    def start_gather(self, parts: Tensor, part: Tensor, *, size: int) -> Callable[[], None]:
        address = parts.data_ptr()

        def wait() -> None:
            assert parts.data_ptr() == address, "the memory has moved"
            parts.copy_(part.repeat(size))

        return wait


def test_memory_stays_where_it_is_while_a_gather_writes_into_it() -> None:
    weight = torch.arange(64.0)
    shard = LayerShard([weight], SlowRanks(), 1)
    assert weight.untyped_storage().nbytes() == 0
    shard.reserve()
    shard.start_gather()
    assert not shard.is_complete
    shard.reserve()
    shard.gather()
    assert shard.is_complete
    assert weight.tolist() == list(range(64))


def test_what_is_thrown_away_is_waited_for() -> None:
    shard = LayerShard([torch.ones(64)], SlowRanks(), 1)
    shard.reserve()
    shard.start_gather()
    shard.release()
    assert shard.full_B.untyped_storage().nbytes() == 0
    shard.reserve()
    shard.start_gather()
    shard.gather()
    assert shard.full_B.view(torch.float32).tolist() == [1.0] * 64
