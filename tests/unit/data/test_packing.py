import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.types import Document
from tunesmith.data.packing import count_input_tokens, pack_step


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
