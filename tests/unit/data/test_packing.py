import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.types import Document
from tunesmith.data.packing import (
    compute_saved_share,
    count_computed_tokens,
    count_input_tokens,
    group_units,
    pack_step,
    share_out,
)


def document(length, name="r"):
    """A document that feeds `length` tokens: its last token is its only target."""
    weights = np.zeros(length + 1, np.float32)
    weights[-1] = 1
    return Document(name, np.arange(length + 1, dtype=np.int32), weights)


def pack_lengths(lengths, pack_length):
    return [
        [count_input_tokens(d) for d in pack.documents]
        for pack in pack_step([document(n) for n in lengths], pack_length)
    ]


def first_fit_decreasing(lengths, pack_length):
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        for i, free in enumerate(room):
            if free >= length:
                room[i] -= length
                break
        else:
            room.append(pack_length - length)
    return len(room)


def test_only_tokens_before_the_last_target_are_fed():
    weights = np.array([0, 0, 1, 0.5, 0, 0], np.float32)
    assert count_input_tokens(Document("r", np.arange(6, dtype=np.int32), weights)) == 3
    assert (
        count_input_tokens(Document("r", np.arange(6, dtype=np.int32), np.zeros(6, np.float32)))
        == 0
    )


@given(st.lists(st.integers(1, 130), max_size=60), st.integers(1, 128))
def test_every_document_once_and_capacity_respected(lengths, pack_length):
    documents = [document(length, str(i)) for i, length in enumerate(lengths)]
    packs = pack_step(documents, pack_length)
    assert sorted(int(d.id) for pack in packs for d in pack.documents) == list(range(len(lengths)))
    for pack in packs:
        fed = [count_input_tokens(d) for d in pack.documents]
        assert fed == sorted(fed, reverse=True)
        assert sum(fed) <= pack_length or len(fed) == 1
    again = pack_step(documents, pack_length)
    assert [[d.id for d in pack.documents] for pack in again] == [
        [d.id for d in pack.documents] for pack in packs
    ]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_close_to_the_least_number_of_packs(lengths):
    packs = len(pack_lengths(lengths, 64))
    at_least = -(-sum(lengths) // 64)
    assert packs <= max(first_fit_decreasing(lengths, 64), 11 / 9 * at_least + 1)


def test_packs_that_can_be_full_are_full():
    assert pack_lengths([60, 50, 40, 30, 20, 10], 70) == [[60, 10], [50, 20], [40, 30]]
    assert pack_lengths([8, 8, 8, 8], 16) == [[8, 8], [8, 8]]


def test_what_is_left_over_makes_no_small_pack():
    assert pack_lengths([400, 300, 300, 200, 100], 1000) == [[400, 200, 100], [300, 300]]
    assert pack_lengths([6, 4, 4, 3, 3], 10) == [[6, 4], [4, 3, 3]]  # evened out it would not fit


def test_a_long_document_gets_its_own_pack_and_is_never_split():
    assert pack_lengths([5, 100, 5], 10) == [[100], [5, 5]]


def test_fast_on_many_documents():
    lengths = np.random.default_rng(0).integers(20, 700, 20_000).tolist()
    packs = pack_lengths(lengths, 4096)
    assert len(packs) <= sum(lengths) / 4096 * 1.01 + 1


def test_documents_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="r: a document needs a target"):
        pack_step([Document("r", np.arange(3, dtype=np.int32), np.zeros(3, np.float32))], 8)
    with pytest.raises(ValueError, match="first token"):
        pack_step([Document("r", np.arange(3, dtype=np.int32), np.ones(3, np.float32))], 8)


def make_side(name, side, length=4):
    return dataclasses.replace(document(length, name), side=side)


def test_a_pair_is_a_chosen_side_and_the_rejected_one_after_it():
    sides = [("a", "chosen"), ("a", "rejected"), ("b", ""), ("c", "rejected"), ("d", "chosen")]
    sides += [("e", "rejected"), ("f", "chosen"), ("f", "chosen"), ("f", "rejected")]
    units = group_units([make_side(name, side) for name, side in sides])
    assert units == [(0, 1), (2,), (3,), (4,), (5,), (6,), (7, 8)]
    assert group_units([make_side("a", "rejected")]) == [(0,)]
    assert group_units([]) == []


# ---------------------------------------------------------------- with common prefixes


def make_branches(prefix, *tails):
    """Documents of `prefix` equal tokens and then as many tokens of their own as each tail has."""
    documents = []
    for number, tail in enumerate(tails):
        tokens = np.concatenate([np.arange(prefix), np.full(tail + 1, 5000 + number)])
        weights = np.zeros(len(tokens), np.float32)
        weights[-1] = 1
        documents.append(Document(f"p{number}", tokens.astype(np.int32), weights))
    return documents


@pytest.mark.parametrize(("saved", "is_shared"), [(255, False), (256, False), (257, True)])
def test_a_prefix_is_shared_where_it_saves_more_than_another_pack_costs(saved, is_shared):
    """Unshared, two packs are full; shared, three documents of 60% need a pack each."""
    branches = make_branches(saved, 800 - saved, 800 - saved)
    singles = make_branches(0, 1200, 1200)
    packs = pack_step([*branches, *singles], 2000, should_share=True)
    assert len(packs) == (3 if is_shared else 2)
    assert any(any(pack.prefix_lengths) for pack in packs) == is_shared
    assert sum(map(count_computed_tokens, packs)) == 4000 - saved * is_shared


@pytest.mark.parametrize(
    ("count", "parts"), [(4, [4]), (5, [3, 2]), (7, [4, 3]), (8, [4, 4]), (9, [3, 3, 3])]
)
def test_a_run_over_the_pack_length_is_split_evenly(count, parts):
    packs = pack_step(make_branches(200, *[100] * count), 600, should_share=True)
    assert sorted((len(pack.documents) for pack in packs), reverse=True) == parts
    for pack in packs:
        assert pack.prefix_lengths == (0, *[200] * (len(pack.documents) - 1))
        assert count_computed_tokens(pack) == 200 + 100 * len(pack.documents)


def test_only_documents_of_one_group_share():
    branches = make_branches(400, 100, 200, 110, 210)
    packs = pack_step(branches, 10**4, should_share=True, get_group=lambda length: length > 550)
    (pack,) = packs
    by_name = dict(zip([d.id for d in pack.documents], pack.prefix_lengths, strict=True))
    assert sorted(by_name.values()) == [0, 0, 400, 400]
    assert {by_name["p0"], by_name["p2"]} == {by_name["p1"], by_name["p3"]} == {0, 400}


def test_the_saved_share_is_that_of_the_steps_of_a_run():
    rows = [[branch] for branch in make_branches(600, 100, 200, 100, 200, 100)]
    # two steps of two rows, in each of which 600 tokens stand once; the fifth row is in no step
    assert compute_saved_share(rows, 2, 10**4) == 1200 / (700 + 800 + 700 + 800)
    assert compute_saved_share(rows, 1, 10**4) == 0
    assert compute_saved_share(rows, 5, 10**4) == 2400 / (3 * 700 + 2 * 800)
    assert compute_saved_share(rows, 9, 10**4) == 2400 / (3 * 700 + 2 * 800)
    assert compute_saved_share([], 2, 10**4) == 0


# ---------------------------------------------------------------- several ranks

HIDDEN_SIZE = 2048


def rank_costs(parts, should_share=False):
    costs = []
    for part in parts:
        packs = pack_step(part, 8192, should_share=should_share)
        lengths = [count_input_tokens(d) for d in part]
        squares = sum(n**2 for n in lengths) / (12 * HIDDEN_SIZE)
        costs.append(sum(map(count_computed_tokens, packs)) + squares)
    return costs


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_ranks_get_documents_of_about_the_same_cost(num_ranks):
    generator = np.random.default_rng(num_ranks)
    for _ in range(100):
        lengths = np.clip(generator.gamma(3, 120, 8 * num_ranks), 20, 2048).astype(int)
        costs = rank_costs(share_out([document(n) for n in lengths], num_ranks, HIDDEN_SIZE))
        assert max(costs) <= 1.05 * np.mean(costs)


def test_every_document_goes_to_one_rank_and_pairs_stay_together():
    documents: list[Document] = []
    for number in range(9):
        both = document(5 + 3 * number, str(number))
        for side in ("chosen", "rejected"):
            documents.append(dataclasses.replace(both, side=side))
    parts = share_out(documents, 4, HIDDEN_SIZE)
    assert parts == share_out(documents, 4, HIDDEN_SIZE)
    names = [(d.id, d.side) for part in parts for d in part]
    assert sorted(names) == sorted((d.id, d.side) for d in documents)
    for part in parts:
        assert all(len(unit) == 2 for unit in group_units(part))


def test_one_rank_gets_all_documents_in_their_order():
    documents = [document(n, str(n)) for n in (3, 9, 5)]
    assert [d.id for d in share_out(documents, 1, HIDDEN_SIZE)[0]] == ["3", "9", "5"]


def test_more_ranks_than_documents_leave_some_without_any():
    assert sorted(map(len, share_out([document(3), document(4)], 3, HIDDEN_SIZE))) == [0, 1, 1]


def make_answers(prompt, lengths):
    documents: list[Document] = []
    for seed, length in enumerate(lengths):
        answer = np.random.default_rng(seed).integers(1000, 2000, length).astype(np.int32)
        weights = np.zeros(len(prompt) + length, np.float32)
        weights[-1] = 1
        documents.append(Document(str(seed), np.concatenate([prompt, answer]), weights))
    return documents


def test_a_small_group_with_one_prefix_stays_on_one_rank():
    generator = np.random.default_rng(1)
    documents: list[Document] = []
    for group in range(16):
        prompt = np.full(300, group, np.int32)
        documents += make_answers(prompt, generator.integers(20, 60, 3))
    parts = share_out(documents, 2, HIDDEN_SIZE, should_share=True)
    prompts = [{int(d.tokens_L[0]) for d in part} for part in parts]
    assert not prompts[0] & prompts[1]
    costs = rank_costs(parts, should_share=True)
    assert max(costs) <= 1.05 * np.mean(costs)


def test_a_prefix_of_all_documents_is_computed_by_every_rank():
    prompt = np.arange(400, dtype=np.int32)
    documents = make_answers(prompt, np.random.default_rng(2).integers(20, 200, 24))
    costs = rank_costs(share_out(documents, 3, HIDDEN_SIZE, should_share=True), should_share=True)
    assert max(costs) <= 1.05 * np.mean(costs)
