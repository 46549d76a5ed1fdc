"""The documents that preflight chooses, cuts and packs."""

import dataclasses

import numpy as np
import pytest

from tiny_models import continue_document, make_tiny_document, make_tiny_documents
from tunesmith.core.types import Document, PackLayout
from tunesmith.data.packing import count_input_tokens
from tunesmith.session.preflight_probe import (
    CHAINED_SUFFIX,
    FORK_TOKENS,
    MAX_CHECKED_POSITIONS,
    TRUNCATED_SUFFIX,
    choose_documents,
    choose_packed_documents,
    choose_positions,
    choose_sharing_documents,
    find_siblings,
    mark_banned,
    mark_longer,
    pack_beyond,
    trim_to_fork,
    truncate,
)


def measure(documents: tuple[Document, ...] | list[Document]) -> list[int]:
    return [count_input_tokens(document) for document in documents]


def set_side(document: Document, side: str) -> Document:
    return dataclasses.replace(document, side=side)


def test_the_quarter_and_the_half_are_chosen_with_the_ends() -> None:
    documents = make_tiny_documents(range(39, 2, -1))  # 3 .. 39
    assert measure(choose_documents(documents, None)) == [3, 12, 21, 39]
    assert measure(choose_documents(documents[:2], None)) == [38, 39]


@pytest.mark.parametrize("side", ["rejected", "undesirable"])
def test_the_ends_of_the_worse_answers_are_chosen_too(side: str) -> None:
    better = [set_side(d, "chosen") for d in make_tiny_documents((10, 20))]
    worse = [set_side(d, side) for d in make_tiny_documents((30, 5, 15))]
    chosen = choose_documents([*better, *worse], None)
    assert measure(chosen) == [5, 10, 20, 30]
    assert {document.side for document in chosen} == {""}
    assert measure(choose_documents(worse, None)) == [5, 30]
    assert measure(choose_documents(worse[:1], None)) == [30, 30]


@pytest.mark.parametrize(("lengths", "is_chained"), [((3, 8), True), ((3, 9), False)])
def test_a_window_has_a_longer_document(lengths: tuple[int, int], is_chained: bool) -> None:
    documents = make_tiny_documents(lengths)
    chosen = choose_documents(documents, 8)
    assert len(chosen) == 2 + is_chained
    longest = chosen[-1]
    assert count_input_tokens(longest) > 8
    assert longest.id.endswith(CHAINED_SUFFIX) == is_chained
    if is_chained:
        rows = np.concatenate([documents[0].tokens_L, documents[1].tokens_L])
        assert longest.tokens_L.tolist() == rows[: len(longest)].tolist()
        assert longest.weights_L.tolist() == [0] + [1] * (len(longest) - 1)


def test_the_longest_of_many_is_packed_with_the_two_shortest() -> None:
    documents = tuple(make_tiny_documents((3, 4, 5, 6)))
    assert measure(choose_packed_documents(documents)) == [3, 4, 6]
    assert choose_packed_documents(documents[:1]) == documents[:1]


def test_positions_are_inputs_and_spread_evenly() -> None:
    assert choose_positions(make_tiny_document(1)) == [0]
    assert choose_positions(make_tiny_document(MAX_CHECKED_POSITIONS)) == list(
        range(MAX_CHECKED_POSITIONS)
    )
    positions = choose_positions(make_tiny_document(1000, first_target=1000))
    assert positions[0] == 0
    assert positions[-1] == 999
    assert set(np.diff(positions)) <= {15, 16}


def test_positions_that_predict_a_short_answer_are_all_checked() -> None:
    document = make_tiny_document(1000, first_target=996)
    document.weights_L[996:] = 1

    assert choose_positions(document)[-5:] == [995, 996, 997, 998, 999]


def test_a_truncated_document_ends_with_its_only_target() -> None:
    document = make_tiny_document(20)
    short = truncate(document, 5)
    assert short.id == document.id
    assert short.tokens_L.tolist() == document.tokens_L[:6].tolist()
    assert short.weights_L.tolist() == [0, 0, 0, 0, 0, 1]
    assert truncate(document, 90).tokens_L.tolist() == document.tokens_L.tolist()


def test_only_a_longer_truncated_document_is_added_and_marked() -> None:
    complete = make_tiny_documents((4, 9))
    (longest,) = mark_longer(make_tiny_documents((7, 10)), complete)
    assert count_input_tokens(longest) == 10
    assert longest.id.endswith(TRUNCATED_SUFFIX)
    assert mark_longer(make_tiny_documents((9,)), complete) == []
    assert measure(mark_longer(make_tiny_documents((1,)), [])) == [1]
    (banned,) = mark_banned(complete[:1])
    assert banned.id == f"{complete[0].id}, banned"


def test_siblings_have_one_parent() -> None:
    def find(*parents: int) -> tuple[int, int] | None:
        return find_siblings(PackLayout((0,) * len(parents), (1,) * len(parents), parents))

    assert find(-1, 0, 0) == (1, 2)
    assert find(-1, -1) is None
    assert find(-1, 0, 1) is None
    assert find(-1, 0, 1, 1, 0) == (2, 3)


def test_a_pack_exceeds_the_limit_by_half() -> None:
    documents = make_tiny_documents((4, 7))
    layout = pack_beyond(documents, 20).layout
    assert sorted(layout.lengths) == [4, 7, 7, 7, 7]  # 30 tokens and more
    assert sorted(pack_beyond(documents, 22).layout.lengths) == [4, 7, 7, 7, 7, 7]
    assert sorted(pack_beyond(documents, 7).layout.lengths) == [4, 7]


def test_documents_are_cut_around_their_fork() -> None:
    prompt = make_tiny_document(100)
    documents = [continue_document(prompt, 60, length) for length in (90, 10)]
    trimmed = trim_to_fork(documents)
    assert sorted(measure(trimmed)) == [FORK_TOKENS + 10, 2 * FORK_TOKENS]
    for document in trimmed:
        shared = document.tokens_L[:FORK_TOKENS].tolist()
        assert shared == prompt.tokens_L[60 - FORK_TOKENS : 60].tolist()
        assert np.flatnonzero(document.weights_L).tolist() == [len(document) - 1]
    near_the_start = [continue_document(prompt, 30, length) for length in (9, 10)]
    assert sorted(measure(trim_to_fork(near_the_start))) == [39, 40]


def test_the_shortest_three_are_preferred_to_two() -> None:
    prompt, other = make_tiny_document(30), make_tiny_document(20)
    three = [continue_document(prompt, 30, length) for length in (9, 20, 5)]
    two = [continue_document(other, 20, length) for length in (200, 210)]
    chosen = choose_sharing_documents([*three, *two])
    assert sorted(d.id for d in chosen) == sorted(d.id for d in three)
    longer = [continue_document(prompt, 30, length, 1) for length in (60, 70, 80)]
    chosen = choose_sharing_documents([*longer, *three])
    assert sorted(d.id for d in chosen) == sorted(d.id for d in three)
    assert sorted(d.id for d in choose_sharing_documents(two)) == sorted(d.id for d in two)


def test_a_document_without_a_partner_parts_from_its_copy_in_the_middle() -> None:
    documents = make_tiny_documents((3, 60))
    first, second = choose_sharing_documents(documents)
    half = len(documents[1]) // 2
    assert first.tokens_L.tolist() == documents[1].tokens_L.tolist()
    assert second.tokens_L[:half].tolist() == first.tokens_L[:half].tolist()
    assert second.tokens_L[half + 1 :].tolist() == first.tokens_L[half:-1].tolist()
