import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.ranks import Ranks
from tunesmith.core.token_shard import TokenShard
from tunesmith.core.types import Document, Pack
from tunesmith.data.collate import collate, join_arrays, split_tensors
from tunesmith.data.packing import pack_step


def document(tokens, weights, name="r"):
    return Document(name, np.array(tokens, np.int32), np.array(weights, np.float32))


def test_two_documents_side_by_side():
    batch = collate(
        Pack(
            (
                document([7, 8, 9, 10, 11], [0, 0, 1, 0, 0.5], "a"),
                document([5, 6, 4], [0, 1, 0], "b"),
            )
        )
    )
    assert batch.tokens_T.tolist() == [
        7,
        8,
        9,
        10,
        5,
    ]  # neither the last targets nor what follows them
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0]
    assert (batch.layout.starts, batch.layout.lengths, batch.layout.num_tokens) == (
        (0, 4),
        (4, 1),
        5,
    )
    assert batch.positions_S.tolist() == [1, 3, 4]
    assert batch.targets_S.tolist() == [9, 11, 6]
    assert batch.weights_S.tolist() == [1, 0.5, 1]
    assert batch.document_S.tolist() == [0, 0, 1]
    assert (batch.ids, batch.real_tokens) == (("a", "b"), 8)


@pytest.mark.parametrize(
    ("size", "rank", "tokens", "positions", "targets", "weights"),
    [
        (2, 0, [7, 8, 9], [1], [9], [1]),
        (2, 1, [10, 5], [0, 1], [11, 6], [0.5, 1]),
        (5, 0, [7], [0], [9], [0]),  # it predicts none: one without a weight
        (5, 1, [8], [0], [9], [1]),
        (5, 4, [5], [0], [6], [1]),
    ],
)
def test_a_shard_has_the_targets_that_its_tokens_predict(
    size, rank, tokens, positions, targets, weights
):
    documents = (
        document([7, 8, 9, 10, 11], [0, 0, 1, 0, 0.5], "a"),
        document([5, 6, 4], [0, 1, 0], "b"),
    )
    batch = collate(Pack(documents), shard=TokenShard(Ranks(rank, size), size, 5))
    assert batch.tokens_T.tolist() == tokens
    assert batch.positions_S.tolist() == positions
    assert batch.targets_S.tolist() == targets
    assert batch.weights_S.tolist() == weights


def test_types_are_what_the_model_takes():
    batch = collate(Pack((document([1, 2], [0, 1]),)))
    for tensor in (
        batch.tokens_T,
        batch.positions_T,
        batch.positions_S,
        batch.targets_S,
        batch.document_S,
    ):
        assert tensor.dtype == torch.int64
    assert batch.weights_S.dtype == torch.float32
    assert all(
        type(n) is int for n in (*batch.layout.starts, *batch.layout.lengths, batch.real_tokens)
    )


documents = st.lists(
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.0, 1.0, 0.25])),
        min_size=1,
        max_size=20,
    ).map(
        lambda pairs: document([1, *(t for t, _ in pairs), 2], [0.0, *(w for _, w in pairs), 1.0])
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.promise
@given(documents, st.integers(1, 64))
def test_every_target_is_predicted_by_the_token_before_it_in_its_own_document(drawn, pack_length):
    named = [Document(str(i), d.tokens_L, d.weights_L) for i, d in enumerate(drawn)]
    expected = [
        (d.id, i - 1, d.tokens_L[i], d.tokens_L[i - 1], d.weights_L[i])
        for d in named
        for i in np.flatnonzero(d.weights_L)
    ]
    seen, real_tokens = [], 0
    for batch in map(collate, pack_step(named, pack_length)):
        real_tokens += batch.real_tokens
        owners = np.repeat(np.arange(len(batch.ids)), batch.layout.lengths)
        for position, target, weight, owner in zip(
            batch.positions_S.tolist(),
            batch.targets_S,
            batch.weights_S,
            batch.document_S,
            strict=True,
        ):
            assert owners[position] == owner
            seen_by = (
                int(batch.positions_T[position]),
                int(target),
                int(batch.tokens_T[position]),
                float(weight),
            )
            seen.append((batch.ids[owner], *seen_by))
    assert sorted(seen) == sorted(expected)
    assert real_tokens == sum(len(d) for d in named)


def test_a_layout_has_parents_where_a_prefix_is_shared():
    first, second = (document([1, 2, 3, tail, 9], [0, 0, 0, 0, 1]) for tail in (4, 5))
    shared = collate(Pack((first, second), (0, 3)))
    assert shared.layout.parents == (-1, 0, 0)
    assert (shared.layout.starts, shared.layout.lengths) == ((0, 3, 4), (3, 1, 1))
    assert shared.positions_S.tolist() == [3, 4]
    assert shared.real_tokens == 10
    for prefix_lengths in ((), (0, 0)):
        apart = collate(Pack((first, second), prefix_lengths))
        assert (apart.layout.parents, apart.layout.lengths) == ((), (4, 4))
        assert apart.positions_S.tolist() == [3, 7]


def test_a_target_of_several_documents_at_one_position_is_computed_once():
    first, second = (document([1, 2, 3, tail, 9], [0, 0, 1, 1, 1]) for tail in (4, 5))
    shared = collate(Pack((first, second), (0, 3))).shared_targets
    assert shared is not None
    assert shared.positions_S.tolist() == [1, 2, 3, 1, 2, 4]
    assert shared.targets_S.tolist() == [3, 4, 9, 3, 5, 9]
    assert shared.positions_P.tolist() == [1, 2, 3, 4]
    assert shared.targets_M.tolist() == [3, 4, 5, 9, 9]
    assert shared.position_M.tolist() == [0, 1, 1, 2, 3]
    assert shared.position_S.tolist() == [0, 1, 2, 0, 1, 3]
    assert shared.target_S.tolist() == [0, 1, 3, 0, 2, 4]


def test_sides_and_references_are_those_of_the_documents():
    plain = document([1, 2], [0, 1])
    chosen, rejected = (
        dataclasses.replace(plain, side=side, reference_logp=logp)
        for side, logp in (("chosen", -1.5), ("rejected", None))
    )
    batch = collate(Pack((plain, chosen, rejected)))
    assert batch.sides == ("", "chosen", "rejected")
    assert batch.reference_logps == (None, -1.5, None)
    assert (collate(Pack((plain,))).sides, collate(Pack((plain,))).reference_logps) == ((), ())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_arrays_are_one_buffer_on_the_way_to_a_gpu(lengths):
    """Also where floats lie between integers, and where an array is empty."""
    arrays = {}
    for index, length in enumerate([1, *lengths]):
        dtype = np.float32 if index % 2 else np.int64
        arrays[f"array {index}"] = np.arange(index, index + length).astype(dtype)
    buffer = join_arrays(arrays)
    assert buffer.nbytes == sum(array.nbytes for array in arrays.values())
    parts = split_tensors(buffer, arrays)
    assert list(parts) == list(arrays)
    for name, array in arrays.items():
        assert torch.equal(parts[name], torch.from_numpy(array))
