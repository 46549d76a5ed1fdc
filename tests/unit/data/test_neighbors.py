"""What neighbors answer: against a plain count over all pairs."""

import numpy as np

from tunesmith.data import neighbors as neighbors_module
from tunesmith.data.neighbors import build_word_vectors, find_neighbors, normalize_rows


def test_neighbors_are_those_of_a_plain_search_in_pieces_too(monkeypatch):
    random = np.random.default_rng(0)
    questions, answers = (normalize_rows(random.normal(size=(23, 8))) for _ in range(2))
    among = np.array([row for row in range(23) if row % 7])
    neighbors = find_neighbors(questions, answers, among)
    monkeypatch.setattr(neighbors_module, "CHUNK_SIZE", 40)
    pieces = find_neighbors(questions, answers, among)
    for row in range(23):
        if row not in among:
            assert np.isnan(neighbors.answer_similarity_N[row])
            continue
        others = [other for other in among if other != row]
        nearest = sorted(others, key=lambda other: -float(questions[row] @ questions[other]))[:5]
        assert neighbors.nearest_NK[row].tolist() == pieces.nearest_NK[row].tolist() == nearest
        pairs = [float(answers[a] @ answers[b]) for a in nearest for b in nearest if a != b]
        similarity = np.mean([answers[row] @ answers[other] for other in nearest])
        np.testing.assert_allclose(
            [neighbors.answer_similarity_N[row], neighbors.neighbor_agreement_N[row]],
            [similarity, np.mean(pairs)],
            atol=1e-5,
        )
        np.testing.assert_allclose(pieces.answer_similarity_N[row], similarity, atol=1e-5)


def test_planted_wrong_labels_are_found_and_free_answers_are_not_disputed():
    questions = [
        f"is the {thing} {i} of the {thing} shop hot"
        for i in range(10)
        for thing in ("oven", "ice")
    ]
    labels = ["yes" if "oven" in question else "no" for question in questions]
    labels[4], labels[11] = "no", "yes"
    neighbors = find_neighbors(
        build_word_vectors(questions), build_word_vectors(labels), np.arange(20)
    )
    assert np.flatnonzero(neighbors.disputed_N).tolist() == [4, 11]
    free = [f"word{i} and thing{i} with part{i}" for i in range(20)]
    assert not find_neighbors(
        build_word_vectors(questions), build_word_vectors(free), np.arange(20)
    ).disputed_N.any()


def test_a_row_that_asks_something_else_is_not_disputed():
    questions = [*(f"is the oven {i} of the oven shop hot" for i in range(9)), "who sings"]
    neighbors = find_neighbors(
        build_word_vectors(questions), build_word_vectors(["yes"] * 9 + ["a lark"]), np.arange(10)
    )
    assert neighbors.neighbor_agreement_N[9] > 0.99
    assert neighbors.answer_similarity_N[9] < 0.01
    assert not neighbors.disputed_N.any()


def test_of_two_rows_nothing_is_said():
    vectors = build_word_vectors(["one", "two"])
    neighbors = find_neighbors(vectors, vectors, np.arange(2))
    assert np.isnan(neighbors.answer_similarity_N).all()
    assert not neighbors.disputed_N.any()
