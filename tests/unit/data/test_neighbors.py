"""What neighbours answer: against a plain count over all pairs."""

import numpy as np

from tunesmith.data import neighbors as near
from tunesmith.data.neighbors import build_word_vectors, find_neighbors, normalize_rows


def test_neighbours_are_those_of_a_plain_search_in_pieces_too(monkeypatch):
    random = np.random.default_rng(0)
    asked, said = (normalize_rows(random.normal(size=(23, 8))) for _ in range(2))
    among = np.array([row for row in range(23) if row % 7])
    whole = find_neighbors(asked, said, among)
    monkeypatch.setattr(near, "CHUNK_SIZE", 40)
    pieces = find_neighbors(asked, said, among)
    for row in range(23):
        if row not in among:
            assert np.isnan(whole.answer_similarity_N[row])
            continue
        others = [other for other in among if other != row]
        nearest = sorted(others, key=lambda other: -float(asked[row] @ asked[other]))[:5]
        assert whole.nearest_NK[row].tolist() == pieces.nearest_NK[row].tolist() == nearest
        pairs = [float(said[a] @ said[b]) for a in nearest for b in nearest if a != b]
        own = np.mean([said[row] @ said[other] for other in nearest])
        np.testing.assert_allclose(
            [whole.answer_similarity_N[row], whole.neighbor_agreement_N[row]],
            [own, np.mean(pairs)],
            atol=1e-5,
        )
        np.testing.assert_allclose(pieces.answer_similarity_N[row], own, atol=1e-5)


def test_planted_wrong_labels_are_found_and_free_answers_are_not_disputed():
    asked = [
        f"is the {thing} {i} of the {thing} shop hot"
        for i in range(10)
        for thing in ("oven", "ice")
    ]
    labels = ["yes" if "oven" in question else "no" for question in asked]
    labels[4], labels[11] = "no", "yes"
    found = find_neighbors(build_word_vectors(asked), build_word_vectors(labels), np.arange(20))
    assert np.flatnonzero(found.disputed_N).tolist() == [4, 11]
    free = [f"word{i} and thing{i} with part{i}" for i in range(20)]
    assert not find_neighbors(
        build_word_vectors(asked), build_word_vectors(free), np.arange(20)
    ).disputed_N.any()


def test_a_row_that_asks_something_else_is_not_disputed():
    asked = [*(f"is the oven {i} of the oven shop hot" for i in range(9)), "who sings"]
    found = find_neighbors(
        build_word_vectors(asked), build_word_vectors(["yes"] * 9 + ["a lark"]), np.arange(10)
    )
    assert found.neighbor_agreement_N[9] > 0.99
    assert found.answer_similarity_N[9] < 0.01
    assert not found.disputed_N.any()


def test_of_two_rows_nothing_is_said():
    vectors = build_word_vectors(["one", "two"])
    found = find_neighbors(vectors, vectors, np.arange(2))
    assert np.isnan(found.answer_similarity_N).all()
    assert not found.disputed_N.any()
