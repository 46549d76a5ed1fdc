"""Macro-F1 as a mean of items: sklearn's value, parts of the items, and intervals that cover."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tunesmith.evaluate.class_scores import Pair, compute_macro_f1_values, pair_labels
from tunesmith.evaluate.results import (
    MetricValues,
    compare_measurements,
    compute_score,
    select_items,
    split_by_task,
)

LABELS = ["net", "games", "text", "admin"]


def draw(n: int, right: float, seed: int = 0) -> tuple[Pair, ...]:
    chance = random.Random(seed)
    expected = [chance.choices(LABELS, weights=(4, 2, 1, 1))[0] for _ in range(n)]
    answers = [each if chance.random() < right else chance.choice(LABELS) for each in expected]
    return tuple(zip(expected, answers, strict=True))


def measure(pairs: tuple[Pair, ...]) -> MetricValues:
    ids = tuple(map(str, range(len(pairs))))
    return MetricValues("test", "macro_f1", ids, compute_macro_f1_values(pairs), classes=pairs)


def test_it_is_the_macro_f1_of_sklearn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    answers = ["net", " net\n", "I think net", "Net", "text"]
    pairs = (*draw(90, 0.5), *pair_labels(["net", "games", "text", "text", "admin"], answers))
    expected, answered = zip(*pairs, strict=True)
    assert answered[-5:] == ("net", "net", "", "", "text"), "graded as written, up to white space"
    value = metrics.f1_score(expected, answered, labels=LABELS, average="macro", zero_division=0.0)
    assert compute_score(measure(pairs)).value == pytest.approx(value)


def test_parts_of_the_items_have_their_own() -> None:
    pairs = draw(80, 0.5)
    part = select_items(measure(pairs), range(40))
    assert part.values == compute_macro_f1_values(pairs[:40])
    tasks = {str(index): "ab"[index >= 40] for index in range(80)}
    first, second, mean = split_by_task(measure(pairs), tasks, {"a", "b"})
    halves = [compute_score(each).value for each in (first, second)]
    assert compute_score(mean).value == pytest.approx(np.mean(halves))
    assert select_items(mean, range(80)) == mean


def test_equal_answers_do_not_look_certain() -> None:
    pairs = draw(30, 1.0)
    perfect = compute_score(measure(pairs))
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low < 0.95
    same = compare_measurements(measure(draw(30, 0.5)), measure(draw(30, 0.5)))
    assert same.low < same.difference == 0 < same.high


def test_intervals_cover_the_truth() -> None:
    """Of 200 test sets of 60 rows: of the value, and of the difference of two models."""
    before_truth = np.mean(compute_macro_f1_values(draw(40_000, 0.4)))
    after_truth = 2 * 0.7 / 1.7  # 70% right, and wrong answers are no label: precision 1
    covered = np.zeros(2)
    for seed in range(200):
        pairs = draw(60, 0.4, seed)
        before = measure(pairs)
        chance = random.Random(seed + 10_000)
        answers = [expected if chance.random() < 0.7 else "" for expected, _ in pairs]
        after = measure(tuple(zip([expected for expected, _ in pairs], answers, strict=True)))
        score = compute_score(before)
        covered[0] += score.low <= before_truth <= score.high
        change = compare_measurements(before, after)
        covered[1] += change.low <= after_truth - before_truth <= change.high
    assert min(covered / 200) >= 0.92
    assert max(covered / 200) <= 0.995
