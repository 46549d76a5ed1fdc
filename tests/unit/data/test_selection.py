import json

import numpy as np
import pytest

from tunesmith.data import selection as choosing
from tunesmith.data.checks.ngrams import hash_words
from tunesmith.data.dataset import open_dataset
from tunesmith.data.selection import (
    SelectionScores,
    find_faults,
    select_baselines,
    select_farthest,
    select_rows,
)
from tunesmith.recipe.fields import DataSource


@pytest.fixture
def opened(write, words):
    def of(rows, name="rows.jsonl"):
        turns = (
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows
        )
        path = write("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), name)
        return open_dataset([DataSource(path=path)], words)

    return of


def scores(difficulty, perplexity=None, tokens=None, problems=None, texts=None):
    count = len(difficulty)
    words = [hash_words(text) % 512 for text in texts or [f"text {i}" for i in range(count)]]
    vectors = np.stack([np.bincount(each.astype(int), minlength=512) for each in words])
    return SelectionScores(
        perplexity_N=np.array(perplexity or [2.0] * count),
        difficulty_N=np.array(difficulty),
        answer_tokens_N=np.array(tokens or [5] * count),
        problems=problems or {},
        vectors_NV=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
    )


def test_rows_with_a_fault_are_left_out_with_it(opened):
    long = (
        "turn the wheel until the hand stands on the hour then press it in "
        "and wait for a click in the clock"
    )
    data = opened(
        [
            ("how", f"{long}."),
            ("why", "As an AI, no."),
            ("how", f"{long}."),
            ("how", f"{long} indeed."),
            ("what", "A key: AKIAQ7DFH2LMNX5TRV4W."),
            ("who", "Held out."),
            ("fine", "This is fine."),
        ]
    )
    assert find_faults(data, {"test_data": opened([("who", "Held out.")], "test.jsonl")}) == {
        1: "disclaimers: AI disclaimer",
        2: "duplicate of rows.jsonl:1",
        3: "duplicate of rows.jsonl:1",
        4: "secrets: AWS keys",
        5: "is also in test_data",
    }


def test_hard_questions_are_kept_and_every_other_row_has_its_reason(opened, monkeypatch):
    monkeypatch.setattr(choosing, "OVERSAMPLING", 1)
    data = opened([(f"question {i}", f"answer {i}") for i in range(8)])
    row_scores = scores(
        [0.5, 0.9, 1.2, 0.7, 0.8, 0.95, float("nan"), 0.6],
        [2, 2, 2, 2, 2, 99, float("nan"), 2],
        problems={6: "gone"},
    )
    selected, reasons = select_rows(data, row_scores, {4: "markers"}, 2)
    assert selected.tolist() == [1, 3]
    assert sorted([*selected.tolist(), *reasons]) == list(range(8))
    assert reasons[2] == "the question does not help: difficulty 1.200"
    assert reasons[5].startswith("unlikely answer: perplexity 99")
    assert (reasons[4], reasons[6]) == ("markers", "gone")
    assert reasons[7] == "little to learn: difficulty 0.600, not among the hardest 2"


def test_of_the_best_rows_those_are_kept_that_differ(opened):
    alike = [(f"how do clocks of kind {i} run", "they run by springs and wheels") for i in range(4)]
    rows = [
        *alike,
        ("why is the sea salty", "rivers carry salt"),
        ("who sings", "a lark in the morning"),
    ]
    row_scores = scores(
        [0.9, 0.89, 0.88, 0.87, 0.86, 0.85],
        texts=[f"{question} {answer}" for question, answer in rows],
    )
    selected, reasons = select_rows(opened(rows), row_scores, {}, 3)
    assert selected.tolist() == [0, 4, 5]
    assert reasons == dict.fromkeys((1, 2, 3), "similar to rows.jsonl:1, which is selected")


def test_the_farthest_are_taken_one_after_the_other():
    vectors = np.array([[1, 0], [0.99, 0.14], [0, 1], [0.7, 0.7]], dtype=np.float32)
    selected, nearest = select_farthest(vectors, 3)
    assert selected == [0, 2, 3]
    assert nearest.tolist()[1] == 0
    assert select_farthest(vectors[:0], 3)[0] == []


def test_baselines_have_the_same_size_and_the_longest_answers():
    row_scores = scores([0.5] * 6, tokens=[1, 9, 3, 8, 7, 2], problems={1: "gone"})
    subsets = select_baselines(row_scores, 2, seed=0)
    assert subsets["longest"].tolist() == [3, 4]
    assert len(subsets["random"]) == 2
    assert 1 not in subsets["random"]
    assert any(
        select_baselines(row_scores, 2, seed=s)["random"].tolist() != subsets["random"].tolist()
        for s in range(1, 9)
    )
