"""Documents that begin alike, as a forest: it gives back the same documents, and nothing stands
twice for long."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.types import Document, Pack
from tunesmith.data.collate import collate
from tunesmith.data.packing import (
    compute_saved_share,
    count_computed_tokens,
    count_input_tokens,
    pack_step,
)
from tunesmith.data.prefix_sharing import MIN_SHARED_TOKENS, build_segments, group_by_prefix

# A few stretches, so that documents made of them often begin alike; a stretch may begin another
# one.
STRETCHES = [list(range(3, 3 + n)) for n in (1, 15, 16, 17, 40)] + [
    [90 - i for i in range(n)] for n in (2, 20, 33)
]


def document(tokens, name="r", weights=None):
    weights_L = (
        np.zeros(len(tokens), np.float32) if weights is None else np.array(weights, np.float32)
    )
    weights_L[-1] = 1
    return Document(name, np.array(tokens, np.int32), weights_L)


def of_stretches(picked):
    return [1, *itertools.chain.from_iterable(STRETCHES[i] for i in picked), 2]


tries = st.lists(
    st.lists(st.integers(0, len(STRETCHES) - 1), max_size=4).map(of_stretches),
    min_size=1,
    max_size=10,
)


def packs_of(tokens, pack_length):
    return pack_step(
        [document(t, str(i)) for i, t in enumerate(tokens)], pack_length, should_share=True
    )


def read_document(batch, index):
    """The tokens that a document of a pack feeds and predicts, read off the forest alone."""
    last = int(batch.positions_S[batch.document_S == index].max())
    ends = np.cumsum(batch.layout.lengths)
    path = batch.layout.get_path(int(np.searchsorted(ends, last, side="right")))
    seen = [i for s in path for i in range(batch.layout.starts[s], ends[s]) if i <= last]
    assert batch.positions_T[seen].tolist() == list(range(len(seen)))
    target = batch.targets_S[(batch.document_S == index) & (batch.positions_S == last)]
    return [*batch.tokens_T[seen].tolist(), *target.tolist()]


@given(tries, st.integers(1, 300))
def test_a_forest_gives_back_its_documents(tokens, pack_length):
    documents = {}
    for pack in packs_of(tokens, pack_length):
        batch = collate(pack)
        assert batch.layout.num_tokens == count_computed_tokens(pack) == len(batch.tokens_T)
        assert count_computed_tokens(pack) <= pack_length or len(pack.documents) == 1
        assert all(parent < i for i, parent in enumerate(batch.layout.parents))
        documents |= {id: read_document(batch, index) for index, id in enumerate(batch.ids)}
    assert documents == {str(i): t for i, t in enumerate(tokens)}


@given(tries)
def test_what_begins_alike_stands_once(tokens):
    """In one pack two documents have as many tokens apart as their beginnings have, give or take a
    short segment a branch; every segment that branches is long."""
    fed = [np.array(t[:-1], np.int32) for t in tokens]
    units, shared = group_by_prefix(fed, [(i,) for i in range(len(fed))])
    order = [i for (i,) in units]
    shared = [shared[i] for i in order]
    segments, ends_in = build_segments([len(fed[i]) for i in order], shared)
    assert sorted(order) == list(range(len(fed)))
    assert len(ends_in) == len(fed)
    parents = [s.parent for s in segments if s.parent >= 0]
    assert all(segments[p].end - segments[p].begin >= MIN_SHARED_TOKENS for p in parents)
    for first, second, num_shared in zip(order, order[1:], shared[1:], strict=False):
        alike = next(
            (i for i, (a, b) in enumerate(zip(fed[first], fed[second], strict=False)) if a != b),
            None,
        )
        common = min(len(fed[first]), len(fed[second])) if alike is None else alike
        assert num_shared <= common
        assert num_shared or common < MIN_SHARED_TOKENS
    assert sum(s.end - s.begin for s in segments) == sum(map(len, fed)) - sum(shared)


def test_a_system_prompt_and_two_questions_below_it():
    prompt, question = list(range(100, 140)), list(range(200, 220))
    tokens = [[*prompt, 1, 2, 3], [*prompt, *question, 4, 5], [7] * 30, [*prompt, *question, 6, 8]]
    (pack,) = packs_of(tokens, 1000)
    layout = collate(pack).layout
    assert layout.lengths == (40, 2, 20, 1, 1, 29)  # the last token of each is a target only
    assert layout.parents == (-1, 0, 0, 2, 2, -1)
    assert [d.id for d in pack.documents] == ["0", "1", "3", "2"]
    assert [
        layout.get_path(4),
        layout.count_prefix_tokens(4),
        layout.get_path(5),
        layout.count_prefix_tokens(5),
    ] == [(0, 2, 4), 60, (5,), 0]


def test_a_document_that_another_begins_with_costs_nothing():
    tokens = list(range(3, 60))
    (pack,) = packs_of([tokens[:31], tokens, tokens[:31]], 1000)
    batch = collate(pack)
    assert batch.layout.lengths == (56,)
    assert batch.positions_S.tolist() == [29, 29, 55]
    assert batch.document_S.tolist() == [0, 1, 2]


def test_targets_in_a_shared_part_belong_to_every_owner():
    tokens, weights = [*range(3, 40), 50, 2], [0.0] * 20 + [0.5] * 10 + [0.0] * 9
    documents = [document(tokens, "a", weights), document([*tokens[:-2], 60, 2], "b", weights)]
    (pack,) = pack_step(documents, 1000, should_share=True)
    batch = collate(pack)
    assert batch.layout.lengths == (37, 1, 1)
    for index in (0, 1):
        in_document = batch.document_S == index
        assert batch.weights_S[in_document].tolist() == [0.5] * 10 + [1]
        assert batch.positions_S[in_document][:10].tolist() == list(range(19, 29))
    assert batch.real_tokens == 2 * len(tokens)


def test_without_a_common_beginning_the_packs_are_those_without_sharing():
    documents = [document([i, *range(10 + i, 40)], str(i)) for i in range(9)]
    assert pack_step(documents, 100, should_share=True) == pack_step(documents, 100)
    assert all(pack.prefix_lengths == () for pack in pack_step(documents, 100, should_share=True))


def test_what_begins_alike_comes_together_and_is_evened_out():
    def rows(prompt, count):
        return [
            [*[prompt] * 50, *np.random.default_rng(i).integers(100, 999, 21).tolist()]
            for i in range(count)
        ]

    packs = packs_of(
        [row for pair in zip(rows(3, 8), rows(4, 8), strict=True) for row in pair], 220
    )
    assert [count_computed_tokens(pack) for pack in packs] == [50 + 8 * 20] * 2
    assert [{int(d.tokens_L[0]) for d in pack.documents} for pack in packs] == [{3}, {4}]
    packs = packs_of(rows(3, 12), 220)
    assert [count_computed_tokens(pack) for pack in packs] == [50 + 6 * 20] * 2, (
        "as many as fit, and then even"
    )


def test_one_more_pack_costs_more_than_a_few_shared_tokens():
    """Best fit over whole documents may need fewer packs than keeping together what begins
    alike."""
    alike = [[3] * 20 + list(range(100 + i, 130 + i)) + [2] for i in range(0, 300, 50)]
    for pack_length in range(50, 320, 10):
        plain, shared = (
            pack_step([document(t) for t in alike], pack_length, should_share=s)
            for s in (False, True)
        )
        assert len(shared) <= len(plain)


def test_the_same_documents_give_the_same_packs():
    documents = [document(of_stretches([4, i % 3, i % 5]), str(i)) for i in range(12)]
    assert pack_step(documents, 120, should_share=True) == pack_step(
        documents, 120, should_share=True
    )


def test_saved_share_counts_what_steps_need_not_compute():
    alone, second, third = ([range(3, 103)], [[*range(3, 53), *range(900, 950)]], [range(300, 400)])
    rows = [[document([*tokens, 2]) for tokens in row] for row in (alone, second, third)]
    assert compute_saved_share(rows, 1, 4096) == 0
    assert compute_saved_share(rows, 2, 4096) == pytest.approx(50 / 200), "whole steps only"
    assert compute_saved_share(rows, 3, 4096) == pytest.approx(50 / 300)
    assert compute_saved_share(rows, 3, 100) == 0, "a pack of its own for each"
    assert compute_saved_share([rows[0] * 2], 1, 4096) == 0.5, "documents of one row"
    assert compute_saved_share([], 4, 4096) == 0


def test_many_documents_are_quick():
    generator = np.random.default_rng(0)
    tokens = [[*range(3, 103), *generator.integers(3, 999, 200).tolist()] for _ in range(512)]
    packs = packs_of(tokens, 4096)
    assert sum(map(count_computed_tokens, packs)) < 512 * 200 + 30 * 100 + 512


def test_a_plain_pack_is_a_forest_of_roots():
    documents = [document(list(range(3, 3 + n))) for n in (9, 5)]
    batch = collate(Pack(tuple(documents)))
    assert (batch.layout.lengths, batch.layout.parents) == ((8, 4), ())
    assert torch.equal(batch.positions_T, torch.cat((torch.arange(8), torch.arange(4))))
    assert sum(map(count_input_tokens, documents)) == batch.layout.num_tokens
