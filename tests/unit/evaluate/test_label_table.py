"""Precision, recall and F1 by label, and confusions: sklearn's values, few rows, odd labels."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tunesmith.core.evidence import ErrorGroup
from tunesmith.evaluate.label_table import LabelItem, measure_labels
from tunesmith.evaluate.statistics import MIN_ITEMS

LABELS = ["net", "games", "text", "admin"]


Groups = dict[str, ErrorGroup]


def measure(
    pairs: list[tuple[str, str]], groups: list[str] | None = None, **training: int
) -> tuple[SimpleNamespace, Groups]:
    items = [
        LabelItem(str(row), *pair, groups[row] if groups else "") for row, pair in enumerate(pairs)
    ]
    table, confusions, others = measure_labels(items, training)
    errors = SimpleNamespace(table=table, confusions=confusions, other_answers=others)
    return errors, {group.name: group for group in table.groups}


def draw(n: int, seed: int = 0) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    expected = [chance.choices(LABELS, weights=(5, 3, 1, 1))[0] for _ in range(n)]
    words = [*LABELS, "I think so"]
    return [(each, each if chance.random() < 0.6 else chance.choice(words)) for each in expected]


def build_matrix(errors: SimpleNamespace, groups: Groups) -> Counter[tuple[str, str]]:
    matrix = Counter({(name, name): each.n - each.wrong for name, each in groups.items()})
    matrix.update({(each.expected, each.answered or ""): each.n for each in errors.confusions})
    return +matrix


def test_rates_are_those_of_sklearn_and_the_matrix_is_whole() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    pairs = draw(200)
    errors, groups = measure(pairs, net=70)
    expected, answered = zip(*pairs, strict=True)
    rates = metrics.precision_recall_fscore_support(expected, answered, labels=LABELS)
    for index, label in enumerate(LABELS):
        group = groups[label]
        for rate, truth in zip((group.precision, group.recall, group.f1), rates, strict=False):
            assert rate is not None
            assert rate[0] == pytest.approx(truth[index])
            assert 0 <= rate[1] <= rate[0] <= rate[2] <= 1
        assert group.n == rates[3][index]
    assert [groups["net"].training_rows, groups["text"].training_rows] == [70, 0]
    outside = Counter((e, a if a in LABELS else "") for e, a in pairs)
    assert build_matrix(errors, groups) == outside
    assert errors.other_answers == {
        "I think so": outside.total() - sum(group.answered for group in groups.values())
    }
    values = [group.f1[0] for group in errors.table.groups if group.f1]
    assert values == sorted(values), "the worst first"


def test_intervals_of_f1_cover_the_truth() -> None:
    truth = {name: group.f1[0] for name, group in measure(draw(50_000, 99))[1].items() if group.f1}
    covered: list[bool] = []
    for seed in range(200):
        for name, group in measure(draw(120, seed))[1].items():
            if group.f1 is not None:
                covered.append(group.f1[1] <= truth[name] <= group.f1[2])
    assert 0.93 <= np.mean(covered) <= 0.985


def test_few_rows_or_groups_have_no_value() -> None:
    few = MIN_ITEMS - 1
    pairs = [("net", "net")] * 40 + [("rare", "rare")] * few
    _, groups = measure(pairs)
    rare = groups["rare"]
    assert (rare.n, rare.wrong, rare.low, rare.high) == (few, 0, 0.0, 1.0)
    assert (rare.precision, rare.recall, rare.f1) == (None, None, None)
    names = [str(row % 3) for row in range(len(pairs))]
    assert measure(pairs, names)[1]["net"].f1 is None, "three groups of rows"
    assert measure(pairs, ["one"] * len(pairs))[1]["net"].recall is None
    wide = measure(pairs, [str(row // 4) for row in range(len(pairs))])[1]["net"].recall
    alone = groups["net"].recall
    assert wide
    assert alone
    assert wide[1] < alone[1], "four rows of a group count as one"


def test_odd_labels() -> None:
    evil = "<script>alert(1)</script>"
    pairs = [("Net", "net")] * 8 + [("net", "net")] * 8 + [(evil, "x" * 900)] * 6
    pairs += [("a" * 300, "a" * 299 + "b"), ("a" * 300, "a" * 300), ("a" * 299 + "b", "mail")]
    errors, groups = measure(pairs, mail=9, unseen=3)
    assert (groups["Net"].wrong, groups["net"].answered) == (8, 16), "as graded: case counts"
    assert (groups["mail"].n, groups["mail"].answered, groups["mail"].f1) == (0, 1, None)
    assert "unseen" not in groups
    assert groups[evil].no_label == 6
    assert len([name for name in groups if name.startswith("aaa")]) == 2
    assert max(map(len, (*groups, *errors.other_answers))) <= 120
    _, one = measure([("yes", "yes")] * 9)
    assert list(one) == ["yes"]
    assert measure([], yes=3)[1] == {}


def test_more_labels_than_are_shown() -> None:
    errors, groups = measure([(f"label {row % 51}", "label 1") for row in range(357)])
    assert (len(groups), errors.table.omitted) == (50, 1)
    assert groups["label 1"].precision is not None
