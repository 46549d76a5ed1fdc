"""The memory of a layer that is gathered while another one computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.core.ranks import Ranks
from tunesmith.model.layer_shards import LayerShard
from tunesmith.model.weight_shards import WeightShards


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


class AgreeingRanks(SlowRanks):
    """Two ranks that wish the same; nothing is gathered into memory that was given back."""

    def form_groups(self, size: int) -> None:
        pass

    def gather_words(self, word: int, *, size: int) -> list[int]:
        return [word] * size

    def start_gather(self, parts: Tensor, part: Tensor, *, size: int) -> Callable[[], None]:
        assert parts.untyped_storage().nbytes() == parts.nbytes, "the memory is given back"
        return super().start_gather(parts, part, size=size)

    def gather_parts(self, parts: Tensor, part: Tensor, *, size: int) -> None:
        self.start_gather(parts, part, size=size)()


@pytest.mark.parametrize("first_trained", range(4))
def test_a_pack_may_begin_with_the_layer_that_the_last_backward_gathered_ahead(
    first_trained: int,
) -> None:
    """The backward ends at the first trained layer, and has begun with the one below."""
    shards = WeightShards(AgreeingRanks(), 2)
    weights = [torch.full((32,), float(index)) for index in range(4)]
    for weight in weights:
        shards.layers.append(LayerShard([weight], shards.ranks, 2))
    with shards.joint(can_tell=False):
        for _pack in range(2):
            for index in range(4):
                shards.gather(index, index + 1)
                assert shards.layers[index].is_complete
            for index in range(3, first_trained - 1, -1):
                shards.gather(index, index - 1)
                assert shards.layers[index].is_complete
