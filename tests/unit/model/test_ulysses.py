"""What each of several ranks gets of a pack: its tokens, their targets, positions and rotation."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from rotary_configs import CONFIGS, LIMIT
from tiny_models import make_branching_documents, make_tiny_document, make_tiny_documents
from tunesmith.core.errors import InputError
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.token_shard import TokenShard, refuse_group_size
from tunesmith.core.types import Batch, Pack
from tunesmith.data.collate import collate
from tunesmith.data.packing import count_computed_tokens, pack_step
from tunesmith.model.causal_lm import wrap_model
from tunesmith.model.ulysses import exchange_heads


def collate_shards(pack: Pack, size: int) -> list[Batch]:
    num_tokens = count_computed_tokens(pack)
    batches: list[Batch] = []
    for rank in range(size):
        shard = TokenShard(Ranks(rank, size), size, num_tokens)
        batches.append(collate(pack, shard=shard))
    return batches


def test_a_shard_without_a_target_has_one_of_no_weight() -> None:
    prompt = make_tiny_document(20, first_target=19)
    (pack,) = pack_step([prompt], 10**6)
    first, last = collate_shards(pack, 2)
    assert (first.num_targets, last.num_targets) == ((0,), (2,))
    assert (first.positions_S.tolist(), first.weights_S.tolist()) == ([0], [0])
    assert last.targets_S.tolist() == prompt.tokens_L[19:].tolist()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("share", [False, True])
def test_the_shards_of_a_pack_have_all_of_it_once(size: int, *, share: bool) -> None:
    documents = make_branching_documents() if share else make_tiny_documents()
    (pack,) = pack_step(documents, 10**6, should_share=share)
    whole = collate(pack)
    assert bool(whole.layout.parents) == share
    shards = collate_shards(pack, size)
    lengths = [len(batch.tokens_T) for batch in shards]
    assert max(lengths) - min(lengths) <= 1
    assert all(batch.layout == whole.layout for batch in shards), "attention sees the whole pack"
    for name in ("tokens_T", "positions_T"):
        joined = torch.cat([getattr(batch, name) for batch in shards])
        assert torch.equal(joined, getattr(whole, name))
    targets: list[tuple[int, ...]] = []
    for batch in shards:
        assert batch.shard is not None
        positions_S = batch.positions_S + batch.shard.start
        columns = (positions_S, batch.targets_S, batch.document_S)
        targets += zip(*(column.tolist() for column in columns), strict=True)
        if share:
            assert batch.shared_targets is not None
            assert batch.shared_targets.is_for(batch)
    columns = (whole.positions_S, whole.targets_S, whole.document_S)
    assert sorted(targets) == sorted(zip(*(column.tolist() for column in columns), strict=True))
    counts = torch.tensor([batch.num_targets for batch in shards]).sum(0)
    assert tuple(counts.tolist()) == whole.num_targets


@pytest.mark.parametrize("name", ["phi3-128k", "llama-dynamic"])
def test_frequencies_are_those_of_the_whole_document(name: str) -> None:
    """They depend on its length, which is above the limit; its part on a rank is below."""
    network = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    model = wrap_model(network, torch.float32)
    assert model.rotary
    (pack,) = pack_step(make_tiny_documents((5, LIMIT + 20, 7)), 10**6)

    def rotate(batch: Batch) -> torch.Tensor:
        assert model.rotary
        model.set_layout(batch.layout, batch.shard)
        x_TH = torch.zeros(1, len(batch.tokens_T), model.embedding_size)
        return torch.cat(model.rotary(x_TH, batch.positions_T[None]))

    parts = [rotate(batch) for batch in collate_shards(pack, 2)]
    torch.testing.assert_close(torch.cat(parts, dim=1), rotate(collate(pack)), rtol=0, atol=0)


def test_heads_that_the_ranks_do_not_divide_are_refused() -> None:
    q = torch.zeros(4, 4, 8)
    k = torch.zeros(4, 1, 8)
    with pytest.raises(InputError, match="1 KV head, which 2 processes do not divide"):
        exchange_heads(q, k, k, TokenShard(SINGLE_PROCESS, 2, 8))


def test_ranks_that_the_groups_do_not_divide_are_refused() -> None:
    refuse_group_size(2, Ranks(0, 4))
    with pytest.raises(InputError, match=r"processes \(1\) is not a multiple") as refusal:
        refuse_group_size(2, SINGLE_PROCESS)
    assert "--gpus" in refusal.value.fix
    with pytest.raises(InputError, match=r"processes \(3\) is not a multiple"):
        refuse_group_size(2, Ranks(0, 3))
